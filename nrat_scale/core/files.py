"""Atomic writes, JSON files, and manifests (size and sha256 of each file in a folder)."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from nrat_scale.core.errors import UserError

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make new names and renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unfinished_sibling(path: Path) -> Path:
    """The hidden folder for work on `path` that is not complete: `.NAME.unfinished` beside it."""
    return path.with_name(f".{path.name}.unfinished")


def temporary_sibling(path: Path) -> Path:
    """A unique name beside `path`, hence on the same file system: an atomic rename to `path` is possible."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def make_folder(path: Path) -> None:
    """`mkdir -p`; raises `UserError` if the folder cannot be made or is read-only."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be made ({error.strerror}). Choose another place.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"The folder {path} cannot be written to. Choose another place or change its permissions.")


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path` and fsync it. Not atomic, and the name itself needs `fsync_folder`."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` by atomic rename: readers see the old or the new file, even after a crash.

    Raises `UserError` if the folder is read-only or the disk is full.
    """
    temporary = temporary_sibling(path)
    try:
        write_durably(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}). Free space or choose another place.") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON. NaN and infinity raise ValueError: they are not JSON."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; `what` names the file in the `UserError` if it is missing, unreadable or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no {what} at {path}.") from None
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror}).") from error
    return parse_json(content, what, str(path))


def parse_json(content: bytes, what: str, where: str) -> dict[str, Any]:
    """The JSON object in `content`; `what` and `where` name the content in the `UserError` if it is damaged."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"The {what} {where} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"The {what} {where} is damaged: expected a JSON object, found {type(value).__name__}.")
    return value


def manifest_entry(content: bytes | Path) -> dict[str, Any]:
    """Size and sha256 of bytes about to be written, or of a file."""
    if isinstance(content, Path):
        return {"bytes": content.stat().st_size, "sha256": sha256_of(content)}
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_mismatch(path: Path, entry: object) -> str | None:
    """How the file at `path` differs from its manifest `entry`, as the end of a sentence; None if it matches."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if isinstance(entry, dict) and manifest_entry(path).items() <= entry.items():
            return None
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return f"{path.name} does not match its size and sha256"
