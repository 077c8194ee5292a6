"""The sidecar of an audit: a score of every label, bound to the shards and to the labels that were audited.

    DIR/scores/manifest.json   format, fingerprint, noise, models, size and sha256 of each array; written last
    DIR/scores/NAME.npy        one array of `ARRAYS` [N] by position, never pickled

Training and `subset` read it through memory maps; `nrat_scale.audit` writes it. docs/audit.md has an example.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrat_scale.core.errors import UserError, first_line, printable, quoted
from nrat_scale.core.files import MANIFEST, manifest_mismatch, read_json, sha256_of
from nrat_scale.data.shards import ShardSet

FORMAT, VERSION = "nrat_scale.audit_scores", 1
FOLDER = "scores"  # in the folder of an audit
ARRAYS = {  # name -> dtype
    "ids": "<i8",  # source id of each position
    "given": "<i4",  # the audited label
    "suggested": "<i4",  # the most probable class, given image and label; often `given` itself
    "p_given": "<f4",  # out-of-sample probability of `given`
    "p_suggested": "<f4",  # out-of-sample probability of `suggested`
    "quality": "<f4",  # estimated probability that `given` is right
    "suspect": "|b1",  # quality below 0.5, and another class is suggested
}
_CHUNK = 1 << 22  # samples compared at a time
_AGAIN = "Run python -m nrat_scale.audit again."


@dataclass(frozen=True)
class AuditScores:
    """The scores of every label, by position in the shards; the arrays are read-only memory maps [N]."""

    folder: Path
    key: str  # names the sidecar in messages
    manifest: dict[str, Any]
    sha256: str  # of manifest.json, and with it of all arrays: what a run records
    ids: np.ndarray
    given: np.ndarray
    suggested: np.ndarray
    p_given: np.ndarray
    p_suggested: np.ndarray
    quality: np.ndarray
    suspect: np.ndarray

    def __len__(self) -> int:
        return len(self.given)

    @property
    def noise(self) -> dict[str, Any] | None:
        """The label noise that the audit injected: kind, rate, seed; None for labels as stored."""
        noise = self.manifest["noise"]
        return None if noise is None else dict(noise)

    def check_fits(self, shards: ShardSet, given: np.ndarray | None = None) -> None:
        """Raise `UserError` unless the audit was of these shards, and of these labels.

        Args:
            given: int [N] by position, with the noise of the recipe; None: the labels as stored.
        """
        if self.manifest["fingerprint"] != shards.fingerprint or len(self) != len(shards):
            raise UserError(
                f"The scores {self.folder} ({self.key}) are of other shards than {shards.folder}: an audit of "
                f"{len(self)} images with the fingerprint {printable(self.manifest['fingerprint'])[:16]}, not of {len(shards)} "
                f"with {shards.fingerprint[:16]}. Audit these shards."
            )
        if self.manifest["num_classes"] != shards.num_classes:
            raise _damaged(
                self.folder,
                self.key,
                f"its manifest has {self.manifest['num_classes']} classes, not {shards.num_classes}",
            )
        if given is None and self.noise is None:
            return
        wrong = sum(
            int((_labels(shards, given, chunk) != self.given[chunk]).sum())
            for chunk in (slice(start, start + _CHUNK) for start in range(0, len(self), _CHUNK))
        )
        if wrong:
            audited = "as stored" if self.noise is None else f"with the noise {quoted(self.noise)}"
            here, noise = (
                ("the stored ones", "without --noise")
                if given is None
                else ("those of this recipe", "with the recipe's noise (--noise KIND:RATE:SEED)")
            )
            raise UserError(
                f"The scores {self.folder} ({self.key}) are of other labels: the audit read them {audited}, and {wrong} of "
                f"{len(self)} differ from {here}. Audit {noise}."
            )


def _labels(shards: ShardSet, given: np.ndarray | None, chunk: slice) -> np.ndarray:
    if given is not None:
        return given[chunk]
    return shards.labels(np.arange(chunk.start, min(chunk.stop, len(shards))))


def read_audit_scores(where: str | Path, key: str = "--scores") -> AuditScores:
    """The sidecar in `where`, the folder of an audit or its `scores` folder, with every hash checked.

    Args:
        key: the option or recipe key that names the folder, for messages.

    Raises:
        UserError: there is none, the audit is not complete, an array is damaged or has other values than the format allows.
    """
    folder = Path(where)
    if (folder / FOLDER).is_dir() or (folder / "audit.json").is_file():
        folder = folder / FOLDER
    if not (folder / MANIFEST).is_file():
        begun = folder.is_dir() or (folder.parent.is_dir() and folder.name == FOLDER)
        what = "the audit there is not complete" if begun else "there is no such folder"
        raise UserError(f"{folder} ({key}) has no scores of an audit: {what}. {_AGAIN}")
    manifest = read_json(folder / MANIFEST, "manifest of the scores")
    _check_manifest(manifest, folder, key)
    arrays = {name: _array(folder, name, dtype, manifest, key) for name, dtype in ARRAYS.items()}
    scores = AuditScores(folder, key, manifest, sha256_of(folder / MANIFEST), **arrays)
    _check_values(scores)
    return scores


def _damaged(folder: Path, key: str, why: str) -> UserError:
    return UserError(f"The scores {folder} ({key}) are damaged: {why}. {_AGAIN}")


def _check_manifest(manifest: dict[str, Any], folder: Path, key: str) -> None:
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} ({key}) is not that of an audit's scores (its format is "
            f"{quoted(manifest.get('format'))}). Name the folder that python -m nrat_scale.audit wrote."
        )
    if manifest.get("version") != VERSION:
        raise UserError(
            f"The scores {folder} ({key}) have version {quoted(manifest.get('version'))}; this program reads version {VERSION}. "
            f"Update nrat_scale, or audit again."
        )
    expected = {"num_images": int, "num_classes": int, "class_names": list, "fingerprint": str, "files": dict}
    for name, kind in expected.items():
        if not isinstance(manifest.get(name), kind):
            raise _damaged(folder, key, f"its manifest has no {name}")
    if not isinstance(manifest.setdefault("noise", None), dict | None):
        raise _damaged(folder, key, "its manifest has no noise")
    if manifest["num_images"] < 1 or manifest["num_classes"] != len(manifest["class_names"]):
        raise _damaged(folder, key, "its manifest contradicts itself")


def _array(folder: Path, name: str, dtype: str, manifest: dict[str, Any], key: str) -> np.ndarray:
    """The read-only memory map of one array, whose hash and header are checked."""
    path = folder / f"{name}.npy"
    if mismatch := manifest_mismatch(path, manifest["files"].get(path.name)):
        raise _damaged(folder, key, mismatch)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"it has the version {version}")
            found = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        shape = (manifest["num_images"],)
        if found != (shape, False, np.dtype(dtype)):
            raise ValueError(f"it holds {found[2]} of shape {list(found[0])}, not {np.dtype(dtype)} of {list(shape)}")
        if path.stat().st_size != start + math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError("it is cut off")
        return np.memmap(path, dtype, "r", start, shape)
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(folder, key, f"{path.name}: {first_line(error)}") from error


def _check_values(scores: AuditScores) -> None:
    """Raise `UserError` for labels that are no classes, and for probabilities that are none."""
    for start in range(0, len(scores), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        for name in ("given", "suggested"):
            labels = getattr(scores, name)[chunk]
            if labels.min() < 0 or labels.max() >= scores.manifest["num_classes"]:
                raise _damaged(scores.folder, scores.key, f"{name}.npy names classes that do not exist")
        for name in ("p_given", "p_suggested", "quality"):
            values = getattr(scores, name)[chunk]
            if not ((values >= 0) & (values <= 1)).all():  # also refuses NaN
                raise _damaged(scores.folder, scores.key, f"{name}.npy holds values that are not in [0, 1]")
