"""The SVHN reader: the published .mat files and no others."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from nrat_scale.prepare.readers.svhn import SVHN_MD5
from tests.support.preparation import assert_refused, holds, random_images

IMAGES, LABELS = random_images(50, (32, 32, 3))


def _publish(path: Path, monkeypatch: pytest.MonkeyPatch, *, dtype: str = "uint8", compressed: bool = True) -> Path:
    """A file in SVHN's format whose md5 is a published one."""
    column = np.where(LABELS == 0, 10, LABELS)[:, None].astype(dtype)
    savemat(path, {"X": IMAGES.transpose(1, 2, 3, 0), "y": column}, do_compression=compressed)
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(SVHN_MD5, "train_32x32.mat", md5)
    return path


def test_published_md5_sums_of_svhn():
    """The table agrees with torchvision's."""
    from torchvision.datasets import SVHN

    assert {name: md5 for _, name, md5 in SVHN.split_list.values()} == SVHN_MD5


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_svhn_comes_back_exactly(tmp_path, convert, monkeypatch, compressed, dtype):
    """[32, 32, 3, N] becomes [N, 32, 32, 3], and the label 10 the digit 0, under any file name."""
    path = _publish(tmp_path / "renamed.mat", monkeypatch, dtype=dtype, compressed=compressed)
    shards = convert("svhn", path)
    assert holds(shards, IMAGES, LABELS)
    assert shards.dataset == "svhn" and shards.class_names == tuple("0123456789")
    assert shards.source_files[0]["name"] == "renamed.mat"


def test_a_file_with_another_md5_is_not_parsed(tmp_path, cli, monkeypatch):
    """SciPy can crash on a damaged file, so it only sees the published ones."""

    def never(*arguments: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr("scipy.io.loadmat", never)
    path = _publish(tmp_path / "a.mat", monkeypatch)
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(cli, tmp_path, ["svhn", path], "a.mat has md5", "train_32x32.mat", "Download it again")
    assert_refused(cli, tmp_path, ["svhn", tmp_path / "no.mat"], "There is no SVHN file at")


def test_svhn_needs_scipy(tmp_path, cli, monkeypatch):
    """It is an optional dependency: without it, the message says what to install."""
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert_refused(cli, tmp_path, ["svhn", tmp_path / "a.mat"], "pip install scipy")
