"""Label noise with a given transition matrix: its rates, its forms in a recipe, and matrices that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.labels import NoiseSpec, corrupt, describe_noise, labels_sha256, transition_matrix
from nrat_scale.recipe import load_recipe, to_yaml
from nrat_scale.train import __main__ as train_cli
from tests.support.runs import RECIPE, make_shards

THREE = [[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]
TEN = [[0.6 if i == j else 0.4 if j == (i + 1) % 10 else 0.0 for j in range(10)] for i in range(10)]


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe of `tests.support.runs`, with its shards."""
    folder = tmp_path_factory.mktemp("matrix")
    real, generated = make_shards(folder / "real", 120, 0), make_shards(folder / "generated", 90, 1)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)))
    return path


def test_the_labels_follow_the_matrix() -> None:
    """Each row is met within four standard deviations, zeros exactly; rounded rows are divided by their sum."""
    clean = np.repeat(np.arange(3), 20_000)
    counts = transition_matrix(clean, corrupt(clean, "matrix", 0.0, 0, 3, matrix=THREE), 3)
    expected = 20_000 * np.asarray(THREE)
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - np.asarray(THREE)))).all()
    thirds = [[0.333, 0.333, 0.333]] * 3
    counts = transition_matrix(clean, corrupt(clean, "matrix", 0.0, 0, 3, matrix=thirds), 3)
    assert np.abs(counts / 20_000 - 1 / 3).max() < 0.014
    identity = corrupt(clean, "matrix", 0.0, 0, 3, matrix=np.eye(3))
    assert np.array_equal(identity, clean) and identity is not clean


def test_the_draw_of_an_image_is_its_own() -> None:
    """More labels behind it change no label, and the labels are those of every version: stored runs name them by the seed."""
    clean = np.arange(3000) % 3
    noisy = corrupt(clean, "matrix", 0.0, 5, 3, matrix=THREE)
    assert np.array_equal(corrupt(clean[:100], "matrix", 0.0, 5, 3, matrix=THREE), noisy[:100])
    assert labels_sha256(noisy)[:16] == "81307bceb201ec3c"


