"""A release folder, local or on the Hub: its files, their download and verification."""

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
from nrat_scale.core.files import manifest_mismatch, read_json
from nrat_scale.core.run_folder import RECIPE, RESULTS

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"


def resolve(source: str | Path) -> Path:
    """The local, verified folder of a release: `source` itself, or its download from the Hub. Raises as `load`."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{source} is not a release: it has no {name}. "
                "Make one with: python -m nrat_scale.release RUN --to FOLDER"
            )
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
        if (everything or name in (CONFIG, WEIGHTS)) and (mismatch := manifest_mismatch(folder / name, entry)):
            raise UserError(f"{folder} is damaged: {mismatch}. Fetch or release it again.")


def _download(source: str) -> Path:
    """The snapshot folder of `user/repo[@revision]`, all files from one commit."""
    repo, _, revision = source.partition("@")
    if repo.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"There is no release folder {source}, and it is not of the Hub's form user/repo either.")
    try:
        folder = Path(hf_hub_download(repo, CONFIG, revision=revision or None)).parent
        commit = folder.name  # `revision` may move between two downloads
        hf_hub_download(repo, WEIGHTS, revision=commit)
        for name in (RECIPE, RESULTS, MANIFEST):
            with suppress(EntryNotFoundError, LocalEntryNotFoundError):
                hf_hub_download(repo, name, revision=commit)
        try:
            verify(folder)
        except UserError:  # damaged in transit, which hf_hub_download does not check: bypass its cache once
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
