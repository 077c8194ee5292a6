"""Read WebDataset shards of single images: tars of `KEY.png` and `KEY.cls`.

webdataset itself is lenient: it loses the rest of a damaged tar silently, skips links and hidden files, and splits a sample
whose members are not adjacent. This reader checks every header before it decodes an image, and refuses such tars.
"""

import json
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.data.index import TAR_BLOCK
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import CHUNK, MAX_CLASSES, file_facts, npy_array, reading
from nrat_scale.prepare.readers.images import check_side, decode, gather
from nrat_scale.remote.address import expand, is_remote

_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "npy": ""}
_LABELS = ("cls", "json")
_EXPECTED = f"one image (.{', .'.join(_FORMATS)}) and a label (.{', .'.join(_LABELS)})"
_MAX_IMAGE_BYTES, _MAX_LABEL_BYTES = 1 << 25, 1 << 20  # 32 MiB is ten times the largest allowed image
_MAX_PAX_BYTES = 1 << 16
_NOT_ADJACENT = (
    "the members of its sample are not adjacent; sort the tar by name, e.g. with `tar --sort=name -cf NEW.tar FOLDER`"
)
_ZEROS = bytes(TAR_BLOCK)
# webdataset splits a name at the first dot of its last part, and skips names without one, and `__meta__`.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # headers before the member that they describe
# Keys of an extended header that only set dates and owners. `path` is applied; any other (`size`, `linkpath`, sparse files)
# would change the meaning of the member.
_HARMLESS = re.compile(r"mtime|atime|ctime|uid|gid|uname|gname|comment|LIBARCHIVE\..*|SCHILY\..*")


def read_tars(names: Sequence[str], classes: Classes, scratch: Path) -> LabelledArrays:
    """The samples of WebDataset tars, in the given order; all images must have the same shape.

    Folder entries are skipped, as webdataset does. Images: 8 bits, grey or RGB (grey becomes RGB if the data set, or the first image, has 3 channels), at most 1024 x
    1024; `npy` uint8 [H, W] or [H, W, C]. Labels: `cls`, a decimal integer; `json`, an integer or an object with
    `label` or `cls`. A sample may have both kinds of label if they agree. `names` may have braces for ranges:
    'data/{0000..0010}.tar'.
    """
    paths = _expanded(names)
    if folder := next((path for path in paths if path.is_dir()), None):
        command = f"python -m nrat_scale.prepare folder {shlex.quote(str(folder))} --out DIR"
        raise UserError(f"{folder} is a folder. Name its tars ({folder}/*.tar); for a folder of images: {command}")
    total = sum(count_samples(path) for path in paths)  # checks every header before the first image is decoded
    allowed = range(classes.start, classes.start + (len(classes.known_names) or MAX_CLASSES))
    labels: list[int] = []

    def decoded() -> Iterator[tuple[np.ndarray, str]]:
        channels = len(DATASETS[classes.dataset].mean) if classes.dataset else None
        for path in paths:
            for key, members in _samples(path, load=True):
                where = f"{quoted(key, 120)} in the tar {path}"
                labels.append(_label(members, allowed, where))
                image = _image(members, channels, where)
                channels = channels or image.shape[2]
                yield image, f"The image of {where}"

    images = gather(decoded(), scratch, total)
    facts = [file_facts(path, "tar") for path in paths]
    return LabelledArrays.of(images, np.array(labels, np.int64), classes, facts)


