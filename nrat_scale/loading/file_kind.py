"""Recognise a file that is no weight file: a web page, a Git LFS pointer, an unfinished download, another format.

Only the first bytes, a header or a directory of names are read, and nothing is unpickled.
"""

import io
import json
import pickletools
import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from nrat_scale.core.errors import quoted

_HEAD_BYTES = 4096
_HEADER_BYTES = 100_000_000  # the most that safetensors accepts
_JSON_BYTES = 1 << 20
_AGAIN = "Download it again"
TRUNCATED = f"is truncated: it ends within its data. {_AGAIN}."
_SIGNATURES = (
    (b"\x1f\x8b", "is compressed with gzip. Unpack it with gunzip"),
    (b"BZh", "is compressed with bzip2. Unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "is compressed with xz. Unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd. Unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive. Unpack it"),
    (b"Rar!", "is a RAR archive. Unpack it"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes them, and not one of torch or safetensors"),
    (b"\x93NUMPY", "is a NumPy array and not a weight file of torch or safetensors"),
    (b"GGUF", "is a GGUF file and not one of torch or safetensors"),
    (b"\x89PNG", "is an image (PNG)"),
    (b"\xff\xd8\xff", "is an image (JPEG)"),
    (b"%PDF", "is a PDF document"),
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's format before 1.6; three precede the content


def recognise(path: Path) -> str | None:
    """What the file is, and the way out, as the end of a sentence that begins with its name; None if it may hold weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return f"is empty (0 bytes): an interrupted download or copy. {_AGAIN}"
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zero bytes: an unfinished download or copy. {_AGAIN}"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head.startswith(b"PK\x03\x04"):
        return _zip_file(path, size)
    if head[257:262] == b"ustar":
        return "is a tar archive. Unpack it and give the weight file inside"
    if is_safetensors(head):
        return _truncated_safetensors(path, size)
    text = _as_text(head)
    return None if text is None else _text_file(path, text, size)


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` is a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_BYTES


def _truncated_safetensors(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        expected = 8 + length
        if expected <= size:
            with suppress(ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
                entries = json.loads(file.read(length))
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
                expected += max([end for end in ends if isinstance(end, int)], default=0)
    if expected <= size:
        return None
    return f"is truncated: it has {size} of {expected} bytes. {_AGAIN}"


def _zip_file(path: Path, size: int) -> str | None:
    """torch.save's format is a zip file, whose directory is at the end."""
    if not zipfile.is_zipfile(path):
        return f"is a truncated zip file: the end is missing after {size} bytes. {_AGAIN}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many kinds on damaged directories; torch names the damage
        return None
    inside = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return "is a TorchScript archive (torch.jit.save), which holds code. Save model.state_dict() alone"
    if "data.pkl" in inside:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays (npz) and not a weight file of torch or safetensors"
    holds = ", ".join(map(quoted, names[:3])) or "nothing"
    return f"is a zip archive of other files ({holds}). Unpack it and give the weight file inside"


def _as_text(head: bytes) -> str | None:
    """The first bytes as text, or None if they are binary."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or not error.start:  # a character may be cut at the end
            return None
        text = head[: error.start].decode(encoding)
    return None if re.search(r"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]", text) else text.lstrip("\ufeff")


def _text_file(path: Path, text: str, size: int) -> str:
    start, begins = text.lstrip(), quoted(" ".join(text.split()[:12]), 60)
    lower = start[:1000].lower()
    if start.startswith("version https://git-lfs.github.com/spec/"):
        found = re.search(r"^size (\d+)$", text, re.MULTILINE)
        wanted = f" of {found[1]} bytes" if found else ""
        return f"is a Git LFS pointer to a file{wanted}, not the file. Run git lfs pull in its repository"
    if "/annex/objects/" in lower:
        return "is a git-annex pointer to a file, not the file. Run git annex get on it"
    if lower.startswith(("<!doctype html", "<html", "<head", "<body", "<script")) or "<html" in lower:
        return "is a web page (HTML): its address shows the file instead of sending it. Use the address of the download"
    if lower.startswith("<"):
        return f"is XML, such as the error message of a store, and begins with {begins}. {_AGAIN}"
    if start.startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            content = json.loads(path.read_bytes()) if size <= _JSON_BYTES else None
            if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
                return "is the index (JSON) of weights in several files. Merge them into one"
            if content is not None:
                return f"is JSON, such as the error message of a server, and begins with {begins}. {_AGAIN}"
    return f"is a text file that begins with {begins}, not a weight file"


def is_cut_pickle(path: Path) -> bool:
    """Whether the file ends within one of its first pickles, as a truncated file of torch's format before 1.6 does."""
    try:
        with path.open("rb") as file:
            before = _pickles_before_content(file.read(16))
            file.seek(0)
            for _ in range(before + 2 if before else 1):  # the content, and the keys of the storages that follow
                for _ in pickletools.genops(file):
                    pass
    except ValueError as error:
        return re.search(r"exhausted|not enough data|no newline found|but only", str(error)) is not None
    except (MemoryError, OverflowError):  # a damaged length
        return False
    return False


def pickled_object(path: Path) -> str | None:
    """The full name of the class whose object a pickle holds at its top, such as a whole model's; None for containers."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (member,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                with archive.open(member) as file:
                    return _first_class(io.BytesIO(file.read(_HEAD_BYTES)))
        with path.open("rb") as file:
            head = io.BytesIO(file.read(_HEAD_BYTES))
        for _ in range(_pickles_before_content(head.getvalue())):
            for _ in pickletools.genops(head):
                pass
        return _first_class(head)
    except Exception:  # damaged files make zipfile and pickletools raise many kinds of errors
        return None


def _pickles_before_content(head: bytes) -> int:
    return 3 if _LEGACY_MAGIC.to_bytes(10, "little") in head[:16] else 0


def _first_class(stream: BinaryIO) -> str | None:
    """The class or function that the pickle names first, if it names one before it opens a container."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            return None if name == "collections.OrderedDict" else name
        if opcode.name == "STACK_GLOBAL":
            name = ".".join(strings[-2:])
            return None if name == "collections.OrderedDict" else name
        if "UNICODE" in opcode.name:
            strings.append(str(argument))
        elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE", "MARK", "BINPUT"):  # ("module", class, source) before 1.6
            return None
    return None
