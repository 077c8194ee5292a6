"""Addresses of remote files: https://, s3:// and hf://, brace lists of shards, and the one grammar of the Hub.

https://host/path                        also http://
s3://bucket/path
hf://datasets/USER/REPO[@REVISION]/path  a data set on the Hugging Face Hub; a revision with a slash is percent-encoded
"""

import itertools
import re
import urllib.parse
from typing import NamedTuple

import braceexpand

from nrat_scale.core.errors import UserError

_MAX_NAMES = 1_000_000
_HUB = re.compile(r"hf://(datasets)/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_REPO_TYPES = {"datasets": "dataset"}  # part of an address -> `repo_type` of huggingface_hub


class HubAddress(NamedTuple):
    """A repository on the Hugging Face Hub, or a file in it.

    Attributes:
        repo: `USER/REPO`.
        repo_type: `dataset`, as huggingface_hub names it.
        revision: branch, tag or commit; None for the main branch.
        path: of the file in the repository; empty for the repository itself.
    """

    repo: str
    repo_type: str
    revision: str | None
    path: str


def parse_hub(address: str) -> HubAddress:
    """The parts of hf://datasets/USER/REPO[@REVISION][/FILE].

    Raises:
        UserError: the address has another form.
    """
    match = _HUB.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not an address on the Hub: expected hf://datasets/USER/REPO[@REVISION][/FILE].")
    kind, repo, revision, path = match.groups()
    return HubAddress(repo, _REPO_TYPES[kind], urllib.parse.unquote(revision) if revision else None, path or "")


def is_remote(where: str) -> bool:
    """Whether `where` is an address, not a local path."""
    return "://" in where


def scheme_of(address: str) -> str:
    """`https` of https://host/path."""
    return address.partition("://")[0]


def expand(where: str) -> tuple[str, list[str] | None]:
    """(folder, names of tars or None for all) of a folder, of one tar, or of a brace list of tars.

    Raises:
        UserError: braces that cannot be expanded.
    """
    if not where.endswith(".tar"):
        return where.rstrip("/") if is_remote(where) else where, None
    folder, _, last = where.rpartition("/")
    # braceexpand expands a whole range before it yields the first name.
    too_many = any(abs(int(a) - int(b)) >= _MAX_NAMES for a, b in re.findall(r"\{(-?\d{1,99})\.\.(-?\d{1,99})", last))
    try:
        names = [] if too_many else list(itertools.islice(braceexpand.braceexpand(last), _MAX_NAMES + 1))
    except ValueError as error:
        raise UserError(
            f"The braces in {where} cannot be expanded ({error}). Write shard-{{00000..00009}}.tar."
        ) from error
    if too_many or len(names) > _MAX_NAMES:
        raise UserError(f"{where} names more than {_MAX_NAMES} shards.")
    return folder or ("/" if where.startswith("/") else "."), names
