"""Other people's WebDataset shards: tars of `KEY.png` and `KEY.cls`, read with webdataset itself.

webdataset takes what it gets: of a damaged tar it silently loses the rest, it skips links, hidden files and names of its
own, and it splits a sample whose members are not side by side. So every tar is scanned first, header by header
(`scan_tar`), and is refused unless it is whole and plain; and what webdataset then gives is compared, member by member,
with what the scan saw.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from nrat_scale.core.errors import UserError
from nrat_scale.data.index import TAR_BLOCK
from nrat_scale.datasets import DATASETS
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.arrays import COPY_AGAIN, MAX_CLASSES, facts_of, labelled_arrays, npy_array, reading
from nrat_scale.prepare.readers.images import check_side, decode, gathering, progress
from nrat_scale.remote.address import expand, is_remote

_KINDS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "npy": ""}
_LABELS = ("cls", "json")
_EXPECTED = f"one image (.{', .'.join(_KINDS)}) and a label (.{', .'.join(_LABELS)})"
_MAX_MEMBER_BYTES = {"image": 1 << 25, "label": 1 << 20}  # 32 MiB are ten times the largest image that is admitted
_MAX_PAX_BYTES = 1 << 16
_CHUNK = 1 << 20
_ZEROS = bytes(TAR_BLOCK)
# webdataset cuts a name at the first dot of its last part, and passes over names without one, and over `__meta__`.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_SPECIAL = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CONTTYPE: "a contiguous file",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
    tarfile.XGLTYPE: "a global header",
}
# Keys of an extended header that change nothing but dates and owners. `path` is applied; others (`size`, `linkpath`,
# sparse files) would give the member another meaning.
_HARMLESS = re.compile(r"mtime|atime|ctime|uid|gid|uname|gname|comment|LIBARCHIVE\..*|SCHILY\..*")


# ---- the scan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What a tar holds: the number of samples, and a hash over the names and sizes of their members in order."""

    num_samples: int
    sha256: str


class _Refused(Exception):
    """Why a tar is not admitted; `member` names the place."""

    def __init__(self, why: str, member: str | None = None) -> None:
        super().__init__(why)
        self.member = member


def scan_tar(path: Path) -> Scan:
    """Walk over all headers of a tar without reading the images.

    Raises:
        UserError: not a tar, damaged, cut short, compressed, or with anything in it but complete samples.
    """
    with reading(path, "tar"), open(path, "rb") as file:
        try:
            return _scanned(file, path.stat().st_size)
        except (_Refused, tarfile.HeaderError) as error:
            member = getattr(error, "member", None)
            at = (
                f"at {_shown(member)}"
                if member is not None
                else f"at byte {max(0, (file.tell() - 1) // TAR_BLOCK * TAR_BLOCK)}"
            )
            raise UserError(f"The tar {path} cannot be used: {at}: {error}.") from error


def _shown(name: str) -> str:
    return repr(name[:120])


def _scanned(file: BinaryIO, size: int) -> Scan:
    hashes, num_samples = hashlib.sha256(), 0
    names: set[str] = set()
    keys: set[str] = set()
    current, members = None, dict[str, int]()
    for name, num_bytes in _members(file, size):
        key, extension = _split(name)
        if name in names:
            raise _Refused("it is there twice", name)
        if key != current:
            if current is not None:
                num_samples += _complete(current, members, hashes)
            if key in keys:
                raise _Refused("the members of its sample are not side by side; sort the tar by name", name)
            current, members = key, {}
            keys.add(key)
        if extension in members:
            raise _Refused("it is there twice, but for capital letters", name)
        if num_bytes > _MAX_MEMBER_BYTES["label" if extension in _LABELS else "image"]:
            raise _Refused(f"it has {num_bytes} bytes, too many for {_EXPECTED}", name)
        names.add(name)
        members[extension] = num_bytes
    if current is None:
        raise _Refused("it is empty")
    num_samples += _complete(current, members, hashes)
    return Scan(num_samples, hashes.hexdigest())


def _complete(key: str, members: dict[str, int], hashes: Any) -> int:
    """1, after a sample with one image and a label has been added to `hashes`."""
    images = [extension for extension in members if extension in _KINDS]
    if len(images) != 1 or len(images) == len(members):
        raise _Refused(f"the sample has {', '.join(f'.{name}' for name in members)}, expected {_EXPECTED}", key)
    hashes.update(_line(key, members))
    return 1


