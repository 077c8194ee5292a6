"""Push releases to the Hub: one, or those that training has queued."""

import tempfile
from pathlib import Path

from nrat_scale.loading.release_folder import verify
from nrat_scale.release.bundle import FILES, release
from nrat_scale.release.contents import queued_weights
from nrat_scale.remote.hub import HubRepository, check_repository


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> list[str]:
    """Verify the release in `folder` and send the files that the model repository `repo` lacks; create `repo` if needed.

    Files whose names are not in `FILES` are never sent.

    Returns:
        The names of the files that were sent.

    Raises:
        UserError: no release, a damaged one, no permission, or the Hub cannot be reached.
    """
    check_repository(repo, revision)
    verify(folder, everything=True)
    hub = HubRepository(repo, "model", revision, "The release", f"{repo}@{revision}" if revision else repo)
    hub.prepare(private=private)
    missing = hub.missing(folder, [name for name in FILES if (folder / name).is_file()])
    if missing:
        hub.upload(folder, missing, f"Release {folder.name}")
    return missing


def push_queued(run: Path, repo: str, *, private: bool = False, trust_code: bool = False) -> list[str]:
    """Send every queued checkpoint (`release.every_epochs`) to a revision of its own, `epoch-NNNN`; `trust_code` as `release`.

    Returns:
        A sentence about each revision.

    Raises:
        UserError: as `push`; revisions sent before the error stay.
    """
    check_repository(repo, None)
    sentences = []
    for weights in queued_weights(run):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo.partition("/")[2]
            release(run, folder, weights, unevaluated=True, trust_code=trust_code)
            sent = push(folder, repo, private=private, revision=weights.label)
        sentences.append(f"{repo}@{weights.label}: {f'{len(sent)} files sent' if sent else 'already there'}")
    return sentences
