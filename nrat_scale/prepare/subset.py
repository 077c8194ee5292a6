"""Write some samples of shards as shards of their own, under their source ids."""

from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, first_line, quoted
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.audit_scores import read_audit_scores
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.prepare.input import LabelledArrays
from nrat_scale.prepare.writer import write_shards

BESIDE = ""  # the audit whose folder is that of the shards with -audit at its end


class _ChosenImages:
    """The images at some positions of shards, as an `ImageArray`."""

    def __init__(self, shards: ShardSet, positions: np.ndarray) -> None:
        self._shards, self._positions = shards, positions
        self.shape = (len(positions), *shards.image_shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._shards.images(self._positions[rows])


def subset(
    where: str,
    out: Path,
    *,
    per_class: int | None = None,
    without: str | None = None,
    ids: Path | None = None,
    scores: Path | None = None,
    keep: str | None = None,
    by_confidence: str | None = None,
    seed: int = 0,
    **options: Any,
) -> str:
    """Write a selection of the samples at `where` into the new folder `out`, in stored order; returns a summary line.

    Args:
        per_class: that many of each class, the first ones in an order drawn with `seed`.
        without: with `per_class`: another subset of the same shards, whose samples are left out.
        by_confidence: with `per_class`: the folder of an audit of these shards (`BESIDE`: the one beside them); those with the
            highest out-of-sample probability of their label, ties by lowest id.
        ids: file of source ids, .npy (integers [m]) or .txt (one per line).
        scores: .npy of numbers [number of source ids]; the samples with the highest are kept, ties by lowest id.
        keep: with `scores`: how many, as a number or as a fraction such as 0.8.
        options: see `writer.write_into`.

    Raises:
        UserError: not exactly one selection, or an impossible one.
    """
    if [per_class, ids, scores].count(None) != 2 or (scores is None) != (keep is None):
        raise UserError("Give exactly one selection: --per-class N, --ids FILE, or --scores FILE with --keep.")
    for option, given in {"--by-confidence": by_confidence, "--without": without}.items():
        if given is not None and per_class is None:
            raise UserError(f"{option} needs --per-class N, the number of images to keep of each class.")
    shards = open_shards(where, where)
    shards.verify()
    all_ids = shards.source_ids(np.arange(len(shards)))
    if per_class is not None:
        rank = hash64(derive(seed, "subset"), all_ids)  # of the id: the choice does not depend on the stored order
        if by_confidence is not None:
            confidence = read_audit_scores(_audit_folder(shards, by_confidence), "--by-confidence")
            confidence.check_fits(shards)
            rank = -confidence.p_given.astype(np.float64)
        left = np.ones(len(shards), bool)
        if without is not None:
            left[_positions_of_subset(shards, without)] = False
        positions = _first_of_each_class(shards, all_ids, per_class, rank, left)
    elif ids is not None:
        positions = _positions_of_ids(shards, ids)
    else:
        assert scores is not None and keep is not None  # by the first check
        positions = _highest(_read_scores(scores, shards)[all_ids], all_ids, keep)
    positions = np.sort(positions)  # stored order, which is already mixed
    images, labels, files = _ChosenImages(shards, positions), shards.labels(positions), tuple(shards.source_files)
    source = LabelledArrays(images, labels, shards.dataset, shards.class_names, files)
    write_shards(source, out, ids=all_ids[positions], num_ids=shards.num_ids, **options)
    return f"{out}: {len(positions)} of the {len(shards)} images of {where}"


def _audit_folder(shards: ShardSet, given: str) -> str:
    if given != BESIDE:
        return given
    if shards.is_remote:
        raise UserError(f"{shards.folder} is an address. Name the folder of its audit: --by-confidence AUDIT.")
    path = Path(shards.folder)
    return str(path.with_name(f"{path.resolve().name}-audit"))


def _first_of_each_class(
    shards: ShardSet, ids: np.ndarray, per_class: int, rank: np.ndarray, left: np.ndarray
) -> np.ndarray:
    """Positions of the `per_class` samples of each class with the lowest `rank` [N], of those `left` bool [N]; ties: lowest id."""
    labels = shards.labels(np.arange(len(shards)))
    chosen = []
    for label, name in enumerate(shards.class_names):
        members = np.flatnonzero((labels == label) & left)
        if len(members) < per_class:
            raise UserError(
                f"The class {quoted(name)} has only {len(members)} images{' left' if not left.all() else ''}. Lower --per-class ({per_class})."
            )
        chosen.append(members[np.lexsort((ids[members], rank[members]))[:per_class]])
    return np.concatenate(chosen)


def _positions_of_subset(shards: ShardSet, where: str) -> np.ndarray:
    """The positions in `shards` of the samples of a subset of them."""
    other = open_shards(where, "--without")
    ids, labels = (of(np.arange(len(other))) for of in (other.source_ids, other.labels))
    same = (other.dataset, other.num_ids, other.image_shape) == (shards.dataset, shards.num_ids, shards.image_shape)
    positions = shards.positions_of(ids) if same else np.full(len(ids), -1)
    if (positions < 0).any() or (shards.labels(positions) != labels).any():
        raise UserError(
            f"--without {other.folder} is no subset of {shards.folder}: give one that was made from these shards."
        )
    return positions


def _read_numbers(path: Path, what: str, kinds: str) -> np.ndarray:
    """[m] numbers of an .npy file, whose dtype is one of the `kinds` of NumPy; or int64 [m] of a .txt file of integers."""
    is_text = path.suffix != ".npy" and "f" not in kinds
    try:
        if is_text:
            numbers = np.asarray([int(word) for word in path.read_text(encoding="utf-8").split()], np.int64)
        else:
            numbers = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, EOFError, OverflowError) as error:
        form = "a text with one integer on each line" if is_text else "an .npy file of numbers"
        raise UserError(f"The {what} {path} is not {form} ({first_line(error)}).") from error
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or not len(numbers):
        raise UserError(f"The {what} {path} is empty, or not one array of one dimension.")
    if numbers.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "integers"
        raise UserError(f"The {what} {path} has dtype {numbers.dtype}, expected {expected}.")
    return numbers