def _line(key: str, members: dict[str, int]) -> bytes:
    return json.dumps([key, sorted(members.items())]).encode()


def _split(name: str) -> tuple[str, str]:
    """(key, extension in small letters) as webdataset splits a name."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise _Refused("its path is absolute or leads out of the folder", name)
    match = _NAME.fullmatch(name)
    if match is None or _SKIPPED.match(name):
        raise _Refused(f"webdataset would pass over this name; expected {_EXPECTED}", name)
    extension = match[2].lower()
    if extension not in _KINDS and extension not in _LABELS:
        raise _Refused(f"its kind is none of those that are read: {_EXPECTED}", name)
    return match[1], extension


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every member; at the end, the file must be at its end too."""
    _check_beginning(file.read(TAR_BLOCK))
    file.seek(0)
    longer: str | None = None
    while (block := file.read(TAR_BLOCK)) != _ZEROS:
        if len(block) < TAR_BLOCK:
            raise _Refused("the tar is cut short: its end is missing")
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # checks the header's checksum
        if info.type in _SPECIAL:
            raise _Refused(f"it is {_SPECIAL[info.type]}, and only plain files are read", info.name)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            raise _Refused(f"its type {info.type!r} is unknown", info.name)
        start, padded = file.tell(), -(-info.size // TAR_BLOCK) * TAR_BLOCK
        if info.size < 0 or padded > size - start:
            raise _Refused(f"the tar is cut short: {info.size} bytes should follow", info.name)
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if longer is not None:
                raise _Refused("two extended headers follow each other")
            longer = _extended(info, file.read(min(info.size, _MAX_PAX_BYTES + 1)))
        else:
            yield longer or info.name, info.size
            longer = None
        file.seek(start + padded)
    if longer is not None:
        raise _Refused("an extended header is followed by nothing")
    _check_end(file)


def _check_beginning(block: bytes) -> None:
    """Say what a file is that is no tar, where that is easy to tell."""
    if not block:
        raise _Refused("it is empty")
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        for magic, kind in _PACKED.items():
            if block.startswith(magic):
                raise _Refused(f"it is compressed ({kind}); unpack it first") from None
        if block.lstrip()[:1] in (b"<", b"{"):
            raise _Refused("it is a web page or a message of a server, not a tar; fetch it again") from None


def _check_end(file: BinaryIO) -> None:
    """After the first block of zeros: a second one, and nothing but zeros."""
    if file.read(TAR_BLOCK) != _ZEROS:
        raise _Refused("the tar is cut short: its end-of-archive marker is missing")
    while chunk := file.read(_CHUNK):
        if chunk.count(0) != len(chunk):
            raise _Refused("something follows the end of the archive, which webdataset would not read")


def _extended(info: tarfile.TarInfo, content: bytes) -> str:
    """The name that the next member gets; "" where its own holds."""
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
            raise _Refused(f"an extended header sets {_shown(key)}, which is not admitted")
        content = content[length:]
    return name


# ---- the samples ----------------------------------------------------------------------------------------------------


def read_tars(names: Sequence[str], dataset: str | None, scratch: Path) -> LabelledArrays:
    """The samples of some WebDataset tars, in the order given: image and label each, all images of one shape.

    Images: 8 bits, grey or RGB (grey becomes RGB where the data set, or the first image, has 3 channels), at most 1024 x
    1024; `npy` uint8 [H, W] or [H, W, C]. Labels: `cls`, a whole number in decimal; `json`, a number or an object with
    `label` or `cls`. A sample may have both kinds of label if they agree.

    Args:
        names: paths of tars, with braces for ranges ('data/{0000..0010}.tar').
        dataset: a key of `DATASETS`, or None.
        scratch: an existing folder; the images are unpacked there, so that memory stays small.

    Raises:
        UserError: names the tar and the member that cannot be used.
    """
    paths = _expanded(names)
    scans = [scan_tar(path) for path in paths]
    channels = len(DATASETS[dataset].mean) if dataset else None
    num_classes = len(DATASETS[dataset].class_names) if dataset else MAX_CLASSES
    labels: list[np.ndarray] = []
    total = sum(scan.num_samples for scan in scans)
    with gathering(scratch) as images, progress(total, "decoding") as bar:
        for path, scan in zip(paths, scans, strict=True):
            of_tar = np.empty(scan.num_samples, np.int64)
            for number, sample in enumerate(_samples(path, scan)):
                where = f"{_shown(sample['__key__'])} in the tar {path}"
                of_tar[number] = _label(sample, num_classes, where)
                image = _image(sample, channels, where)
                channels = channels or image.shape[2]
                images.add(image, f"The image of {where}")
                bar.update()
            labels.append(of_tar)
        array = images.array()
    return labelled_arrays(array, np.concatenate(labels), dataset, [facts_of(path, "tar") for path in paths])


def _expanded(names: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        if is_remote(name):
            raise UserError(f"{name} is an address. Download the tars first.")
        folder, found = expand(name)
        paths += [Path(folder, each) for each in found] if found is not None else [Path(name)]
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"The tar {path} is given twice.")
        seen.add(path.resolve())
    return paths


def _samples(path: Path, scan: Scan) -> Iterator[dict[str, Any]]:
    """What webdataset reads from one tar, after a proof that it is what the scan saw."""
    hashes, count = hashlib.sha256(), 0
    try:
        with open(path, "rb") as stream:
            # The file is opened here: webdataset would take some names for commands and addresses.
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                members = {key: len(value) for key, value in sample.items() if not key.startswith("__")}
                hashes.update(_line(sample["__key__"], members))
                count += 1
                if count > scan.num_samples:
                    break
                yield sample
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The tar {path} cannot be read ({error}). {COPY_AGAIN}") from error
    if (count, hashes.hexdigest()) != (scan.num_samples, scan.sha256):
        raise UserError(
            f"webdataset reads {count} samples from the tar {path}, but it has {scan.num_samples}, or they differ. Did "
            f"the file change meanwhile? {COPY_AGAIN}"
        )


def _image(sample: dict[str, Any], channels: int | None, where: str) -> np.ndarray:
    """uint8 [H, W, C]."""
    (extension,) = [name for name in sample if name in _KINDS]
    what = f"The .{extension} of {where}"
    if extension != "npy":
        return decode(sample[extension], _KINDS[extension], channels, what)
    array = npy_array(np.frombuffer(sample[extension], np.uint8), what)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise UserError(f"{what} is {array.dtype} {list(array.shape)}, expected uint8 [H, W] or [H, W, 1 or 3].")
    check_side((array.shape[1], array.shape[0]), what)
    image = array.reshape(*array.shape[:2], -1)
    return image.repeat(3, axis=2) if channels == 3 and image.shape[2] == 1 else image


def _label(sample: dict[str, Any], num_classes: int, where: str) -> int:
    """The class number of a sample."""
    labels: set[int] = set()
    if "cls" in sample:
        labels.add(_from_text(sample["cls"], f"The .cls of {where}"))
    if "json" in sample:
        stated = _from_json(sample["json"], f"The .json of {where}", optional="cls" in sample)
        labels |= set() if stated is None else {stated}
    if len(labels) != 1:
        raise UserError(f"The labels of {where} contradict each other: {sorted(labels)}.")
    (label,) = labels
    if not 0 <= label < num_classes:
        raise UserError(f"The label of {where} is {str(label)[:30]}, expected a class number in 0..{num_classes - 1}.")
    return label


def _from_text(content: bytes, where: str) -> int:
    text = content.strip()
    if not re.fullmatch(rb"-?\d{1,30}", text):
        raise UserError(f"{where} is {content[:40]!r}, expected a class number such as 7.")
    return int(text)


def _from_json(content: bytes, where: str, *, optional: bool) -> int | None:
    """The number itself, or the `label` or `cls` of an object; None where there is none and it is `optional`."""
    try:
        value: Any = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no valid JSON ({error}).") from error
    if isinstance(value, dict):
        found = [value[key] for key in ("label", "cls") if key in value]
        if not found and optional:
            return None
        value = found[0] if found and all(each == found[0] for each in found) else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(
            f"{where} holds no class number: expected an integer, or an object with an integer `label` or `cls`."
        )
    return int(value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
