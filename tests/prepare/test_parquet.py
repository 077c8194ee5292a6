"""Parquet files, and data sets in the layout of the Hub."""

import json

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tests.support.preparation import assert_refused, encoded, holds, random_images

IMAGES, LABELS = random_images(24, num_classes=3)
NAMES = ("cat", "dog", "fox")
NUMBERS = LABELS.tolist()
PNGS = [encoded(image, "PNG") for image in IMAGES]


def _table(images=PNGS, labels=NUMBERS, *, column="image", label="label", names=()):
    table = pyarrow.table({column: images, "id": list(range(len(labels))), label: labels})
    if names:
        features = {label: {"names": list(names), "_type": "ClassLabel"}, column: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


def _write(path, table):
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("form", [lambda png: png, lambda png: {"bytes": png, "path": None}])
def test_rows_come_back(tmp_path, convert, form):
    """Bytes or {bytes, path}; several files in order; class names from the schema."""
    rows = [form(png) for png in PNGS]
    first = _write(tmp_path / "0.parquet", _table(rows[:10], LABELS[:10].tolist(), names=NAMES))
    second = _write(tmp_path / "1.parquet", _table(rows[10:], LABELS[10:].tolist(), names=NAMES))
    shards = convert("parquet", first, second)
    assert holds(shards, IMAGES, LABELS) and shards.class_names == NAMES
    assert [file["name"] for file in shards.source_files] == ["0.parquet", "1.parquet"]


def test_named_columns_and_names_as_labels(tmp_path, convert):
    """Any column names; labels that are strings; other sizes with --size."""
    images = [encoded(np.repeat(image, 2, axis=0), "PNG") for image in IMAGES]
    path = _write(
        tmp_path / "a.parquet", _table(images, [NAMES[y] for y in LABELS], column="picture of it", label="what")
    )
    columns = ("--image-column", "picture of it", "--label-column", "what")
    shards = convert("parquet", path, *columns, "--size", 4)
    assert shards.image_shape == (4, 4, 3) and shards.class_names == NAMES
    order = shards.in_source_order()
    assert np.array_equal(shards.labels(order), LABELS)
    again = convert("parquet", path, *columns, "--size", 4, "--classes", "fox,dog,cat")
    assert np.array_equal(again.labels(again.in_source_order()), 2 - LABELS)


MISTAKES = {
    "no image column": (_table(column="what"), ("'what'", "--image-column")),
    "no label column": (_table(label="truth"), ("'truth'", "--label-column")),
    "null image": (_table([*PNGS[:5], None, *PNGS[6:]]), ("Row 5 of a.parquet has no image",)),
    "null label": (_table(labels=[*LABELS[:-1].tolist(), None]), ("Row 23 of a.parquet has 'None'",)),
    "unlabelled": (_table(labels=[-1] * 24, names=NAMES), ("without a label",)),
    "gap": (_table(labels=(LABELS + 1).tolist()), ("--labels-start 1",)),
    "text": (_table([b"hello"] * 24), ("row 0 of a.parquet is not a readable",)),
    "floats": (_table(labels=[0.5] * 24), ("Row 0 of a.parquet has '0.5'",)),
    "numbers as images": (_table(list(range(24))), ("Row 0 of a.parquet has no image",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_sentences(tmp_path, cli, name):
    """Columns, empty cells, other contents."""
    table, words = MISTAKES[name]
    assert_refused(cli, tmp_path, ["parquet", _write(tmp_path / "a.parquet", table)], *words)


def test_files_that_are_not_parquet(tmp_path, cli):
    """A text file, a missing file, files of two schemas."""
    (tmp_path / "a.parquet").write_text("hello")
    assert_refused(cli, tmp_path, ["parquet", tmp_path / "a.parquet"], "a.parquet", "damaged")
    assert_refused(cli, tmp_path, ["parquet", tmp_path / "b.parquet"], "There is no parquet file")
    first = _write(tmp_path / "c.parquet", _table())
    assert_refused(
        cli, tmp_path, ["parquet", first, _write(tmp_path / "d.parquet", _table(label="y"))], "other columns"
    )


def test_a_data_set_of_the_hub(tmp_path, cli, convert, monkeypatch):
    """`hf` reads what `datasets` loads: here a local folder of parquet files, and one of images with labels.csv."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "animals"
    folder.mkdir()
    _write(folder / "train-00000.parquet", _table([{"bytes": png, "path": None} for png in PNGS], names=NAMES))
    shards = convert("hf", folder, "--split", "train")
    assert holds(shards, IMAGES, LABELS) and shards.class_names == NAMES
    images = tmp_path / "images"
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = images / "train" / NAMES[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    shards = convert("hf", images, "--split", "train")
    assert holds(shards, IMAGES, LABELS) and shards.class_names == NAMES
    result = cli("hf", folder, "--split", "test", "--out", tmp_path / "none")
    assert result.status == 2 and "'test'" in result.err and not (tmp_path / "none").exists()
