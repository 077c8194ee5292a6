"""Per-image outcomes on disk: finished blocks of an evaluation that is under way, and the array file beside results.json.

.results.json.unfinished/<question>/block-00000512.json     one finished block: which of its images survived
results.npz                                                 <label>/<attack>/ids int64 [n], <label>/<attack>/right bool [n]
"""

import hashlib
import importlib.metadata
import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, read_json, write_atomically, write_json
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.autoattack import autoattack_package
from nrat_scale.evaluate.request import Request

Outcome = tuple[np.ndarray, np.ndarray]  # ids int64 [n], right bool [n]


@dataclass(frozen=True)
class FinishedBlock:
    """The outcome of one block: bool [m], the seconds it took, and what AutoAttack complained of."""

    right: np.ndarray
    seconds: float
    warnings: list[str]


class BlockLog:
    """The finished blocks of one question (weights, data, attack, settings), each fsynced as soon as it is known.

    Args:
        results: the results file that the answer will go to; None keeps nothing.
        question: everything that the outcome depends on, as JSON values.
    """

    def __init__(self, results: Path | None, question: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = None if results is None else unfinished_folder(results) / key

    def read(self) -> dict[int, FinishedBlock]:
        """What is finished, by the row that the block starts with."""
        if self._folder is None or not self._folder.is_dir():
            return {}
        return dict(_read_block(path) for path in sorted(self._folder.glob("block-*.json")))

    def write(self, first: int, block: FinishedBlock) -> None:
        """Keep a finished block."""
        if self._folder is not None:
            make_folder(self._folder)
            text = "".join("1" if right else "0" for right in block.right)
            value = {"first": first, "right": text, "seconds": block.seconds, "warnings": block.warnings}
            write_json(self._folder / f"block-{first:08d}.json", value)

    def clear(self) -> None:
        """Forget the blocks: the answer is written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):  # other questions are still open
                self._folder.parent.rmdir()


def unfinished_folder(results: Path) -> Path:
    """Where the finished blocks of what goes to `results` lie."""
    return results.with_name(f".{results.name}.unfinished")


def _read_block(path: Path) -> tuple[int, FinishedBlock]:
    value = read_json(path, "finished block")
    try:
        first, text = int(value["first"]), str(value["right"])
        if set(text) - {"0", "1"}:
            raise ValueError(text)
        right = np.array([letter == "1" for letter in text], bool)
        return first, FinishedBlock(right, float(value["seconds"]), [str(w) for w in value["warnings"]])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The finished block {path} is damaged. Remove it: it will be evaluated again.") from error


def arrays_file(results: Path) -> Path:
    """The array file that belongs to `results`."""
    return results.with_suffix(".npz")


def digest(outcome: Outcome) -> str:
    """Hex SHA-256 of an outcome: what results.json says of the arrays."""
    ids, right = outcome
    return hashlib.sha256(ids.astype("<i8").tobytes() + np.packbits(right).tobytes()).hexdigest()


def write_arrays(results: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write the outcomes, by `<label>/<attack>`, beside `results`."""
    arrays: dict[str, np.ndarray] = {}
    for name, (ids, right) in sorted(outcomes.items()):
        arrays |= {f"{name}/ids": ids.astype(np.int64), f"{name}/right": right.astype(bool)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(arrays_file(results), buffer.getvalue())


def read_arrays(results: Path) -> dict[str, Outcome]:
    """The outcomes beside `results`, by `<label>/<attack>`; none where there is no such file.

    Raises:
        UserError: it is damaged.
    """
    path = arrays_file(results)
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"The per-image outcomes {path} are damaged. Move the file away, and its results with it."
        ) from error
    names = {name.removesuffix("/ids") for name in arrays if name.endswith("/ids")}
    return {name: (arrays[f"{name}/ids"], arrays[f"{name}/right"]) for name in names if f"{name}/right" in arrays}


_HEADER = ("data", "threat", "versions")


# ---- results that are there already ---------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    package = autoattack_package()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", package)}
    return {"nrat_scale": nrat_scale.__version__, **versions}


def results_header(shards: ShardSet, plan: Request) -> dict[str, Any]:
    threat = plan.threat
    return {
        "format": "nrat_scale.results",
        "version": 1,
        "data": {
            "folder": Path(shards.folder).name,
            "fingerprint": shards.fingerprint,
            "dataset": shards.dataset,
            "num_images": len(shards),
        },
        "threat": {"norm": threat.norm, "eps": threat.eps, "step": threat.step, "space": threat.space},
        "versions": _versions(),
        "checkpoints": {},
    }


def earlier_results(out: Path | None, header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The records and outcomes in `out`; only those whose arrays are what results.json says of them."""
    if out is None or not out.is_file():
        return {}, {}
    results, arrays = read_json(out, "results"), read_arrays(out)
    if results.get("format") != header["format"]:
        raise UserError(f"{out} is there already and holds no results of ours. Choose another --out.")
    for key in _HEADER:
        if results.get(key) != header[key]:
            raise UserError(
                f"{out} holds results with other {key}: {_shown(results.get(key))}, now {_shown(header[key])}. "
                "They are not mixed and nothing is overwritten: give another --out, or move that file away."
            )
    checkpoints = {}
    for label, record in results.get("checkpoints", {}).items():
        names = {name: arrays.get(f"{label}/{name}") for name in record.get("attacks", {})}
        attacks = {
            name: record["attacks"][name]
            for name, outcome in names.items()
            if outcome is not None and digest(outcome) == record["attacks"][name].get("outcome_sha256")
        }
        checkpoints[label] = {**record, "attacks": attacks}
    known = {f"{label}/{name}" for label, record in checkpoints.items() for name in record["attacks"]}
    return checkpoints, {name: outcome for name, outcome in arrays.items() if name in known}


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {str(item)[:16]}" for key, item in value.items())


def is_answered(entry: dict[str, Any] | None, settings: dict[str, Any], key: str) -> bool:
    """Whether `entry` answers the question; only one of fewer images may be replaced by one of more."""
    if entry is None:
        return False
    differ = [name for name in {*settings, *_SETTINGS} if entry.get(name) != settings.get(name)]
    if not differ:
        return True
    if differ == ["n"] and entry["n"] < settings["n"]:
        return False
    what = ", ".join(f"{name} {entry.get(name)} (asked: {settings.get(name)})" for name in sorted(differ))
    raise UserError(
        f"The results hold {key} with other settings: {what}. A measured number is not replaced: give another --out."
    )


_SETTINGS = ("n", "seed", "batch_size", "eps", "norm", "step", "steps", "restarts", "components", "source",
             "without_images_broken_by")  # fmt: skip