def test_every_form_gives_the_same_labels(recipe_path: Path, tmp_path: Path) -> None:
    """Nested lists, JSON, JSON of an object, and CSV: same labels, and the run stores matrix and realised counts."""
    (tmp_path / "m.json").write_text(json.dumps(TEN))
    (tmp_path / "object.json").write_text(json.dumps({"matrix": TEN, "from": "people"}))
    (tmp_path / "m.csv").write_text("\n".join(", ".join(map(str, row)) for row in TEN) + "\n\n")
    stored = []
    for number, given in enumerate(
        (json.dumps(TEN), *(str(tmp_path / name) for name in ("m.json", "object.json", "m.csv")))
    ):
        run = tmp_path / f"run{number}"
        noise = f"data.real.noise={{kind: matrix, rate: 0, seed: 3, matrix: {given}}}"
        train_cli.main([str(recipe_path), noise, f"run_dir={run}", "train.max_steps=1"])
        stored.append(json.loads((run / "label_noise.json").read_text()))
        again = load_recipe(run / "recipe.yaml")
        assert again.identity == load_recipe(recipe_path, [noise]).identity
        assert json.dumps(TEN)[:9] in str(again.data.real.noise.matrix) or isinstance(again.data.real.noise.matrix, str)
    first = stored[0]
    assert all(noise == first for noise in stored)
    assert first["matrix"] == TEN and first["kind"] == "matrix" and 0.2 < first["realised_rate"] < 0.6
    counts = np.asarray(first["transition_matrix"])
    assert counts.sum() == first["num_labels"] and (counts[np.asarray(TEN) == 0] == 0).all()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5], [0.1, 0.9]], "data.real.noise.matrix is for 2 classes, but the labels have 3"),
        ([[1, 0, 0], [0, 1, 0]], "not square: it has 2 rows, and row 0 has 3 numbers"),
        ([[1, 0, 0], [0, 1], [0, 0, 1]], "not square: it has 3 rows, and row 1 has 2"),
        ([[0.9, 0, 0], [0, 1, 0], [0, 0, 1]], "Row 0 of data.real.noise.matrix sums to 0.9; each row must sum to 1"),
        ([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]], r"Row 0 .* has '1\.5'; it must have probabilities"),
        ([[float("nan"), 1, 0], [0, 1, 0], [0, 0, 1]], "'nan'; it must have probabilities"),
        ([["a", 1, 0], [0, 1, 0], [0, 0, 1]], "'a'; it must have probabilities"),
        ([[True, False, False], [0, 1, 0], [0, 0, 1]], "'True'; it must have probabilities"),
        ([1, 0, 0], r"Row 0 of .* is '1'; it must be a list of numbers"),
        ([], "must be a list of rows"),
        ([[1]], "1 row"),
        ({"a": 1}, "must be a list of rows"),
        (None, "needs data.real.noise.matrix"),
        ("nowhere.json", "no transition matrix at nowhere.json"),
    ],
)
def test_what_is_no_matrix(matrix: Any, message: str) -> None:
    """One sentence each, that names the row."""
    with pytest.raises(UserError, match=message):
        corrupt(np.arange(9) % 3, "matrix", 0.0, 0, 3, matrix=NoiseSpec("matrix", matrix=matrix).matrix)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a list of rows"),
        (b"[[1, 0", "is not a JSON file"),
        (b'{"rows": [[1]]}', "must be a list of rows"),
        (b"a,b,c\n1,0,0\n", "is not a JSON file .*'a'"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b"1,0,0\n0,1,0\n", "not square"),
        (b"[" * 100_000, "is not a JSON file|must be a list"),
        (b"[[NaN, 0, 0], [0, 1, 0], [0, 0, 1]]", "'nan'; it must have probabilities"),
    ],
)
def test_files_without_a_matrix(content: bytes, message: str, tmp_path: Path) -> None:
    """The sentence names the file."""
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        corrupt(np.arange(9) % 3, "matrix", 0.0, 0, 3, matrix=str(path))
    assert str(path) in str(caught.value)


def test_keys_that_contradict_the_matrix(recipe_path: Path) -> None:
    """A rate beside it and a matrix of another kind are refused; untouched recipes keep their identity."""
    for changes, message in (
        (["data.real.noise={kind: matrix, rate: 0.4, matrix: m.json}"], "the matrix states how many labels change"),
        (
            ["data.real.noise.matrix=m.json"],
            r"data\.real\.noise\.matrix is set but data\.real\.noise\.kind is 'symmetric'",
        ),
        (["data.generated.noise={kind: matrix}"], r"needs data\.generated\.noise\.matrix"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(recipe_path, changes)
    plain = load_recipe(recipe_path)
    assert "matrix: null" in to_yaml(plain)
    former = "".join(line for line in to_yaml(plain).splitlines(keepends=True) if line.strip() != "matrix: null")
    path = recipe_path.parent / "former.yaml"
    path.write_text(former)
    assert former.count("\n") == to_yaml(plain).count("\n") - 2 and load_recipe(path).identity == plain.identity


def test_a_class_of_an_unused_row(tmp_path: Path) -> None:
    """The description of noise from a file has its rows, so that the run does not depend on the file."""
    (tmp_path / "m.json").write_text(json.dumps(THREE))
    spec = NoiseSpec("matrix", matrix=str(tmp_path / "m.json"))
    clean = np.zeros(50, np.int64)
    described = describe_noise(clean, corrupt(clean, "matrix", 0.0, 0, 3, matrix=spec.matrix), 3, spec)
    assert np.allclose(described["matrix"], THREE) and described["transition_matrix"][1] == [0, 0, 0]