def _positions_of_ids(shards: ShardSet, path: Path) -> np.ndarray:
    ids = _read_numbers(path, "file of ids", "iu")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise UserError(f"{path} names the source id {unique[counts > 1][0]} more than once.")
    unknown = (ids < 0) | (ids >= shards.num_ids)  # a uint64 may not fit in int64
    positions = shards.positions_of(np.where(unknown, 0, ids).astype(np.int64))
    unknown |= positions < 0
    if unknown.any():
        more = f"{unknown.sum()} unknown ids"
        raise UserError(f"There is no sample with the source id {ids[unknown][0]}, which {path} names ({more}).")
    return positions


def _read_scores(path: Path, shards: ShardSet) -> np.ndarray:
    """float [number of source ids]."""
    scores = _read_numbers(path, "file of scores", "iuf")
    if len(scores) != shards.num_ids:
        expected = f"expected {shards.num_ids}: one for each source id"
        raise UserError(f"The file of scores {path} has {len(scores)} numbers, {expected}.")
    if np.isnan(scores).any():
        raise UserError(f"The file of scores {path} has NaN, first for the source id {np.isnan(scores).argmax()}.")
    return scores


def _highest(scores: np.ndarray, ids: np.ndarray, keep: str) -> np.ndarray:
    """int64 [m]: the rows of the highest of `scores` [N]; ties are broken by the lowest of `ids` [N]."""
    try:
        number = int(keep) if keep.isdecimal() else max(1, round(float(keep) * len(scores)))
        possible = 1 <= number <= len(scores) and (keep.isdecimal() or 0 < float(keep) <= 1)
    except (ValueError, OverflowError):
        possible = False
    if not possible:
        raise UserError(f"--keep {keep} is neither a number in 1..{len(scores)} nor a fraction such as 0.8.")
    return np.lexsort((ids, -scores.astype(np.float64)))[:number]
