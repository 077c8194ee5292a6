"""Fetch published generated data: resumed where it stopped, verified by size and sha256, never half there.

    python tools/download.py --list
    python tools/download.py cifar10_1m
    python tools/download.py cifar10_20m cifar100_1m --to /big/disk

Sizes and hashes are those that the Hub states for each file. A transfer that ends leaves FILE.part, and the same command
goes on there; a file that is there already is verified and kept. At the end it prints the command that makes shards of it.
"""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from nrat_scale.core.errors import UserError, did_you_mean, run_cli
from nrat_scale.core.files import make_folder, sha256_of
from nrat_scale.remote.transfer import download


@dataclass(frozen=True)
class Published:
    """Files that make one data set.

    Attributes:
        repo: a data set on the Hugging Face Hub.
        files: in the order of the samples.
        dataset: a key of `DATASETS`; None where we do not know.
    """

    repo: str
    files: tuple[str, ...]
    dataset: str | None = None


@dataclass(frozen=True)
class Remote:
    """A file as the Hub describes it. `sha256` is None for small files, which it keeps without one."""

    url: str
    num_bytes: int
    sha256: str | None


def _parts(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}_part{number}.npz" for number in range(1, count + 1))


# Images of EDM for Wang et al. 2023, "Better Diffusion Models Further Improve Adversarial Training"; the files are those
# that https://github.com/wzekai99/DM-Improves-AT links to. About 3.1 GB for a million images.
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
_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)/(.+)")


def _published(name: str) -> Published:
    """The files called `name`: a key of `PUBLISHED`, or the address of one file."""
    if match := _ADDRESS.fullmatch(name):
        return Published(match[1], (match[2],))
    if name not in PUBLISHED:
        raise UserError(
            f"Nothing is known as '{name}'. {did_you_mean(name, PUBLISHED)} Or give hf://datasets/USER/REPO/FILE."
        )
    return PUBLISHED[name]


def _described(published: Published) -> list[Remote]:
    """What the Hub states about the files.

    Raises:
        UserError: it does not answer, or has no such file.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().get_paths_info(
            published.repo, list(published.files), repo_type="dataset"
        )  # one request for all
    except Exception as error:  # below the Hub's client lie different HTTP libraries, whose errors share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"The Hub says nothing about the data set {published.repo} ({reason}). Check the name and the network; private "
            "data needs `hf auth login`."
        ) from error
    files = {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}
    if missing := [name for name in published.files if name not in files]:
        raise UserError(f"The data set {published.repo} on the Hub has no file {missing[0]}. It may have been renamed.")
    return [_remote(published.repo, files[name]) for name in published.files]


def _remote(repo: str, entry: Any) -> Remote:
    url, large = f"hf://datasets/{repo}/{entry.path}", entry.lfs
    return Remote(url, large.size if large else entry.size, large.sha256 if large else None)


def _place(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise UserError(f"{name} leads out of {folder}. Give the path of a file in the data set.")
    return folder.joinpath(*parts)


def _fetch(remote: Remote, path: Path) -> str:
    """Bring the file to `path`, and say how it came there."""
    if path.exists():
        if path.stat().st_size != remote.num_bytes or (remote.sha256 and sha256_of(path) != remote.sha256):
            raise UserError(
                f"{path} exists already, but is not the published file ({remote.num_bytes} bytes, sha256 "
                f"{(remote.sha256 or 'unknown')[:12]}...). Remove it, or choose another --to."
            )
        return f"{path}: there already, verified"
    part = path.with_name(f"{path.name}.part")
    there = part.stat().st_size if part.exists() else 0
    make_folder(path.parent)
    if shutil.disk_usage(path.parent).free < remote.num_bytes - there:
        raise UserError(
            f"There is no room for {path.name} ({remote.num_bytes / 1e9:.1f} GB) in {path.parent}. Free some space, or "
            "choose another place with --to."
        )
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "desc": path.name, "disable": not sys.stderr.isatty()}
    with tqdm(total=remote.num_bytes, initial=there, **options) as bar:
        download(remote.url, path, remote.num_bytes, remote.sha256, progress=lambda size: bar.update(size - bar.n))
    return f"{path}: {remote.num_bytes / 1e6:.1f} MB, verified"


def _next_command(name: str, published: Published, paths: Sequence[Path]) -> str:
    out = name if name in PUBLISHED else PurePosixPath(published.files[0]).stem
    words = ["python", "tools/shard_dataset.py", "npz", *map(str, paths)]
    words += ["--dataset", published.dataset] if published.dataset else []
    return shlex.join([*words, "--out", f"data/{out}"])


def _listing() -> str:
    width = max(map(len, PUBLISHED))
    return "\n".join(f"{name:{width}}  {each.repo}: {', '.join(each.files)}" for name, each in PUBLISHED.items())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="one of --list, or hf://datasets/USER/REPO/FILE")
    default = Path("data/downloads")
    parser.add_argument("--to", type=Path, default=default, metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the names and the files that they stand for")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(_listing())
        return
    if not arguments.names:
        parser.error("give a NAME, or --list")
    for name, published in [(name, _published(name)) for name in arguments.names]:
        places = [_place(arguments.to, file) for file in published.files]
        for remote, path in zip(_described(published), places, strict=True):
            print(_fetch(remote, path), flush=True)
        print(f"next: {_next_command(name, published, places)}", flush=True)


if __name__ == "__main__":
    run_cli(main)
