"""Score every label, write the sidecar of the scores, and keep the worst suspects of each class.

Quality is the probability that the given label j of an image x is right. With the probabilities t(x) of the true class,

    q = t_j(x) T[j, j] / sum_i t_i(x) T[i, j]

by Bayes, T being the transition matrix. A classifier that is trained on noisy labels predicts those: its p is T' t. `deconvolved`
inverts that by expectation maximisation (Richardson 1972, Lucy 1974), which keeps probabilities non-negative. Finally the
log-odds of all qualities are shifted by one number, so that as many labels are below one half as the estimate says are wrong: a
classifier that is trained for a short time is less sure than it is accurate.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import MANIFEST, fsync_folder, unfinished_sibling, write_json
from nrat_scale.data.audit_scores import ARRAYS, FOLDER, FORMAT, VERSION
from nrat_scale.data.shards import ShardSet

WORST = 20  # suspects of each class that audit.json lists
_STEPS = 10  # of expectation maximisation


def deconvolved(probabilities: np.ndarray, transition: np.ndarray) -> np.ndarray:
    """float [n, K]: t with T' t closest to p (float [n, K]) in Kullback-Leibler divergence, after a few steps from p."""
    true = probabilities
    for _ in range(_STEPS):
        ratio = probabilities / np.maximum(true @ transition, 1e-12)
        true = true * (ratio @ transition.T)
    return np.asarray(true / true.sum(axis=1, keepdims=True))


