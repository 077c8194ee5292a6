"""Read tables of encoded images: parquet files, and data sets of the Hugging Face Hub.

Both store an image as bytes, or as {bytes, path}. Neither pyarrow nor datasets is needed for anything else.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.prepare.input import Classes, LabelledArrays
from nrat_scale.prepare.readers.checks import file_facts, reading
from nrat_scale.prepare.readers.encoded import Fit, decode_all
from nrat_scale.remote.stores import hub_failure

_IMAGE_COLUMNS = ("image", "img", "images", "png", "jpg", "webp", "picture")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Table:
    """Rows of an image table.

    Attributes:
        name: for messages and the index.
        columns: names of all columns.
        class_names: by label column, if the table states them.
        rows: names of columns -> iterator over rows as tuples, in that order.
    """

    name: str
    columns: Sequence[str]
    class_names: dict[str, tuple[str, ...]]
    num_rows: int
    rows: Callable[[Sequence[str]], Iterator[tuple[Any, ...]]]


def read_table(
    table: Table, image_column: str | None, label_column: str | None, fit: Fit, classes: Classes, scratch: Path
) -> LabelledArrays:
    """The images and labels of `table`, in its order.

    Labels are integers, or strings; the classes of strings are in the order of `classes`, or of their names.

    Raises:
        UserError: a column is missing or ambiguous, a row has no image or label, and as `decode_all`.
    """
    image = _column(table, image_column, _IMAGE_COLUMNS, "--image-column")
    label = _column(table, label_column, _LABEL_COLUMNS, "--label-column")
    labels, classes = _labels(table, label, classes)

    def encoded() -> Iterator[tuple[str, bytes]]:
        for number, (value,) in enumerate(table.rows([image])):
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                expected = "the bytes of an image file, or {bytes, path}"
                raise UserError(f"Row {number} of {table.name} has no image in {quoted(image)}: expected {expected}.")
            yield f"row {number} of {table.name}", data

    decoded = decode_all(encoded, table.num_rows, fit, scratch)
    return LabelledArrays.of(decoded.images, labels, classes, [decoded.facts(table.name)], note=decoded.note)


def _column(table: Table, given: str | None, usual: Sequence[str], option: str) -> str:
    """The column that was named, or the only one with a usual name."""
    listed = ", ".join(quoted(name) for name in table.columns)
    if given is not None:
        if given not in table.columns:
            raise UserError(f"{table.name} has no column {quoted(given)} ({option}). It has: {listed}.")
        return given
    found = [name for name in table.columns if name.lower() in usual]
    if len(found) != 1:
        raise UserError(f"{table.name} has the columns {listed}. Name the right one with {option}.")
    return found[0]


def _labels(table: Table, column: str, classes: Classes) -> tuple[np.ndarray, Classes]:
    values = [value for (value,) in table.rows([column])]
    kinds = {type(value) for value in values}
    if kinds == {int}:
        stated = table.class_names.get(column, ())
        if stated and min(values) < 0:
            raise UserError(
                f"{table.name} has rows without a label (-1 in {quoted(column)}). Convert a labelled split."
            )
        return np.array(values, np.int64), classes if classes.known_names or not stated else Classes(names=stated)
    if kinds != {str}:
        number = next(
            i for i, value in enumerate(values) if type(value) not in (int, str) or type(value) is not type(values[0])
        )
        found = f"{quoted(values[number])} in {quoted(column)}"
        raise UserError(f"Row {number} of {table.name} has {found}, expected class numbers, or names, in all rows.")
    names = classes.known_names or tuple(sorted(set(values)))
    if unknown := sorted(set(values) - set(names)):
        raise UserError(f"{table.name} has the class {quoted(unknown[0])}, which is none of {', '.join(names[:10])}.")
    numbers = {name: label for label, name in enumerate(names)}
    named = classes if classes.known_names else Classes(names=names)
    return np.array([numbers[value] for value in values], np.int64), named


# ---- parquet --------------------------------------------------------------------------------------------------------


def read_parquet(
    files: Sequence[Path], image_column: str | None, label_column: str | None, fit: Fit, classes: Classes, scratch: Path
) -> LabelledArrays:
    """The rows of parquet files of one schema, in the given order; class names from the schema if it has them."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow. Install it: pip install 'nrat-scale[hf]'.") from error
    opened = []
    for path in files:
        with reading(path, "parquet file"):
            opened.append(parquet.ParquetFile(path))
    schema = opened[0].schema_arrow
    for path, file in zip(files, opened, strict=True):
        if file.schema_arrow.names != schema.names:
            raise UserError(f"{path} has other columns than {files[0]}. Convert them one by one.")

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for path, file in zip(files, opened, strict=True):
            with reading(path, "parquet file"):
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                    yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)

    num_rows = sum(file.metadata.num_rows for file in opened)
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    table = Table(name, schema.names, _stated_names(schema.metadata), num_rows, rows)
    source = read_table(table, image_column, label_column, fit, classes, scratch)
    return replace(source, files=tuple(file_facts(path, "parquet file") for path in files))


def _stated_names(metadata: dict[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Class names by column, from the features that the `datasets` library stores in the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # any other writer


# ---- the Hugging Face Hub -------------------------------------------------------------------------------------------


def read_hf(
    dataset: str,
    split: str,
    config: str | None,
    image_column: str | None,
    label_column: str | None,
    fit: Fit,
    classes: Classes,
    scratch: Path,
) -> LabelledArrays:
    """One split of a data set of the Hub (or a local folder of it), through `datasets`; scripts of data sets never run."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "Data sets of the Hub need the datasets package. Install it: pip install 'nrat-scale[hf]'."
        ) from error
    try:
        data = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the library raises errors of many other ones
        raise UserError(f"The split {split!r} of {dataset} cannot be loaded ({hub_failure(error)}).") from error
    features = data.features
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    names = {name: tuple(f.names) for name, f in features.items() if isinstance(f, datasets.ClassLabel)}

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        chosen = data.select_columns(list(columns))
        for first in range(0, len(chosen), _BATCH_ROWS):
            batch = chosen[first : first + _BATCH_ROWS]
            for values in zip(*(batch[name] for name in columns), strict=True):
                yield tuple(_with_bytes(value) for value in values)

    where = f"{dataset} ({config}, {split})" if config else f"{dataset} ({split})"
    table = Table(where, list(features), names, len(data), rows)
    return read_table(table, image_column, label_column, fit, classes, scratch)


def _with_bytes(value: Any) -> Any:
    """An image that `datasets` stores as a path only, with the bytes of its file."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        try:
            return {**value, "bytes": Path(value["path"]).read_bytes()}
        except OSError as error:
            raise UserError(f"The image {value['path']} cannot be read ({first_line(error)}).") from error
    return value
