"""Push releases to the Hub: one, or those that training has queued."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from nrat_scale.loading.release_folder import verify
from nrat_scale.release.bundle import FILES, release
from nrat_scale.release.contents import Publication, queued_weights
from nrat_scale.remote.address import is_bucket
from nrat_scale.remote.hub import check_repository, destination


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> list[str]:
    """Verify the release in `folder` and send the files that `repo` lacks; create `repo` if needed.

    `repo` is a model repository `user/repo`, or a folder of a bucket, hf://buckets/USER/BUCKET[/FOLDER].

    Files whose names are not in `FILES` are never sent.

    Returns:
        The names of the files that were sent.

    Raises:
        UserError: no release, a damaged one, no permission, or the Hub cannot be reached.
    """
    check_repository(repo, revision)
    verify(folder, everything=True)
    hub = destination(repo, "model", revision, "The release")
    hub.prepare(private=private)
    missing = hub.missing(folder, [name for name in FILES if (folder / name).is_file()])
    if missing:
        hub.upload(folder, missing, f"Release {folder.name}")
    return missing


def push_queued(
    run: Path, repo: str, publication: Publication, *, private: bool = False, trust_code: bool = False
) -> list[str]:
    """Send every queued checkpoint (`release.every_epochs`) to a revision of its own, `epoch-NNNN`; in a bucket, a folder.

    `trust_code`: as for `release`.

    Returns:
        A sentence about each revision.

    Raises:
        UserError: as `push`; revisions sent before the error stay.
    """
    check_repository(repo, None)
    sentences = []
    for weights in queued_weights(run):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name_at(repo)
            into, revision = (f"{repo.rstrip('/')}/{weights.label}", None) if is_bucket(repo) else (repo, weights.label)
            address = into if revision is None else f"{repo}@{revision}"
            options: dict[str, Any] = {"publication": replace(publication, address=address), "trust_code": trust_code}
            release(run, folder, weights, unevaluated=True, **options)
            sent = push(folder, into, private=private, revision=revision)
        sentences.append(f"{address}: {f'{len(sent)} files sent' if sent else 'already there'}")
    return sentences


def name_at(repo: str) -> str:
    """The name of a release at an address: the last part of it."""
    return repo.rstrip("/").rpartition("/")[2]