def _expanded(names: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        if is_remote(name):
            raise UserError(f"{name} is an address. Download the tars first.")
        folder, found = expand(name)
        paths += [Path(folder, each) for each in found] if found is not None else [Path(name)]
    path, count = Counter(path.resolve() for path in paths).most_common(1)[0]
    if count > 1:
        raise UserError(f"The tar {path} is given twice.")
    return paths


class _Refused(Exception):
    """Why a tar is refused; `member` is the name of the member at fault."""

    def __init__(self, why: str, member: str | None = None) -> None:
        super().__init__(why)
        self.member = member


def count_samples(path: Path) -> int:
    """The number of samples in a tar, after a check of all its headers. A tar with other members raises a UserError."""
    return sum(1 for _ in _samples(path, load=False))


def _samples(path: Path, *, load: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, extension in lower case -> content) of each sample; contents are empty unless `load`."""
    with reading(path, "tar"), open(path, "rb") as file:
        try:
            yield from _grouped(file, path.stat().st_size, load)
        except (_Refused, tarfile.HeaderError) as error:
            member = getattr(error, "member", None)
            block = max(0, file.tell() - 1) // TAR_BLOCK
            at = f"byte {block * TAR_BLOCK}" if member is None else quoted(member, 120)
            raise UserError(f"The tar {path} cannot be used: at {at}: {error}.") from error


def _grouped(file: BinaryIO, size: int, load: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group the members into complete samples."""
    keys: set[str] = set()
    members = ((*_split(name), name, start, num_bytes) for name, start, num_bytes in _members(file, size))
    for key, group in groupby(members, lambda member: member[0]):
        sample: dict[str, bytes] = {}
        for _, extension, name, start, num_bytes in group:
            if key in keys:
                raise _Refused(_NOT_ADJACENT, name)
            if extension in sample:
                raise _Refused("the tar has this member twice (upper and lower case are the same)", name)
            if num_bytes > (_MAX_LABEL_BYTES if extension in _LABELS else _MAX_IMAGE_BYTES):
                raise _Refused(f"it has {num_bytes} bytes, too many for {_EXPECTED}", name)
            file.seek(start)
            sample[extension] = file.read(num_bytes) if load else b""
        if len(_FORMATS.keys() & sample) != 1 or len(sample) == 1:
            if any(later == key for later, *_ in members):
                raise _Refused(_NOT_ADJACENT, key)
            found = ", ".join(f".{extension}" for extension in sample)
            if "/" in key.strip("./") and not sample.keys() & set(_LABELS):
                unpack = "if its folders are the classes, unpack it and run: python -m nrat_scale.prepare folder FOLDER"
                raise _Refused(f"the sample has {found} and no label; {unpack}", key)
            raise _Refused(f"the sample has {found}, expected {_EXPECTED}", key)
        keys.add(key)
        yield key, sample
    if not keys:
        raise _Refused("it is empty")


def _split(name: str) -> tuple[str, str]:
    """(key, extension in lower case) as webdataset splits a name."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise _Refused("its path is absolute or leads out of the folder", name)
    match = _NAME.fullmatch(name)
    if match is None or _SKIPPED.match(name):
        raise _Refused(f"webdataset skips such names; expected {_EXPECTED}", name)
    extension = match[2].lower()
    if extension not in _FORMATS and extension not in _LABELS:
        if extension.rpartition(".")[2] in (*_FORMATS, *_LABELS):
            cut = f"webdataset cuts a name at its first dot, so this one is {quoted(match[1])} with {quoted(extension)}"
            raise _Refused(f"{cut} as extension; use names with one dot", name)
        raise _Refused(f"its extension is not supported; expected {_EXPECTED}", name)
    return match[1], extension


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of every member; two blocks of zeros must follow, and nothing else up to the end."""
    _check_beginning(file.read(TAR_BLOCK))
    file.seek(0)
    long_name: str | None = None
    while (block := file.read(TAR_BLOCK)) != _ZEROS:
        if len(block) < TAR_BLOCK:
            raise _Refused("the tar is cut short: its end is missing")
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # verifies the header's checksum
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, *_EXTENDED):
            raise _Refused(f"it is not a plain file (tar type {info.type!r})", info.name)
        start, padded = file.tell(), -(-info.size // TAR_BLOCK) * TAR_BLOCK
        if info.size < 0 or padded > size - start:
            raise _Refused(f"the tar is cut short: {info.size} bytes should follow", info.name)
        if info.type in _EXTENDED:
            if long_name is not None:
                raise _Refused("two extended headers follow each other")
            long_name = _extended_name(info, file.read(min(info.size, _MAX_PAX_BYTES + 1)))
        else:
            if info.type != tarfile.DIRTYPE:  # `tar -cf x.tar FOLDER` adds the folders, which webdataset skips
                yield long_name or info.name, start, info.size
            long_name = None
        file.seek(start + padded)
    if long_name is not None:
        raise _Refused("an extended header has no member after it")
    if file.read(TAR_BLOCK) != _ZEROS:
        raise _Refused("the tar is cut short: its end-of-archive marker is missing")
    while chunk := file.read(CHUNK):
        if chunk.count(0) != len(chunk):
            raise _Refused("there are data after the end of the archive, which webdataset would not read")


def _check_beginning(block: bytes) -> None:
    """Recognise files that are commonly mistaken for a tar."""
    if not block:
        raise _Refused("it is empty")
    if block.startswith(b"version https://git-lfs"):
        raise _Refused("it is a pointer of git LFS, not the file itself; run `git lfs pull` in its repository")
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if kind := [kind for magic, kind in _COMPRESSED.items() if block.startswith(magic)]:
            raise _Refused(f"it is compressed ({kind[0]}); decompress it first") from None
        if block.lstrip()[:1] in (b"<", b"{"):
            raise _Refused("it is a web page or an error message of a server, not a tar; download it again") from None


def _extended_name(info: tarfile.TarInfo, content: bytes) -> str:
    """The name that an extended header gives to the next member, or ""."""
    if len(content) > _MAX_PAX_BYTES or not content:
        raise _Refused(f"an extended header has {info.size} bytes")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    name = ""
    while content:
        match = re.match(rb"(\d{1,6}) ([^=\n]+)=", content)
        length = int(match[1]) if match else 0
        if match is None or length <= match.end() or content[length - 1 : length] != b"\n":
            raise _Refused("an extended header is damaged")
        key, value = match[2].decode("utf-8", "replace"), content[match.end() : length - 1]
        if key == "path":
            name = value.decode("utf-8", "surrogateescape")
        elif not _HARMLESS.fullmatch(key):
            raise _Refused(f"an extended header sets {quoted(key)}, which is not allowed")
        content = content[length:]
    return name


def _image(members: dict[str, bytes], channels: int | None, where: str) -> np.ndarray:
    """uint8 [H, W, C]."""
    (extension,) = [name for name in members if name in _FORMATS]
    what = f"The .{extension} of {where}"
    if extension != "npy":
        return decode(members[extension], _FORMATS[extension], channels, what)
    array = npy_array(np.frombuffer(members[extension], np.uint8), what)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise UserError(f"{what} is {array.dtype} {list(array.shape)}, expected uint8 [H, W] or [H, W, 1 or 3].")
    check_side((array.shape[1], array.shape[0]), what)
    image = array.reshape(*array.shape[:2], -1)
    return image.repeat(3, axis=2) if channels == 3 and image.shape[2] == 1 else image


def _label(members: dict[str, bytes], allowed: range, where: str) -> int:
    labels: set[int] = set()
    if "cls" in members:
        text = members["cls"].strip()
        if not re.fullmatch(rb"-?\d{1,30}", text):
            raise UserError(f"The .cls of {where} is {text[:40]!r}, expected a class number such as 7.")
        labels.add(int(text))
    if "json" in members:
        labels |= _from_json(members["json"], f"The .json of {where}")
    if len(labels) != 1:
        wrong = f"contradict each other: {sorted(labels)}" if labels else "have no class number"
        raise UserError(f"The labels of {where} {wrong}. Expected one, in .cls or as `label` or `cls` in .json.")
    (label,) = labels
    if label not in allowed:
        expected = f"a class number in {allowed[0]}..{allowed[-1]}"
        way_out = ". If the class numbers start at 1, add --labels-start 1" if label == allowed[-1] + 1 else ""
        raise UserError(f"The label of {where} is {str(label)[:30]}, expected {expected}{way_out}.")
    return label


def _from_json(content: bytes, where: str) -> set[int]:
    """The integer itself, or `label` and `cls` of an object if it has them."""
    try:
        value: Any = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({first_line(error)}).") from error
    labels = [value[key] for key in ("label", "cls") if key in value] if isinstance(value, dict) else [value]
    if any(type(label) is not int for label in labels):  # True is an int, too
        raise UserError(f"{where} has no class number: expected an integer, or an object with `label` or `cls`.")
    return set(labels)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
