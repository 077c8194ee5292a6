"""Download published generated data: resumable, and verified by the size and sha256 that the Hub states.

An interrupted transfer leaves FILE.part, from which the same command resumes.
"""

import shlex
import shutil
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.core.files import make_folder, sha256_of
from nrat_scale.remote.address import HubAddress, is_remote, parse_hub
from nrat_scale.remote.stores import hub_failure
from nrat_scale.remote.transfer import download as fetch


class Published(NamedTuple):
    """The files of one data set in a repository of the Hugging Face Hub."""

    repo: str
    files: tuple[str, ...]  # in the order of the samples
    dataset: str | None = None  # a key of `DATASETS`
    revision: str | None = None  # default: the main branch


# Images of EDM for Wang et al. 2023, "Better Diffusion Models Further Improve Adversarial Training", as linked in
# https://github.com/wzekai99/DM-Improves-AT. About 3.1 GB for a million images.
_EDM = "P2333/DM-Improves-AT"
PUBLISHED = {
    "cifar10_1m": Published(_EDM, ("cifar10/1m.npz",), "cifar10"),
    "cifar10_5m": Published(_EDM, ("cifar10/5m.npz",), "cifar10"),
    "cifar10_10m": Published(_EDM, ("cifar10/10m.npz",), "cifar10"),
    "cifar10_20m": Published(_EDM, ("cifar10/20m_part1.npz", "cifar10/20m_part2.npz"), "cifar10"),
    "cifar10_50m": Published(_EDM, tuple(f"cifar10/50m_part{n}.npz" for n in (1, 2, 3, 4)), "cifar10"),
    "cifar100_1m": Published(_EDM, ("cifar100/1m.npz",), "cifar100"),
    "cifar100_50m": Published(_EDM, tuple(f"cifar100/50m_part{n}.npz" for n in (1, 2, 3, 4)), "cifar100"),
}


def listing() -> str:
    """The keys of `PUBLISHED` and their files, one line each."""
    width = max(map(len, PUBLISHED))
    return "\n".join(f"{name:{width}}  {each.repo}: {', '.join(each.files)}" for name, each in PUBLISHED.items())


def download(names: Sequence[str], folder: Path) -> Iterator[str]:
    """Download data sets into `folder`; yields a line for each file, and the command that converts each data set.

    Args:
        names: keys of `PUBLISHED`, or hf://datasets/USER/REPO/FILE.

    Raises:
        UserError: an unknown name, no such file, no space, or the Hub cannot be reached.
    """
    if not names:
        raise UserError("Give the NAME of a data set; --list shows them.")
    for name, published in [(name, _published(name)) for name in names]:
        paths = [folder / file for file in published.files]
        for described, path in zip(_described(published), paths, strict=True):
            yield fetch_file(path, *described)
        out = name if name in PUBLISHED else PurePosixPath(published.files[0]).stem
        options = ["--dataset", published.dataset] if published.dataset else []
        command = ["python", "-m", "nrat_scale.prepare", "npz", *map(str, paths), *options, "--out", f"data/{out}"]
        yield f"next: {shlex.join(command)}"


def hub_file(name: str) -> HubAddress:
    """The parts of hf://datasets/USER/REPO[@REVISION]/FILE; another form raises a UserError."""
    address = parse_hub(name)
    if address.kind == "bucket":
        raise UserError(f"{name} is in a bucket, which states no sha256. Fetch it with: hf buckets cp {name} FILE")
    if not address.path:
        raise UserError(f"{name} is a repository. Give a file in it: hf://datasets/USER/REPO/FILE.")
    return address


def _published(name: str) -> Published:
    if is_remote(name):
        address = hub_file(name)
        if address.path.startswith("/") or ".." in PurePosixPath(address.path).parts:
            raise UserError(f"{name} leads out of the data set. Give the path of a file in it.")
        return Published(address.repo, (address.path,), revision=address.revision)
    if name not in PUBLISHED:
        hint = did_you_mean(name, PUBLISHED)
        raise UserError(f"There is no data set '{name}'. {hint} Or give hf://datasets/USER/REPO/FILE.")
    return PUBLISHED[name]


def _described(published: Published) -> list[tuple[str, int, str | None]]:
    """(address, bytes, sha256) of each file, in one request; the Hub has no sha256 of small files, which gives None."""
    import huggingface_hub

    repo, revision = published.repo, published.revision
    try:
        api = huggingface_hub.HfApi()
        found = api.get_paths_info(repo, list(published.files), repo_type="dataset", revision=revision)
    except Exception as error:  # the Hub's client raises errors of several HTTP libraries
        reason = hub_failure(error)
        raise UserError(
            f"The Hub does not describe the data set {repo} ({reason}). Check the name and the network."
        ) from error
    files = {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}
    if missing := [name for name in published.files if name not in files]:
        raise UserError(f"The data set {repo} on the Hub has no file {missing[0]}. It may have been renamed.")
    root = f"hf://datasets/{repo}" + (f"@{urllib.parse.quote(revision, safe='')}" if revision else "")
    entries = [files[name] for name in published.files]
    return [(f"{root}/{entry.path}", entry.size, entry.lfs.sha256 if entry.lfs else None) for entry in entries]


def fetch_file(path: Path, url: str, num_bytes: int, sha256: str | None) -> str:
    """Download `url` to `path` unless it is already there; returns a summary line.

    Raises:
        UserError: `path` is another file, there is no space, or the transfer fails.
    """
    if path.exists():
        if path.stat().st_size != num_bytes or (sha256 and sha256_of(path) != sha256):
            raise UserError(f"{path} exists, but is not the published file. Remove it, or choose another --to.")
        return f"{path}: already downloaded, verified"
    part = path.with_name(f"{path.name}.part")
    num_done = part.stat().st_size if part.exists() else 0
    make_folder(path.parent)
    if shutil.disk_usage(path.parent).free < num_bytes - num_done:
        what = f"{path.name} ({num_bytes / 1e9:.1f} GB) in {path.parent}"
        raise UserError(f"There is not enough space for {what}. Free some space, or choose another --to.")
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "desc": path.name, "disable": not sys.stderr.isatty()}
    with tqdm(total=num_bytes, initial=num_done, **options) as bar:
        fetch(url, path, num_bytes, sha256, progress=lambda size: bar.update(size - bar.n))
    return f"{path}: {num_bytes / 1e6:.1f} MB, verified"
