"""Read npz files with the members `image` and `label` as memory maps: memory does not grow with the file."""

import struct
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from nrat_scale.core.errors import UserError, quoted
from nrat_scale.prepare.download import hub_file
from nrat_scale.prepare.input import Classes, Concatenated, LabelledArrays
from nrat_scale.prepare.readers.checks import CHUNK, as_images, as_labels, file_facts, npy_array, one_hot_width, reading
from nrat_scale.remote.address import is_remote
from nrat_scale.remote.stores import hub_failure


def read_npz(names: Sequence[str], classes: Classes, scratch: Path) -> LabelledArrays:
    """The files of one data set, in the given order, each with the members `image` and `label`.

    Args:
        names: paths, or `hf://datasets/USER/REPO/FILE`.
        scratch: for compressed members; stored ones are mapped in place.
    """
    images: list[np.ndarray] = []
    labels, files = [], []
    widths: set[int | None] = set()
    for number, name in enumerate(names):
        path = _local_path(name)
        with reading(path, "npz file"), open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                way_out = "python -m nrat_scale.prepare arrays IMAGES.npy LABELS.npy --out DIR"
                raise UserError(f"{path} is an .npy file, not an npz. For a pair of arrays: {way_out}")
        with reading(path, "npz file"), zipfile.ZipFile(path) as archive:
            pixels = _member(archive, path, "image", scratch / f"{number}.image")
            images.append(as_images(pixels, f"`image` in {path}"))
            targets = _member(archive, path, "label", scratch / f"{number}.label")
            labels.append(as_labels(targets, len(pixels), f"`label` in {path}"))
            widths.add(one_hot_width(targets))
        shape, first_shape = list(images[-1].shape[1:]), list(images[0].shape[1:])
        if shape != first_shape:
            raise UserError(f"The images in {path} have shape {shape}, but those in {names[0]} have {first_shape}.")
        files.append(file_facts(path, "npz file"))
    if len(widths) > 1:
        raise UserError("The files have one-hot labels of different widths, or only some have. Save them alike.")
    return LabelledArrays.of(Concatenated(images), np.concatenate(labels), classes, files, widths.pop())


def _local_path(name: str) -> Path:
    """The path of `name`; a file on the Hugging Face Hub is downloaded into the Hub's cache first."""
    if not is_remote(name):
        return Path(name)
    address = hub_file(name)
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(address.repo, address.path, repo_type="dataset", revision=address.revision)
        )
    except Exception as error:  # the Hub's client raises errors of several HTTP libraries
        raise UserError(f"{name} cannot be fetched ({hub_failure(error)}). Check the name and the network.") from error


def _member(archive: zipfile.ZipFile, path: Path, member: str, unpacked: Path) -> np.ndarray:
    """The array `member` of an npz file as a read-only memory map, after its checksum was verified."""
    where = f"`{member}` in {path}"
    try:
        info = archive.getinfo(f"{member}.npy")
    except KeyError:
        names = ", ".join(quoted(name.removesuffix(".npy")) for name in archive.namelist()[:10]) or "nothing"
        raise UserError(
            f"{path} has no member `{member}`. It has: {names}. Expected `image` (uint8) and `label` (integers)."
        ) from None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{where} is encrypted, or its compression is not supported. Save it with numpy.savez.")
    return npy_array(_mapped(archive, path, info, unpacked), where)


def _mapped(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo, unpacked: Path) -> np.ndarray:
    """uint8 [file_size]: the bytes of a member, mapped in place if it is stored, else decompressed into `unpacked`."""
    is_stored = info.compress_type == zipfile.ZIP_STORED
    try:
        with archive.open(info) as member, nullcontext() if is_stored else open(unpacked, "wb") as output:
            while chunk := member.read(CHUNK):  # verifies the local header, and the checksum at the end
                if output is not None:
                    output.write(chunk)
    except OSError as error:
        what = f"`{info.filename}` in {path} cannot be read, or decompressed beside --out ({error.strerror or error})"
        raise UserError(f"{what}. It needs {info.file_size / 1e6:.1f} MB there. Free some space.") from error
    if is_stored:
        with open(path, "rb") as file:  # the name and extra field of the local header may differ from the zip directory
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        source, num_bytes = path, info.compress_size
    else:
        source, start, num_bytes = unpacked, 0, unpacked.stat().st_size
    if info.file_size < 1 or info.file_size != num_bytes:
        raise zipfile.BadZipFile(f"{info.filename} does not have the size in the zip directory")
    return np.asarray(np.memmap(source, np.uint8, mode="r", offset=start, shape=(num_bytes,)))
