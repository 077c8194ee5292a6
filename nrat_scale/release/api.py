"""`release` for Python and for the command line."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError, warn
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.models import is_own, origin
from nrat_scale.release import bundle
from nrat_scale.release.contents import Publication
from nrat_scale.release.publish import name_at, push_queued
from nrat_scale.release.publish import push as push_folder
from nrat_scale.remote.hub import check_repository


@dataclass(frozen=True)
class Release:
    """What `release` returns."""

    folder: Path | None  # the release on disk; None if it was only pushed
    address: str | None  # on the Hub, `user/repo` or `user/repo@revision`; None if it was not pushed
    sent: tuple[str, ...] = ()  # files sent to the Hub, which lacked them
    queued: tuple[str, ...] = ()  # with `queued`, a sentence about each revision
    own_code: tuple[str, str] | None = None  # module and name of the user's model, which the release does not contain


def release(
    run: str | Path,
    to: str | Path | None = None,
    *,
    checkpoint: str = "best",
    unevaluated: bool = False,
    onnx: bool = False,
    torch_export: bool = False,
    push: str | None = None,
    private: bool = False,
    revision: str | None = None,
    queued: bool = False,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    benchmark: str | None = None,
    trust_code: bool = False,
) -> Release:
    """Export a checkpoint of a run as a folder that `nrat_scale.load` and timm load, push it to the Hub, or both.

    Args:
        run: run directory.
        to: new folder to write.
        checkpoint: `best` or `last`.
        unevaluated: release without results.
        onnx, torch_export: also write these formats, compared with the model.
        push: `user/repo` on the Hub.
        private: make a new repository private.
        revision: branch of the repository.
        queued: push each checkpoint queued by `release.every_epochs` to its own revision.
        license, license_name, license_link: of the weights: the Hub's identifier, and name and address of `other`.
        benchmark: the Hub data set whose leaderboard the results are for.
        trust_code: import the model's code of a run outside the working directory.

    Raises:
        UserError: no destination, no such checkpoint, no results, `to` is not empty, or the Hub refuses.
    """
    _check_destination(to, push, private, revision, queued)
    address = f"{push}@{revision}" if push and revision else push
    publication = Publication(address, license, license_name, license_link, benchmark)
    if push is not None:
        check_repository(push, revision)
        if license is None:
            warn(
                "The card states no licence, so its readers do not know whether they may use it. State one with --license, "
                "such as cc-by-4.0."
            )
        if queued:
            options: dict[str, Any] = {"private": private, "trust_code": trust_code}
            return Release(None, push, queued=tuple(push_queued(Path(run), push, publication, **options)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name_at(str(push)) if to is None else Path(to)
        exports = [bundle.ONNX] * onnx + [bundle.EXPORTED] * torch_export
        options = {"unevaluated": unevaluated, "exports": exports, "publication": publication, "trust_code": trust_code}
        bundle.release(Path(run), folder, checkpoint, **options)
        sent = [] if push is None else push_folder(folder, push, private=private, revision=revision)
    name = str(RunFolder(Path(run)).read_model()["architecture"])
    own = origin(name) if is_own(name) else None
    return Release(None if to is None else folder, address, tuple(sent), own_code=own)


def _check_destination(
    to: str | Path | None, push: str | None, private: bool, revision: str | None, queued: bool
) -> None:
    if to is None and push is None:
        raise UserError("Name a destination: --to FOLDER, --push user/repo, or both.")
    if push is None and (private or revision or queued):
        raise UserError("--private, --revision and --queued need --push user/repo.")
    if queued and (to is not None or revision is not None):
        raise UserError("--queued sends each checkpoint to its own revision; omit --to and --revision.")
