"""Publish shards as a data set on the Hugging Face Hub, from where `open_shards("hf://datasets/USER/REPO")` reads them.

Only the tars that an index names and the index itself are uploaded, the index last: who sees it can read everything it
names. Uploading again is cheap, because the Hub knows what it has. The token is the one of the environment (HF_TOKEN) or of
`hf auth login`, and is never shown.
"""

import re
from pathlib import Path

from nrat_scale.core.errors import UserError
from nrat_scale.data.index import INDEX
from nrat_scale.data.shards import open_shards
from nrat_scale.remote.hub import HubRepository, names_of

_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/?", re.ASCII)
_COMMIT_SHARDS = 50  # in one commit


def parse_address(address: str) -> tuple[str, str | None]:
    """(USER/REPO, revision or None) of hf://datasets/USER/REPO[@REV].

    Raises:
        UserError: it has another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is no address to push to. Expected hf://datasets/USER/REPO or .../REPO@REVISION.")
    return match[1], match[2]


def push(folder: Path, address: str) -> str:
    """Verify the shards in `folder` (or, where it holds no index, in its subfolders) and upload them to `address`.

    Raises:
        UserError: a bad address, damaged shards, no permission, or the Hub cannot be reached.
    """
    repo, revision = parse_address(address)
    files = _files(folder)
    shards = [name for name in files if name.endswith(".tar")]
    indices = [name for name in files if not name.endswith(".tar")]
    hub = HubRepository(repo, "dataset", revision, "The shards", address)
    hub.prepare()
    for first in range(0, len(shards), _COMMIT_SHARDS):
        hub.upload(names_of(folder, shards[first : first + _COMMIT_SHARDS]))
    hub.upload(names_of(folder, indices))
    size = sum((folder / name).stat().st_size for name in files) / 1e6
    return f"{address}: {len(shards)} shards and {INDEX} uploaded, {size:.1f} MB"


def _files(folder: Path) -> list[str]:
    """What is to be uploaded, relative to `folder`, after every byte of it was verified."""
    found = [folder] if (folder / INDEX).exists() else sorted(path.parent for path in folder.glob(f"[!.]*/{INDEX}"))
    files = []
    for place in found or [folder]:
        shards = open_shards(place, str(place))
        shards.verify(full=True)
        files += [(place / name).relative_to(folder).as_posix() for name in (*shards.names, INDEX)]
    return files
