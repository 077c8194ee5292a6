"""The reader of an audit's sidecar refuses what does not belong together, in one sentence."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.audit.scores import score_labels
from nrat_scale.core.errors import UserError
from nrat_scale.data.audit_scores import ARRAYS, read_audit_scores
from nrat_scale.data.shards import ShardSet, open_shards
from tests.support.runs import make_shards

NUM = 90


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return open_shards(make_shards(tmp_path / "shards", NUM, 0))


def _write(folder: Path, shards: ShardSet, noise=None, shift: int = 0) -> Path:
    """A sidecar in which every fifth label looks wrong."""

    def chunks():
        for start in range(0, NUM, 40):
            positions = np.arange(start, min(start + 40, NUM))
            given = (shards.labels(positions) + shift) % 10
            probabilities = np.full((len(positions), 10), 0.01, np.float32)
            probabilities[np.arange(len(positions)), np.where(positions % 5 == 0, (given + 1) % 10, given)] = 0.91
            yield positions, given, probabilities

    matrix = np.full((10, 10), 0.02) + 0.8 * np.eye(10)
    folder.mkdir()
    score_labels(folder, shards, chunks, matrix, 0.2, {"noise": noise, "models": [], "audit": "0" * 16})
    return folder


def _manifest(folder: Path) -> Path:
    return folder / "scores" / "manifest.json"


def _replace(folder: Path, name: str, array: np.ndarray) -> None:
    """Another array with a hash that fits: the reader must look at its content."""
    path = folder / "scores" / f"{name}.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, (1, 0), allow_pickle=False)
    manifest = json.loads(_manifest(folder).read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _manifest(folder).write_text(json.dumps(manifest))


def test_what_is_written_is_read(tmp_path, shards):
    """All arrays in the order of the positions, found by source id; the folder of the audit or of the scores may be named."""
    folder = _write(tmp_path / "audit", shards)
    scores = read_audit_scores(folder)
    assert scores.sha256 == read_audit_scores(folder / "scores").sha256
    assert len(scores) == NUM
    for name, dtype in ARRAYS.items():
        assert getattr(scores, name).dtype == np.dtype(dtype)
        assert getattr(scores, name).shape == (NUM,)
    np.testing.assert_array_equal(scores.given, shards.labels(np.arange(NUM)))
    wrong = np.arange(NUM) % 5 == 0
    np.testing.assert_array_equal(scores.suspect, wrong)
    np.testing.assert_array_equal(scores.suggested[wrong], (scores.given[wrong] + 1) % 10)
    scores.check_fits(shards)
    scores.check_fits(shards, scores.given.astype(np.int64))
    with pytest.raises(ValueError, match="read-only"):
        scores.given[0] = 1


def test_other_shards_and_other_labels(tmp_path, shards):
    """Scores of other shards, of other noise, and of noise where none is injected."""
    other = open_shards(make_shards(tmp_path / "other", NUM, 1))
    scores = read_audit_scores(_write(tmp_path / "audit", shards), "data.real.audit.scores")
    with pytest.raises(UserError, match=r"\(data.real.audit.scores\) are of other shards"):
        scores.check_fits(other)
    scores.manifest["num_classes"] = 11
    with pytest.raises(UserError, match="its manifest has 11 classes, not 10"):
        scores.check_fits(shards)
    scores.manifest["num_classes"] = 10
    labels = scores.given.astype(np.int64)
    labels[3] = (labels[3] + 1) % 10
    with pytest.raises(UserError, match="of other labels: the audit read them as stored, and 1 of 90 differ"):
        scores.check_fits(shards, labels)
    noisy = read_audit_scores(
        _write(tmp_path / "noisy", shards, {"kind": "symmetric", "rate": 0.4, "seed": 0}, shift=1)
    )
    with pytest.raises(UserError, match=r"with the noise .*symmetric.*90 of 90 differ"):
        noisy.check_fits(shards)


def test_missing_and_incomplete(tmp_path, shards):
    """No folder, an audit that was interrupted, and a folder of something else."""
    with pytest.raises(UserError, match="there is no such folder"):
        read_audit_scores(tmp_path / "nothing")
    folder = _write(tmp_path / "audit", shards)
    _manifest(folder).rename(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"not complete. Run python -m nrat_scale.audit again"):
        read_audit_scores(folder)
    (folder / "scores" / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match="is not that of an audit's scores"):
        read_audit_scores(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "have version '2'; this program reads version 1"),
        ({"fingerprint": None}, "its manifest has no fingerprint"),
        ({"noise": "none"}, "its manifest has no noise"),
        ({"num_images": 89}, "of shape \\[90\\], not int64 of \\[89\\]"),
        ({"class_names": ["a"]}, "contradicts itself"),
        ({"files": {}}, "does not match its size and sha256"),
    ],
)
def test_damaged_manifest(tmp_path, shards, change, match):
    """A field that is missing, of another type or another version."""
    folder = _write(tmp_path / "audit", shards)
    manifest = json.loads(_manifest(folder).read_text()) | change
    _manifest(folder).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=match):
        read_audit_scores(folder)


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("given", np.full(NUM, 10, "<i4"), "given.npy names classes that do not exist"),
        ("suggested", np.full(NUM, -1, "<i4"), "suggested.npy names classes"),
        ("quality", np.full(NUM, np.nan, "<f4"), "quality.npy holds values that are not in"),
        ("p_given", np.full(NUM, 1.5, "<f4"), "p_given.npy holds values"),
        ("quality", np.zeros(NUM), "it holds float64 of shape"),
        ("ids", np.zeros((NUM, 1), "<i8"), "of shape \\[90, 1\\]"),
    ],
)
def test_values_that_cannot_be(tmp_path, shards, name, array, match):
    """Classes that do not exist and probabilities that are none, although the hash fits."""
    folder = _write(tmp_path / "audit", shards)
    _replace(folder, name, array)
    with pytest.raises(UserError, match=match):
        read_audit_scores(folder)


def test_changed_bytes(tmp_path, shards):
    """One flipped bit is found by the hash."""
    folder = _write(tmp_path / "audit", shards)
    path = folder / "scores" / "quality.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"quality.npy does not match its size and sha256"):
        read_audit_scores(folder)


def test_pickled_array_is_refused(tmp_path, shards):
    """An array of objects is not unpickled, although its hash fits."""
    folder = _write(tmp_path / "audit", shards)
    path = folder / "scores" / "ids.npy"
    np.save(path, np.array([{"a": 1}] * NUM, dtype=object), allow_pickle=True)
    manifest = json.loads(_manifest(folder).read_text())
    content = path.read_bytes()
    manifest["files"]["ids.npy"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _manifest(folder).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="it holds object"):
        read_audit_scores(folder)


def test_full_disk_leaves_nothing(tmp_path, shards, monkeypatch):
    """A write that fails ends in one sentence; the scores of before and no temporary folder remain."""
    folder = _write(tmp_path / "audit", shards)
    before = _manifest(folder).read_bytes()
    from nrat_scale.audit import scores as module

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Array, "write", full)
    with pytest.raises(UserError, match=r"scores cannot be written \(No space left on device\)"):
        score_labels(
            folder,
            shards,
            lambda: iter([(np.arange(NUM), shards.labels(np.arange(NUM)), np.full((NUM, 10), 0.1, np.float32))]),
            np.eye(10),
            0.2,
            {"noise": None},
        )
    assert _manifest(folder).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["scores"]
