"""Files of human labels (CIFAR-10N): the named set is read, and hostile or damaged files are refused unread."""

import struct
import zipfile

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.label_files import HUMAN_SETS, load_human_labels
from nrat_scale.labels import NoiseSpec


def _labels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 10, count)


def test_unreadable_human_labels_are_refused(tmp_path):
    """A missing, empty, pickled or foreign file raises a sentence, and nothing is unpickled."""
    contents = {"text.npy": b"1,2,3", "empty.npy": b"", "zip.npy": b"PK\x03\x04", "cut.npy": b"\x93NUMPY\x01\x00"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    for name in (*contents, "objects.npy"):
        with pytest.raises(UserError, match=r"cannot be read as an \.npy array"):
            load_human_labels(str(tmp_path / name), "worse")
    with pytest.raises(UserError, match="There is no file of human labels"):
        load_human_labels(str(tmp_path / "nowhere.npy"), "worse")
    with pytest.raises(UserError, match="cannot be read"):
        load_human_labels(str(tmp_path), "worse")


def test_each_set_of_human_labels_is_read_by_its_name(tmp_path):
    """`human_set` chooses among the five sets of CIFAR-10N."""
    sets = {key: _labels(50, number) for number, key in enumerate(HUMAN_SETS.values())}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "human.npz", **sets)
        for name, key in HUMAN_SETS.items():
            assert np.array_equal(load_human_labels(str(tmp_path / "human.npz"), name), sets[key])
    assert NoiseSpec().human_set == "worse"


def _npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def test_human_labels_with_a_wrong_header_are_refused(tmp_path):
    """Terabytes, objects, floats, tables, other names and truncated files raise a sentence before memory is allocated."""
    shape = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }\n"
    arrays = [
        _npy(shape % ("<i8", "(1000000000000,)")),
        _npy(shape % ("<i8", "(-1,)"), bytes(8)),
        _npy(shape % ("|O", "(1,)"), b"\x80\x04."),
        _npy(shape % ("<f8", "(1,)"), bytes(8)),
        _npy(shape % ("<i8", "(1, 1)"), bytes(8)),
        _npy(shape % ("<i8", "()"), bytes(8)),
        _npy(shape % ("<i8", "(2,)"), bytes(15)),
        _npy(shape % ("<i8", "(2,)"), bytes(17)),
    ]
    for number, content in enumerate(arrays):
        plain, packed = tmp_path / f"{number}.npy", tmp_path / f"{number}.npz"
        plain.write_bytes(content)
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("worse_label.npy", content)
        for path in (plain, packed):
            with pytest.raises(UserError, match=r"cannot be read as an \.npy array"):
                load_human_labels(str(path), "worse")
    np.savez(tmp_path / "other.npz", labels=np.zeros(3, np.int64))
    with pytest.raises(UserError, match=r"no item named 'worse_label\.npy'"):
        load_human_labels(str(tmp_path / "other.npz"), "worse")
