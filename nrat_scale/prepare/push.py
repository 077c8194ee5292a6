"""Upload shards to the Hugging Face Hub, as a data set or into a bucket, for `open_shards("hf://datasets/USER/REPO")`.

Only the index and the tars that it names are uploaded, the index last: a reader that sees the index can read everything
it names. The Hub skips content that it already has. The token comes from HF_TOKEN or `hf auth login` and is never printed.
"""

from pathlib import Path

from nrat_scale.core.errors import UserError
from nrat_scale.data.index import INDEX
from nrat_scale.data.shards import open_shards
from nrat_scale.remote.address import HubAddress, parse_hub
from nrat_scale.remote.hub import HubBucket, HubRepository, check_repository

_COMMIT_SHARDS = 50  # per commit


def push_address(address: str) -> HubAddress:
    """The parts of hf://datasets/USER/REPO[@REVISION] or hf://buckets/USER/BUCKET[/FOLDER]; else a UserError."""
    parts = parse_hub(address)
    if parts.kind == "bucket":
        check_repository(address, None)
        return parts
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
    found = [folder / INDEX] if (folder / INDEX).exists() else sorted(folder.glob(f"[!.]*/{INDEX}"))
    shards, indices = [], []
    for index in found or [folder / INDEX]:
        data = open_shards(index.parent, str(index.parent))
        data.verify(full=True)
        shards += [(index.parent / name).relative_to(folder).as_posix() for name in data.names]
        indices.append(index.relative_to(folder).as_posix())
    hub: HubRepository | HubBucket
    if parts.kind == "bucket":
        hub = HubBucket(parts, "The shards", address)
    else:
        hub = HubRepository(parts.repo, "dataset", parts.revision, "The shards", address)
    hub.prepare()
    for first in range(0, len(shards), _COMMIT_SHARDS):
        hub.upload(folder, shards[first : first + _COMMIT_SHARDS])
    hub.upload(folder, indices)
    size = sum((folder / name).stat().st_size for name in shards + indices) / 1e6
    return f"{address}: {len(shards)} shards and {INDEX} uploaded, {size:.1f} MB"
