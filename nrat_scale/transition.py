"""Transition matrices of label noise, given in a recipe or a file: row i has the probabilities of the labels of class i."""

import csv
import json
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, first_line, quoted

_TOLERANCE = 1e-3  # of the sum of a row: published matrices are rounded
_MAX_BYTES = 1 << 24
_FORMS = "a JSON file with a list of rows (or an object with them as `matrix`), or a CSV file of numbers without a head"


def checked_matrix(values: Any, where: str, num_classes: int | None = None) -> np.ndarray:
    """float64 [K, K], each row divided by its sum, which must be 1 but for rounding.

    Args:
        values: rows of numbers.
        where: names the matrix in messages.
        num_classes: the K that it must have; None allows any above 1.

    Raises:
        UserError: not square, not probabilities, a row that does not sum to 1 within 0.001, or another number of classes.
    """
    if not isinstance(values, list | tuple | np.ndarray) or not len(values):
        raise UserError(f"{where} is {quoted(values)}; it must be a list of rows of numbers, or the path of a file.")
    size = len(values)
    for number, row in enumerate(values):
        if not isinstance(row, list | tuple | np.ndarray):
            raise UserError(f"Row {number} of {where} is {quoted(row)}; it must be a list of numbers.")
        if len(row) != size:
            raise UserError(f"{where} is not square: it has {size} rows, and row {number} has {len(row)} numbers.")
        for value in row:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"Row {number} of {where} has {quoted(value)}; it must have probabilities, in [0, 1].")
        if abs(sum(row) - 1) > _TOLERANCE:
            raise UserError(f"Row {number} of {where} sums to {sum(row):.6g}; each row must sum to 1.")
    if num_classes is not None and size != num_classes:
        raise UserError(f"{where} is for {size} classes, but the labels have {num_classes}.")
    if size < 2:
        raise UserError(f"{where} has 1 row; label noise needs at least 2 classes.")
    matrix = np.asarray(values, np.float64)
    return np.asarray(matrix / matrix.sum(1, keepdims=True))


def read_matrix(path: str, key: str) -> Any:
    """The rows in a small JSON or CSV file, unchecked (`checked_matrix`); `key` is the recipe key that names the file.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
        text = content.decode("utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            values = json.loads(text)
            return values.get("matrix") if isinstance(values, dict) else values
        rows = csv.reader(text.splitlines())
        return [[float(cell) for cell in row] for row in rows if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise UserError(f"There is no transition matrix at {path} ({key}). Give {_FORMS}.") from None
    except OSError as error:
        raise UserError(f"The transition matrix {path} ({key}) cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"The transition matrix {path} ({key}) is not {_FORMS} ({first_line(error)}).") from error


def load_matrix(given: Any, key: str, num_classes: int | None = None) -> np.ndarray:
    """float64 [K, K] of `given`, rows of numbers or the path of a file; raises as `read_matrix` and `checked_matrix`."""
    if not isinstance(given, str):
        return checked_matrix(given, key, num_classes)
    return checked_matrix(read_matrix(given, key), f"{given} ({key})", num_classes)
