"""A release folder, local or on the Hub: its files, their download and verification."""

import hashlib
import os
import time
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import MANIFEST, make_folder, manifest_mismatch, parse_json, read_json, write_atomically
from nrat_scale.core.run_folder import DATA, RECIPE, RESULTS, runs_in
from nrat_scale.loading.file_kind import recognise
from nrat_scale.remote.address import is_bucket
from nrat_scale.remote.cache import Cache
from nrat_scale.remote.transfer import download, fetch_bytes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
# Default folders of our commands: no names of the Hub's users.
_OUR_FOLDERS = ("runs", "releases", "evaluations", "checkpoints", "data")
_ANSWER_SECONDS = 10.0
_MAX_MANIFEST_BYTES = 1 << 20
_REASONS = {  # the first match counts: LocalEntryNotFoundError is also an EntryNotFoundError
    LocalEntryNotFoundError: "the Hub cannot be reached, and its cache has no copy",
    RepositoryNotFoundError: "the Hub has no such model, or it is private",
    RevisionNotFoundError: "the model has no such revision",
    EntryNotFoundError: f"the model lacks {CONFIG} or {WEIGHTS}",
}


def resolve(source: str | Path) -> Path:
    """The local, verified folder of a release: `source` itself, or its download from the Hub. Raises as `load`."""
    folder = Path(source)
    if not folder.is_dir():
        folder = (_from_bucket if is_bucket(str(source)) else _download)(str(source))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            if runs := runs_in(folder):
                raise UserError(f"{source} is not a release, but holds runs. Name one: {', '.join(map(str, runs))}.")
            way_out = "Make one with: python -m nrat_scale.release RUN --to FOLDER"
            raise UserError(f"{source} is not a release: it has no {name}. {way_out}")
    if what := recognise(folder / WEIGHTS):  # before the manifest, which would only say that the bytes differ
        raise UserError(f"The release {source} cannot be loaded: {WEIGHTS} {what}.")
    verify(folder)
    return folder


def verify(folder: Path, *, everything: bool = False) -> None:
    """Compare the files that `load` reads, or `everything`, with the manifest. timm's own repositories have no manifest.

    Raises:
        UserError: a file is missing or has other bytes; or there is no manifest and `everything` is set.
    """
    if not (folder / MANIFEST).is_file():
        if everything:
            raise UserError(f"{folder} has no {MANIFEST}: it was not made by python -m nrat_scale.release.")
        return
    files = read_json(folder / MANIFEST, "manifest of the release").get("files")
    if not isinstance(files, dict):
        raise UserError(f"The manifest {folder / MANIFEST} is damaged: it lists no files.")
    for name, entry in files.items():
        # An earlier version did not download the record of the training data.
        read = name in (CONFIG, WEIGHTS) or (name == DATA and (folder / DATA).exists())
        if (everything or read) and (mismatch := manifest_mismatch(folder / name, entry)):
            raise UserError(f"{folder} differs from its {MANIFEST}: {mismatch}. Fetch or release it again.")


def _check_hub_name(source: str) -> None:
    """Refuse a name that can only be a local path, or most likely is a mistyped one, without asking the Hub."""
    repo, _, revision = source.partition("@")
    path = Path(source)
    if path.suffix in WEIGHT_FILES:
        raise UserError(f"There is no file {source}.")
    if repo.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} is not a release folder and does not have the Hub's form user/repo.")
    owner = path.parent
    near: list[str] = []
    if not revision and (owner.is_dir() or owner.name in _OUR_FOLDERS):
        with suppress(OSError):
            near = get_close_matches(path.name, os.listdir(owner), n=1)
        hint = f" Did you mean {owner / near[0]}?" if near else ""
        raise UserError(f"There is no folder {source}.{hint} If it is on the Hub, name a revision: {source}@main.")


def _is_reachable(repo: str, revision: str | None) -> bool:
    """Whether the Hub answers. huggingface_hub itself would retry for half a minute if a name is not in its cache."""
    for pause in (1.0, 0.0):
        try:
            get_hf_file_metadata(hf_hub_url(repo, CONFIG, revision=revision), timeout=_ANSWER_SECONDS)
        except (HfHubHTTPError, HFValidationError):
            return True  # an answer; `hf_hub_download` gets the same and names the reason
        except OfflineModeIsEnabled:
            return False
        except Exception:  # the HTTP libraries of huggingface_hub's versions share no base class
            time.sleep(pause)
        else:
            return True
    return False


def _download(source: str) -> Path:
    """The snapshot folder of `user/repo[@revision]`, all files from one commit; the cached one if the Hub does not answer."""
    _check_hub_name(source)
    repo, _, revision = source.partition("@")
    try:
        fetch = partial(hf_hub_download, repo, local_files_only=not _is_reachable(repo, revision or None))
        folder = Path(fetch(CONFIG, revision=revision or None)).parent
        commit = folder.name  # `revision` may move between two downloads
        fetch(WEIGHTS, revision=commit)
        for name in (RECIPE, RESULTS, DATA, MANIFEST):
            with suppress(EntryNotFoundError, LocalEntryNotFoundError):
                fetch(name, revision=commit)
        try:
            verify(folder)
        except UserError:  # damaged in transit, which hf_hub_download does not check: bypass its cache once
            for name in (CONFIG, WEIGHTS, MANIFEST):
                hf_hub_download(repo, name, revision=commit, force_download=True)
            with suppress(EntryNotFoundError):
                hf_hub_download(repo, DATA, revision=commit, force_download=True)
    except (EntryNotFoundError, HFValidationError, OSError) as error:
        known = (text for kind, text in _REASONS.items() if isinstance(error, kind))
        reason = next(known, first_line(error).rstrip("."))
        raise UserError(f"{source} is neither a folder nor a release on the Hub: {reason}.") from error
    return folder


def _from_bucket(address: str) -> Path:
    """The verified local copy of the release in a folder of a bucket, in the cache of shards, named by its manifest.

    A bucket has no commits: the manifest, which is sent last, says which bytes belong together.
    """
    address = address.rstrip("/")
    manifest = fetch_bytes(f"{address}/{MANIFEST}", _MAX_MANIFEST_BYTES)
    entries = parse_json(manifest, "manifest of the release", f"{address}/{MANIFEST}").get("files")
    if not isinstance(entries, dict) or not {CONFIG, WEIGHTS} <= set(entries):
        raise UserError(f"The manifest {address}/{MANIFEST} is damaged: it does not list {CONFIG} and {WEIGHTS}.")
    folder = Cache().folder / "releases" / hashlib.sha256(manifest).hexdigest()[:32]
    make_folder(folder)
    for name in (CONFIG, WEIGHTS, RECIPE, RESULTS, DATA):
        entry = entries.get(name)
        if entry is None or not manifest_mismatch(folder / name, entry):
            continue
        if not isinstance(entry, dict) or not isinstance(size := entry.get("bytes"), int):
            raise UserError(f"The manifest {address}/{MANIFEST} is damaged: it states no size of {name}.")
        (folder / name).unlink(missing_ok=True)
        download(f"{address}/{name}", folder / name, size, str(entry.get("sha256")))
    write_atomically(folder / MANIFEST, manifest)
    return folder
