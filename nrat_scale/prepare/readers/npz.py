"""Read npz files: members `image` and `label`, memory-mapped."""

import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.readers.arrays import (
    CHUNK,
    Concatenated,
    as_images,
    as_labels,
    facts_of,
    labelled_arrays,
    npy_array,
    reading,
)

# ---- npz ------------------------------------------------------------------------------------------------------------


def read_npz(names: Sequence[str], dataset: str | None, scratch: Path) -> LabelledArrays:
    """The parts of one data set: npz files with members `image` and `label`, in the order given.

    Args:
        names: paths, or `hf://datasets/USER/REPO/FILE`.
        dataset: a key of `DATASETS`, or None.
        scratch: an existing folder; a compressed `image` is unpacked there and mapped, a stored one is mapped in place.

    Raises:
        UserError: a file is missing, damaged, or holds anything but uint8 images and integer labels that match.
    """
    images: list[np.ndarray] = []
    labels, files = [], []
    for number, name in enumerate(names):
        path = _fetched(name)
        with reading(path, "npz file"), zipfile.ZipFile(path) as archive:
            stored = scratch / str(number)
            part = as_images(_npz_member(archive, path, "image", stored), f"`image` in {path}")
            label = as_labels(_npz_member(archive, path, "label", stored), len(part), f"`label` in {path}")
        if images and part.shape[1:] != images[0].shape[1:]:
            raise UserError(
                f"The images in {path} have shape {list(part.shape[1:])}, but those in {names[0]} have "
                f"{list(images[0].shape[1:])}. All parts of a data set must have one shape."
            )
        images.append(part)
        labels.append(label)
        files.append(facts_of(path, "npz file"))
    return labelled_arrays(Concatenated(images), np.concatenate(labels), dataset, files)


def _fetched(name: str) -> Path:
    """The local path of `name`; what lies on the Hugging Face Hub is downloaded into its cache first."""
    if "://" not in name:
        return Path(name)
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", name)
    if not match:
        raise UserError(
            f"{name} cannot be fetched: expected a path or hf://datasets/USER/REPO/FILE. Download it first."
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(match[1], match[2], repo_type="dataset"))
    except Exception as error:  # below the Hub's client lie different HTTP libraries, whose errors share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} cannot be fetched ({reason}). Check the name and the network; private data needs `hf auth login`."
        ) from error


def _npz_member(archive: zipfile.ZipFile, path: Path, member: str, unpacked: Path) -> np.ndarray:
    """The array `member` of an npz file as a read-only memory map, its checksum verified.

    Args:
        unpacked: where to unpack a compressed member, as a file with the member's name added.
    """
    try:
        info = archive.getinfo(f"{member}.npy")
    except KeyError:
        there = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:10]) or "nothing"
        raise UserError(
            f"{path} has no member `{member}`. It has: {there}. Expected `image` (uint8) and `label` (integers); "
            "save it again with these names."
        ) from None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"`{member}` in {path} is encrypted or packed with an unusual method. Save it with numpy.savez."
        )
    if info.compress_type == zipfile.ZIP_STORED:
        return npy_array(_map_stored(path, info), f"`{member}` in {path}")
    return npy_array(_inflate(archive, path, info, unpacked.with_suffix(f".{member}")), f"`{member}` in {path}")


def _map_stored(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """uint8 [file_size]: the bytes of a member that is not compressed, mapped where they lie in the npz file."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no local header for {info.filename}")
        # The lengths of name and extra field stand here; those in the zip's directory may differ.
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.file_size < 1 or info.file_size != info.compress_size or start + info.file_size > path.stat().st_size:
            raise zipfile.BadZipFile(f"{info.filename} reaches beyond its end")
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r", offset=start, shape=(info.file_size,)))
    checksum = 0
    for first in range(0, len(mapped), CHUNK):
        checksum = zlib.crc32(mapped.data[first : first + CHUNK], checksum)
    if checksum != info.CRC:
        raise zipfile.BadZipFile(f"the checksum of {info.filename} is wrong")
    return mapped


def _inflate(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo, unpacked: Path) -> np.ndarray:
    """uint8 [file_size]: the bytes of a compressed member, unpacked in chunks into the file `unpacked` and mapped."""
    try:
        with open(unpacked, "wb") as output, archive.open(info) as packed:
            while chunk := packed.read(CHUNK):  # at the end, zipfile checks the checksum
                output.write(chunk)
    except OSError as error:
        raise UserError(
            f"`{info.filename}` in {path} is compressed and cannot be unpacked beside --out ({error.strerror or error}): "
            f"that takes {info.file_size / 1e6:.1f} MB for a while. Free some space, or choose another --out."
        ) from error
    if info.file_size < 1 or unpacked.stat().st_size != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} does not have the size that the zip's directory states")
    return np.asarray(np.memmap(unpacked, np.uint8, mode="r"))
