"""CIFAR-10N's human labels: from the published torch file to the npz of a run, without running anything in it."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch

from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.label_files import HUMAN_SETS, load_human_labels
from tests.support.preparation import CallOnUnpickling, is_one_sentence, random_images


@pytest.fixture
def shards(tmp_path, cli) -> ShardSet:
    """Shards of 60 images of ten classes."""
    images, labels = random_images(60)
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    result = cli("npz", tmp_path / "a.npz", "--dataset", "cifar10", "--out", tmp_path / "shards", "--block-size", 7)
    assert result.status == 0
    return open_shards(tmp_path / "shards")


def _human(shards: ShardSet) -> dict[str, np.ndarray]:
    clean = shards.labels(shards.in_source_order())
    sets: dict[str, np.ndarray] = {"clean_label": clean}
    for wrong, key in enumerate(HUMAN_SETS.values()):
        sets[key] = clean.copy()
        sets[key][: 6 * wrong] = (clean[: 6 * wrong] + 1) % 10
    return sets


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_human_labels_come_back_exactly(tmp_path, cli, shards, zipped, module):
    """Both formats of torch.save and both names of numpy's module; the error rates are printed, a run can read the npz."""
    sets = _human(shards)
    torch.save(sets, tmp_path / "h.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "h.pt").read_bytes()
    if module == "numpy.core.multiarray":
        renamed = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        if zipped:
            renamed = _rezipped(content)
        (tmp_path / "h.pt").write_bytes(renamed)
    out = tmp_path / "new" / "cifar10n.npz"
    result = cli("cifar10n", tmp_path / "h.pt", "--shards", tmp_path / "shards", "--out", out)
    assert result.status == 0, result.err
    assert result.out.splitlines()[:2] == [
        "aggre: 0.00 % of 60 labels are wrong",
        "worse: 10.00 % of 60 labels are wrong",
    ]
    for name, key in HUMAN_SETS.items():
        assert np.array_equal(load_human_labels(str(out), name), sets[key])
    with np.load(out, allow_pickle=False) as written:
        assert sorted(written.files) == sorted(sets)


def _rezipped(content: bytes) -> bytes:
    """The same torch file with the module name that numpy 1 wrote into its pickle."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(info.filename, data)
    return output.getvalue()


def _changed(key: str, value: object) -> object:
    return lambda sets, folder: {**sets, key: value}


HUMAN_MISTAKES = {
    "a program": (
        lambda sets, folder: {**sets, "worse_label": CallOnUnpickling(os.mkdir, str(folder / "trap"))},
        "mkdir, which is not allowed",
    ),
    "a program instead": (
        lambda sets, folder: CallOnUnpickling(os.mkdir, str(folder / "trap")),
        "not allowed and was not run",
    ),
    "objects": (_changed("worse_label", np.array([None] * 60)), "not the file of CIFAR-10N's labels"),
    "floats": (_changed("worse_label", np.zeros(60)), "not the file of CIFAR-10N's labels"),
    "a tensor": (_changed("worse_label", torch.zeros(60)), "`worse_label`"),
    "a list": (_changed("worse_label", [1] * 60), "`worse_label`"),
    "fewer": (_changed("worse_label", np.zeros(59, np.int64)), "expected int64 [60]"),
    "another class": (_changed("worse_label", np.full(60, 10)), "expected 0..9"),
    "negative": (_changed("worse_label", np.full(60, -1)), "expected 0..9"),
    "other images": (lambda sets, folder: {**sets, "clean_label": sets["worse_label"]}, "differs from the shards"),
    "a set less": (lambda sets, folder: {"clean_label": sets["clean_label"]}, "expected a dict of"),
    "CIFAR-100N": (_changed("noisy_label", np.zeros(60, np.int64)), "expected a dict of"),
    "an array": (lambda sets, folder: sets["clean_label"], "expected a dict of"),
}


@pytest.mark.parametrize("name", HUMAN_MISTAKES)
def test_human_labels_that_are_none(tmp_path, cli, shards, name):
    """Nothing in the file runs, and only the six sets of labels for these images are accepted."""
    change, words = HUMAN_MISTAKES[name]
    torch.save(change(_human(shards), tmp_path), tmp_path / "h.pt")
    before = sorted(tmp_path.iterdir())
    result = cli("cifar10n", tmp_path / "h.pt", "--shards", tmp_path / "shards", "--out", tmp_path / "cifar10n.npz")
    assert is_one_sentence(result, words), result.err
    assert "weights_only" not in result.err and sorted(tmp_path.iterdir()) == before


def test_human_labels_files(tmp_path, cli, shards):
    """Missing, empty and damaged files; an npz is never overwritten."""
    target = ("--shards", tmp_path / "shards", "--out", tmp_path / "a.npz")
    with open(tmp_path / "large.pt", "wb") as file:
        file.truncate((1 << 28) + 1)
    result = cli("cifar10n", tmp_path / "large.pt", "--shards", tmp_path / "shards", "--out", tmp_path / "b.npz")
    assert result.status == 2 and "too many to be one" in result.err, result.err
    (tmp_path / "large.pt").unlink()
    assert is_one_sentence(cli("cifar10n", tmp_path / "h.pt", *target), "never overwritten")
    target = (*target[:3], tmp_path / "n.npz")
    assert is_one_sentence(cli("cifar10n", tmp_path / "h.pt", *target), "There is no file of human labels")
    torch.save(_human(shards), tmp_path / "h.pt")
    whole = (tmp_path / "h.pt").read_bytes()
    for content in (b"", b"PK\x03\x04", b"<html>", whole[:1000], whole[:-100], b"\x80\x02."):
        (tmp_path / "h.pt").write_bytes(content)
        assert is_one_sentence(cli("cifar10n", tmp_path / "h.pt", *target), "h.pt")
    assert not (tmp_path / "n.npz").exists()


def test_torch_forgets_what_was_allowed(tmp_path, cli, shards):
    """The types allowed for this file are not allowed for other files of the process."""
    before = set(map(str, torch.serialization.get_safe_globals()))
    torch.save(_human(shards), tmp_path / "h.pt")
    argv = ["cifar10n", tmp_path / "h.pt", "--shards", tmp_path / "shards", "--out", tmp_path / "cifar10n.npz"]
    assert cli(*argv).status == 0
    assert set(map(str, torch.serialization.get_safe_globals())) == before