def label_quality(
    given: np.ndarray, probabilities: np.ndarray, transition: np.ndarray, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(quality float32 [n], suggested class int64 [n]) of labels int [n] with probabilities float [n, K].

    A label whose quality is below one half gets the most probable other class as a suggestion, any other label itself.

    Args:
        transition: [K, K], without zeros on the diagonal.
        shift: added to the log-odds of the quality.
    """
    matrix, rows = transition.astype(probabilities.dtype), np.arange(len(given))
    posterior = deconvolved(probabilities, matrix) * matrix[:, given].T
    posterior /= np.maximum(posterior.sum(axis=1, keepdims=True), 1e-30)
    quality = np.clip(posterior[rows, given].astype(np.float64), 1e-9, 1 - 1e-9)
    quality = 1 / (1 + (1 / quality - 1) * np.exp(-shift))
    others = posterior.copy()
    others[rows, given] = -1
    wrong = quality < 0.5
    return quality.astype(np.float32), np.where(wrong, others.argmax(axis=1), given)


class LogOdds:
    """The log-odds of all qualities in narrow bins, from which the shift follows that gives the estimated rate."""

    _LIMIT, _BINS = 21.0, 4200  # the log-odds of 1e-9 are -20.7

    def __init__(self) -> None:
        self._counts = np.zeros(self._BINS, np.int64)
        self._values = (np.arange(self._BINS) + 0.5) / self._BINS * 2 * self._LIMIT - self._LIMIT

    def add(self, quality: np.ndarray) -> None:
        """Add qualities float [n]."""
        odds = np.clip(quality.astype(np.float64), 1e-9, 1 - 1e-9)
        at = (np.log(odds / (1 - odds)) + self._LIMIT) / (2 * self._LIMIT) * self._BINS
        self._counts += np.bincount(at.astype(np.int64), minlength=self._BINS)

    def shift(self, rate: float) -> float:
        """The shift with which the share `rate` of the labels has a quality below one half."""
        below = np.cumsum(self._counts)
        edge = int(np.searchsorted(below, rate * below[-1]))  # the bin that holds the last of them
        return float(-(self._values[min(edge, self._BINS - 1)] + self._LIMIT / self._BINS))


def smoothed(transition: np.ndarray, rate: float) -> np.ndarray:
    """T [K, K] for `label_quality`: no wrong label is impossible, although an estimate of its frequency may be 0.

    Half of the noise is taken as symmetric, and at least one label in a thousand as wrong.
    """
    num_classes = len(transition)
    share = max(rate, 1e-3) / 2
    symmetric = np.full((num_classes, num_classes), share / max(num_classes - 1, 1))
    np.fill_diagonal(symmetric, 0)
    off_diagonal = transition * (1 - np.eye(num_classes)) / 2 + symmetric
    kept = np.maximum(1 - off_diagonal.sum(axis=1), 1e-3)
    out = off_diagonal + np.diag(kept)
    return np.asarray(out / out.sum(axis=1, keepdims=True))


@dataclass
class Suspects:
    """Counts of suspects by given label, and the worst of each, by ascending quality."""

    counts: np.ndarray  # int64 [K]
    worst: list[list[tuple[float, dict[str, Any]]]] = field(default_factory=list)

    def add(self, columns: dict[str, np.ndarray], first: int) -> None:
        """Add the images at the positions from `first` on; `columns` are those of the sidecar."""
        rows = np.flatnonzero(columns["suspect"])
        self.counts += np.bincount(columns["given"][rows], minlength=len(self.counts))
        for label in np.unique(columns["given"][rows]).tolist():
            of_label = rows[columns["given"][rows] == label]
            lowest = of_label[np.lexsort((columns["p_given"][of_label], columns["quality"][of_label]))[:WORST]]
            self.worst[label] += [self._entry(columns, row, first + row) for row in lowest.tolist()]
            self.worst[label] = sorted(self.worst[label], key=lambda entry: entry[0])[:WORST]

    @staticmethod
    def _entry(columns: dict[str, np.ndarray], row: int, position: int) -> tuple[Any, dict[str, Any]]:
        values = {name: columns[name][row].item() for name in ARRAYS if name not in ("ids", "suspect")}
        entry = {"id": columns["ids"][row].item(), "position": position, **values}
        return (values["quality"], values["p_given"], entry["id"]), entry

    def record(self) -> dict[str, Any]:
        """As audit.json has them."""
        worst = {str(label): [entry for _, entry in entries] for label, entries in enumerate(self.worst)}
        return {"count": int(self.counts.sum()), "by_class": self.counts.tolist(), "worst": worst}


class _Array:
    """One .npy file that is written part by part, in order, and hashed meanwhile."""

    def __init__(self, file: BinaryIO, dtype: str, length: int) -> None:
        self._file = file
        self._hash, self._bytes, self._dtype = hashlib.sha256(), 0, np.dtype(dtype)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self, header)

    def write(self, content: bytes) -> int:
        self._hash.update(content)
        self._bytes += len(content)
        return self._file.write(content)

    def add(self, values: np.ndarray) -> None:
        self.write(np.ascontiguousarray(values, self._dtype).tobytes())

    def entry(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def score_labels(
    folder: Path,
    shards: ShardSet,
    chunks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]],
    transition: np.ndarray,
    rate: float,
    facts: dict[str, Any],
) -> Suspects:
    """Write the sidecar into `folder`/scores, which it replaces when it is complete; returns the suspects.

    Args:
        folder: of the audit.
        chunks: all images in the order of their positions: (positions, given labels int64 [n], probabilities float32 [n, K]).
        transition: T of `label_quality`.
        rate: the estimated share of wrong labels, which is that of the qualities below one half.
        facts: what else the manifest states.

    Raises:
        UserError: the disk is full or read-only.
    """
    odds = LogOdds()
    for _, given, probabilities in chunks():
        odds.add(label_quality(given, probabilities, transition)[0])
    shift = odds.shift(min(max(rate, 1e-4), 1 - 1e-4))
    target, out = folder / FOLDER, unfinished_sibling(folder / FOLDER)
    suspects = Suspects(np.zeros(shards.num_classes, np.int64), [[] for _ in range(shards.num_classes)])
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with ExitStack() as opened:
            paths = {name: out / f"{name}.npy" for name in ARRAYS}
            streams = {name: opened.enter_context(path.open("wb")) for name, path in paths.items()}
            arrays = {name: _Array(file, ARRAYS[name], len(shards)) for name, file in streams.items()}
            for positions, given, probabilities in chunks():
                columns = _columns(shards, positions, given, probabilities, transition, shift)
                for name, array in arrays.items():
                    array.add(columns[name])
                suspects.add(columns, int(positions[0]))
            files = {f"{name}.npy": array.entry() for name, array in arrays.items()}
            for file in streams.values():
                file.flush()
                os.fsync(file.fileno())
        names = {"num_images": len(shards), "num_classes": shards.num_classes, "class_names": list(shards.class_names)}
        data = {"fingerprint": shards.fingerprint, **facts, "nrat_scale": nrat_scale.__version__}
        write_json(out / MANIFEST, {"format": FORMAT, "version": VERSION, **names, **data, "files": files})
        if target.exists():  # scores of an earlier run of this command
            shutil.rmtree(target)
        out.rename(target)
        fsync_folder(folder)
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise UserError(
            f"{target} cannot be written ({error.strerror}). Free space or choose another --out."
        ) from error
    return suspects


def _columns(
    shards: ShardSet,
    positions: np.ndarray,
    given: np.ndarray,
    probabilities: np.ndarray,
    transition: np.ndarray,
    shift: float,
) -> dict[str, np.ndarray]:
    """The arrays of the sidecar for some images."""
    rows = np.arange(len(given))
    quality, suggested = label_quality(given, probabilities, transition, shift)
    return {
        "ids": shards.source_ids(positions),
        "given": given,
        "suggested": suggested,
        "p_given": np.minimum(probabilities[rows, given], 1),
        "p_suggested": np.minimum(probabilities[rows, suggested], 1),
        "quality": quality,
        "suspect": (quality < 0.5) & (suggested != given),  # rounding to float32 can reach 0.5
    }
