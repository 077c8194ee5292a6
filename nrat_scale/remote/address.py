"""Addresses of remote files: https://, s3:// and hf://, brace lists of shards, and the one grammar of the Hub.

https://host/path                        also http://
s3://bucket/path
hf://datasets/USER/REPO[@REVISION]/path  a data set on the Hugging Face Hub; a revision with a slash is percent-encoded
hf://buckets/USER/BUCKET/path            a storage bucket there, which has no revisions
"""

import itertools
import re
import urllib.parse
from typing import NamedTuple

import braceexpand

from nrat_scale.core.errors import UserError

_MAX_NAMES = 1_000_000
_HUB = re.compile(r"hf://(datasets|buckets)/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_KINDS = {"datasets": "dataset", "buckets": "bucket"}
_FORMS = "hf://datasets/USER/REPO[@REVISION][/FILE] or hf://buckets/USER/BUCKET[/FILE]"


class HubAddress(NamedTuple):
    """A data set or a bucket on the Hugging Face Hub, or a file in it."""

    repo: str  # USER/REPO or USER/BUCKET
    revision: str | None  # branch, tag or commit; None for the main branch
    path: str  # of the file or folder in the repository; empty for the repository itself
    kind: str = "dataset"  # or `bucket`


def parse_hub(address: str) -> HubAddress:
    """The parts of hf://datasets/USER/REPO[@REVISION][/FILE] or hf://buckets/USER/BUCKET[/FILE]; else a `UserError`."""
    match = _HUB.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not an address on the Hub: expected {_FORMS}.")
    kind, repo, revision, path = match.groups()
    if kind == "buckets" and revision:
        raise UserError(f"{address} has a revision, and buckets have none. Expected hf://buckets/USER/BUCKET[/FILE].")
    return HubAddress(repo, urllib.parse.unquote(revision) if revision else None, path or "", _KINDS[kind])


def is_bucket(where: str) -> bool:
    """Whether `where` is an address in a bucket of the Hub."""
    return where.startswith("hf://buckets/")


def is_remote(where: str) -> bool:
    """Whether `where` is an address, not a local path."""
    return "://" in where


def expand(where: str) -> tuple[str, list[str] | None]:
    """(folder, names of its tars or None for all) of a folder, one tar, or a brace list; `UserError` for bad braces."""
    if not where.endswith(".tar"):
        return where.rstrip("/") if is_remote(where) else where, None
    folder, _, last = where.rpartition("/")
    # braceexpand expands a whole range before it yields the first name.
    too_many = any(abs(int(a) - int(b)) >= _MAX_NAMES for a, b in re.findall(r"\{(-?\d{1,99})\.\.(-?\d{1,99})", last))
    try:
        names = [] if too_many else list(itertools.islice(braceexpand.braceexpand(last), _MAX_NAMES + 1))
    except ValueError as error:
        message = f"The braces in {where} cannot be expanded ({error}). Write shard-{{00000..00009}}.tar."
        raise UserError(message) from error
    if too_many or len(names) > _MAX_NAMES:
        raise UserError(f"{where} names more than {_MAX_NAMES} shards.")
    return folder or ("/" if where.startswith("/") else "."), names
