"""Addresses of remote files: https://, hf:// and s3://, with brace lists."""

import itertools
import re

import braceexpand

from nrat_scale.core.errors import UserError

SCHEMES = ("http", "https", "hf", "s3")
_MAX_NAMES = 1_000_000
URL_SAFE = "%/:?&=#~+!$,;'@()*[]"  # already quoted, or with a meaning in an address
HF = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")


# ---- addresses ------------------------------------------------------------------------------------------------------


def is_remote(where: str) -> bool:
    """Whether `where` is an address and not a local path."""
    return "://" in where


def expand(where: str) -> tuple[str, list[str] | None]:
    """(folder, names of tars or None for all) of a folder, of one tar, or of a brace list of tars.

    Raises:
        UserError: an unknown scheme, or braces that cannot be expanded.
    """
    scheme = where.partition("://")[0] if is_remote(where) else ""
    if scheme and scheme not in SCHEMES:
        raise UserError(f"{where} cannot be read: the scheme '{scheme}' is none of {', '.join(SCHEMES)}.")
    if not where.endswith(".tar"):
        return where.rstrip("/") if scheme else where, None
    folder, _, last = where.rpartition("/")
    # braceexpand writes out each range before it gives the first name.
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
