"""Upload shards to the Hugging Face Hub as a data set that `open_shards("hf://datasets/USER/REPO")` reads.

Only the index and the tars that it names are uploaded, the index last: a reader that sees the index can read everything
it names. The Hub skips content that it already has. The token comes from HF_TOKEN or `hf auth login` and is never printed.
"""

from pathlib import Path

from nrat_scale.core.errors import UserError
from nrat_scale.data.index import INDEX
from nrat_scale.data.shards import open_shards
from nrat_scale.remote.address import HubAddress, parse_hub
from nrat_scale.remote.hub import HubRepository, check_repository

_COMMIT_SHARDS = 50  # per commit


def push_address(address: str) -> HubAddress:
    """The parts of hf://datasets/USER/REPO[@REVISION].

    Raises:
        UserError: the address has another form.
    """
    parts = parse_hub(address)
    if parts.path:
        raise UserError(f"{address} is not an address to push to: expected hf://datasets/USER/REPO[@REVISION].")
    check_repository(parts.repo, parts.revision)
    return parts


def push(folder: Path, address: str) -> str:
    """Verify the shards in `folder` (or in its subfolders, if it has no index) and upload them; returns a summary line.

    Raises:
        UserError: a bad address, damaged shards, no permission, or the Hub cannot be reached.
    """
    parts = push_address(address)
    files = _verified_files(folder)
    shards = [name for name in files if name.endswith(".tar")]
    indices = [name for name in files if not name.endswith(".tar")]
    hub = HubRepository(parts.repo, "dataset", parts.revision, "The shards", address)
    hub.prepare()
    for first in range(0, len(shards), _COMMIT_SHARDS):
        hub.upload(folder, shards[first : first + _COMMIT_SHARDS])
    hub.upload(folder, indices)
    size = sum((folder / name).stat().st_size for name in files) / 1e6
    return f"{address}: {len(shards)} shards and {INDEX} uploaded, {size:.1f} MB"


def _verified_files(folder: Path) -> list[str]:
    """The files to upload, relative to `folder`, after every byte of them was verified."""
    found = [folder] if (folder / INDEX).exists() else sorted(path.parent for path in folder.glob(f"[!.]*/{INDEX}"))
    files = []
    for place in found or [folder]:
        shards = open_shards(place, str(place))
        shards.verify(full=True)
        files += [(place / name).relative_to(folder).as_posix() for name in (*shards.names, INDEX)]
    return files
