"""A release folder, local or on the Hub: its files and their verification."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nrat_scale.core.errors import UserError, first_line
from nrat_scale.core.files import read_json, sha256_of

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
_EXTRAS = ("recipe.yaml", "results.json")


# ---- releases -------------------------------------------------------------------------------------------------------


def resolve(source: str | Path) -> Path:
    """The local folder of a release: `source` itself, or its files fetched from the Hub. Raises as `load`."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(str(source))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{source} is not a release: it has no {name}. "
                "Make one with: python -m nrat_scale.release RUN --to FOLDER"
            )
    verify(folder)
    return folder


def verify(folder: Path, *, everything: bool = False) -> None:
    """Compare a release with its manifest: what `load` reads, or `everything`. Without a manifest (timm's own) nothing is known.

    Raises:
        UserError: a file is missing or has other bytes; with `everything` also where there is no manifest.
    """
    if not (folder / MANIFEST).is_file():
        if everything:
            raise UserError(f"{folder} has no {MANIFEST}: it was not made by python -m nrat_scale.release.")
        return
    files = read_json(folder / MANIFEST, "manifest of the release").get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise UserError(f"The manifest {folder / MANIFEST} is damaged: it lists no files.")
    for name, facts in files.items():
        path = folder / name
        if not everything and name not in (CONFIG, WEIGHTS):
            continue
        if not path.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing.")
        if path.stat().st_size != facts.get("bytes") or sha256_of(path) != facts.get("sha256"):
            raise UserError(f"{folder} is damaged: {name} is not what its manifest says. Fetch or release it again.")


def _fetch(source: str) -> Path:
    """The snapshot folder of `user/repo[@revision]`, all files of one commit."""
    repo, _, revision = source.partition("@")
    if repo.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"There is no release folder {source}, and it is not of the Hub's form user/repo either.")
    try:
        folder = Path(hf_hub_download(repo, CONFIG, revision=revision or None)).parent
        commit = folder.name  # what `revision` meant when the first file was asked for
        hf_hub_download(repo, WEIGHTS, revision=commit)
        for name in (*_EXTRAS, MANIFEST):
            with suppress(EntryNotFoundError, LocalEntryNotFoundError):
                hf_hub_download(repo, name, revision=commit)
        try:
            verify(folder)
        except UserError:  # damaged on the way, which the client does not notice: once more, past its cache
            for name in (CONFIG, WEIGHTS, MANIFEST):
                hf_hub_download(repo, name, revision=commit, force_download=True)
    except HFValidationError as error:
        raise UserError(
            f"There is no release folder {source}, and the Hub does not allow such a name: {first_line(error)}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"There is no folder {source} here, the Hub cannot be reached, and it is not in the cache either."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {source} here and no model {repo} on the Hub (or it is private)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"The model {repo} on the Hub has no revision '{revision}'.") from error
    except EntryNotFoundError as error:
        raise UserError(f"{repo} on the Hub is not a release: it lacks {CONFIG} or {WEIGHTS}.") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"The release {source} cannot be fetched from the Hub: {first_line(error)}") from error
    return folder
