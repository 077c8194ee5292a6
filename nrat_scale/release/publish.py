"""Push releases to the Hub: one, or those that training queued."""

import tempfile
from pathlib import Path

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import read_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.loading.release_folder import WEIGHTS, verify
from nrat_scale.release.bundle import FILES, Options, Weights, build_release, require_run
from nrat_scale.remote.hub import HubRepository, check_repository, names_of

# ---- the Hub --------------------------------------------------------------------------------------------------------


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> list[str]:
    """Send the release in `folder` to the model repository `repo`, which is made where it does not exist.

    Only files that a release can hold are sent, each as its manifest says; what the repository has already is not sent again.

    Returns:
        The names of the files that were sent.

    Raises:
        UserError: no release, a damaged one, no permission, or the Hub cannot be reached.
    """
    check_repository(repo, revision)
    verify(folder, everything=True)
    shown = f"{repo}@{revision}" if revision else repo
    files = names_of(folder, [name for name in FILES if (folder / name).is_file()])
    hub = HubRepository(repo, "model", revision, "The release", shown)
    hub.prepare(private=private)
    missing = hub.missing(files)
    if missing:
        hub.upload({name: files[name] for name in missing}, f"Release {folder.name}")
    return missing


def push_queued(run: Path, repo: str, *, private: bool = False) -> list[str]:
    """Send every checkpoint that `release.every_epochs` put aside to a revision of its own, `epoch-NNNN`; sentences on each.

    Raises:
        UserError: as `push`; what was sent before stays.
    """
    require_run(run)
    check_repository(repo, None)
    queue = RunFolder(run).releases
    folders = sorted(path for path in queue.glob("epoch-*") if path.is_dir())
    if not folders:
        raise UserError(f"{queue} holds nothing to send. Put checkpoints aside with release.every_epochs=N.")
    told = []
    for folder in folders:
        facts = read_json(folder / "queued.json", "description of the queued weights")
        weights = Weights(
            folder.name, folder / WEIGHTS, facts["sha256"], facts["weights"], facts["step"], facts["epoch"]
        )
        with tempfile.TemporaryDirectory() as temporary:
            made = build_release(run, weights, Path(temporary) / repo.partition("/")[2], Options(unevaluated=True))
            sent = push(made, repo, private=private, revision=folder.name)
        told.append(f"{repo}@{folder.name}: {f'{len(sent)} files sent' if sent else 'there already'}")
    return told
