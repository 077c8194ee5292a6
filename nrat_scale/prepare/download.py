"""Download published generated data: resumable, and verified by the size and sha256 that the Hub states.

An interrupted transfer leaves FILE.part, from which the same command resumes.
"""

import shlex
import shutil
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from nrat_scale.core.errors import UserError, did_you_mean
from nrat_scale.core.files import make_folder, sha256_of
from nrat_scale.remote.address import HubAddress, is_remote, parse_hub
from nrat_scale.remote.stores import hub_failure
from nrat_scale.remote.transfer import download as fetch


@dataclass(frozen=True)
class Published:
    """Files that make one data set.

    Attributes:
        repo: a data set on the Hugging Face Hub.
        files: in the order of the samples.
        dataset: a key of `DATASETS`; None if unknown.
        revision: of `repo`; None for the main branch.
    """

    repo: str
    files: tuple[str, ...]
    dataset: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub describes it; it states no sha256 for small files."""

    url: str
    num_bytes: int
    sha256: str | None


def _parts(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}_part{number}.npz" for number in range(1, count + 1))


# Images of EDM for Wang et al. 2023, "Better Diffusion Models Further Improve Adversarial Training", as linked in
# https://github.com/wzekai99/DM-Improves-AT. About 3.1 GB for a million images.
_EDM = "P2333/DM-Improves-AT"
PUBLISHED = {
    "cifar10_1m": Published(_EDM, ("cifar10/1m.npz",), "cifar10"),
    "cifar10_5m": Published(_EDM, ("cifar10/5m.npz",), "cifar10"),
    "cifar10_10m": Published(_EDM, ("cifar10/10m.npz",), "cifar10"),
    "cifar10_20m": Published(_EDM, _parts("cifar10/20m", 2), "cifar10"),
    "cifar10_50m": Published(_EDM, _parts("cifar10/50m", 4), "cifar10"),
    "cifar100_1m": Published(_EDM, ("cifar100/1m.npz",), "cifar100"),
    "cifar100_50m": Published(_EDM, _parts("cifar100/50m", 4), "cifar100"),
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
        paths = [_path_in(folder, file) for file in published.files]
        for remote, path in zip(_described(published), paths, strict=True):
            yield fetch_file(remote, path)
        yield f"next: {_next_command(name, published, paths)}"


def hub_file(name: str) -> HubAddress:
    """The parts of hf://datasets/USER/REPO[@REVISION]/FILE.

    Raises:
        UserError: the address has another form.
    """
    address = parse_hub(name)
    if not address.path:
        raise UserError(f"{name} is a repository. Give a file in it: hf://datasets/USER/REPO/FILE.")
    return address


def _published(name: str) -> Published:
    if is_remote(name):
        address = hub_file(name)
        return Published(address.repo, (address.path,), revision=address.revision)
    if name not in PUBLISHED:
        raise UserError(
            f"Nothing is known as '{name}'. {did_you_mean(name, PUBLISHED)} Or give hf://datasets/USER/REPO/FILE."
        )
    return PUBLISHED[name]


def _path_in(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if parts[0] == "/" or ".." in parts:
        raise UserError(f"{name} leads out of {folder}. Give the path of a file in the data set.")
    return folder.joinpath(*parts)


def _described(published: Published) -> list[RemoteFile]:
    """Size and hash of the files, in one request to the Hub."""
    import huggingface_hub

    repo, revision = published.repo, published.revision
    try:
        api = huggingface_hub.HfApi()
        found = api.get_paths_info(repo, list(published.files), repo_type="dataset", revision=revision)
    except Exception as error:  # the Hub's client raises errors of several HTTP libraries
        raise UserError(
            f"The Hub does not describe the data set {repo} ({hub_failure(error)}). Check the name and the network; "
            "private data needs `hf auth login`."
        ) from error
    files = {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}
    if missing := [name for name in published.files if name not in files]:
        raise UserError(f"The data set {repo} on the Hub has no file {missing[0]}. It may have been renamed.")
    root = f"hf://datasets/{repo}" + (f"@{urllib.parse.quote(revision, safe='')}" if revision else "")
    described = []
    for name in published.files:
        entry, lfs = files[name], files[name].lfs
        described.append(RemoteFile(f"{root}/{name}", lfs.size if lfs else entry.size, lfs.sha256 if lfs else None))
    return described


def fetch_file(remote: RemoteFile, path: Path) -> str:
    """Download a file to `path` unless it is already there; returns a summary line.

    Raises:
        UserError: `path` is another file, there is no space, or the transfer fails.
    """
    if path.exists():
        if path.stat().st_size != remote.num_bytes or (remote.sha256 and sha256_of(path) != remote.sha256):
            raise UserError(
                f"{path} already exists, but is not the published file ({remote.num_bytes} bytes, sha256 "
                f"{(remote.sha256 or 'unknown')[:12]}...). Remove it, or choose another --to."
            )
        return f"{path}: already downloaded, verified"
    part = path.with_name(f"{path.name}.part")
    num_done = part.stat().st_size if part.exists() else 0
    make_folder(path.parent)
    if shutil.disk_usage(path.parent).free < remote.num_bytes - num_done:
        raise UserError(
            f"There is not enough space for {path.name} ({remote.num_bytes / 1e9:.1f} GB) in {path.parent}. Free some space, or "
            "choose another folder with --to."
        )
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "desc": path.name, "disable": not sys.stderr.isatty()}
    with tqdm(total=remote.num_bytes, initial=num_done, **options) as bar:
        fetch(remote.url, path, remote.num_bytes, remote.sha256, progress=lambda size: bar.update(size - bar.n))
    return f"{path}: {remote.num_bytes / 1e6:.1f} MB, verified"


def _next_command(name: str, published: Published, paths: Sequence[Path]) -> str:
    out = name if name in PUBLISHED else PurePosixPath(published.files[0]).stem
    words = ["python", "-m", "nrat_scale.prepare", "npz", *map(str, paths)]
    words += ["--dataset", published.dataset] if published.dataset else []
    return shlex.join([*words, "--out", f"data/{out}"])
