"""Results on disk: results.json, the per-image outcomes beside it, and the finished blocks of an evaluation in progress.

results.json                                            see docs/evaluation.md
results.npz                                             <label>/<attack>/ids int64 [n], .../right bool [n], and if the
                                                        entry has `predictions`: .../labels and .../predicted int32 [n]
.results.json.unfinished/<key>/block-00000512.json      one finished block: which of its images survived
results.earlier-<8 hex>.json, .npz                      a copy of both, made when a run's checkpoint has changed

Several evaluations may share a results file. Each reads, merges and writes it under its lock (`locked`), never a stale copy.
"""

import hashlib
import io
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import nrat_scale
from nrat_scale.attacks import ThreatSpec, threat_text
from nrat_scale.core.errors import UserError, printable, warn
from nrat_scale.core.files import make_folder, read_json, unfinished_sibling, write_atomically, write_json
from nrat_scale.core.locks import locked
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.autoattack import autoattack_package, autoattack_version
from nrat_scale.evaluate.key import KEY_FIELDS, MODEL_FIELDS, EvaluationKey, ModelKey, difference, value_text

FORMAT = "nrat_scale.results"
SECTIONS = (
    "attacks",
    "curves",
)  # of a checkpoint's record; the points of curves are named such as `eps=8/255`, `steps=20`
Outcome = tuple[np.ndarray, np.ndarray]  # ids int64 [n], right bool [n]
Predictions = tuple[
    np.ndarray, np.ndarray
]  # labels int32 [n], predicted int32 [n], -1 for images that were not attacked
PREDICTIONS_VERSION = 1  # field `predictions` of an entry; raise it if the meaning of the arrays changes


@dataclass(frozen=True)
class FinishedBlock:
    """The outcome of one block."""

    right: np.ndarray  # bool [m]
    seconds: float
    warnings: list[str]  # of AutoAttack
    broken_by: np.ndarray | None = None  # int8 [m]: number of AutoAttack's component that broke each image, -1 for none
    predicted: np.ndarray | None = None  # int32 [m]; None in blocks of earlier versions


class BlockLog:
    """Finished blocks beside a results file; a killed evaluation resumes after them.

    Args:
        key: `EvaluationKey.digest`. Evaluations of the same key at the same time share the blocks.
    """

    def __init__(self, results: Path, key: str) -> None:
        self._results, self._folder = results, unfinished_sibling(results) / key

    def read(self) -> dict[int, FinishedBlock]:
        """The finished blocks by the number of their first image."""
        with locked(self._results):
            values = {path: read_json(path, "finished block") for path in sorted(self._folder.glob("block-*.json"))}
        blocks = {}
        for path, value in values.items():
            try:
                right = np.array(["01".index(letter) for letter in value["right"]], bool)
                seconds, warnings = float(value["seconds"]), list(map(str, value["warnings"]))
                components = value.get("broken_by")  # none in blocks of other attacks
                broken_by = None if components is None else np.array(components, np.int8)
                predicted = None if value.get("predicted") is None else np.array(value["predicted"], np.int32)
                blocks[int(value["first"])] = FinishedBlock(right, seconds, warnings, broken_by, predicted)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"The finished block {path} is damaged. Remove it to evaluate it again.") from error
        return blocks

    def write(self, first: int, block: FinishedBlock) -> None:
        """Write and fsync a finished block."""
        text = "".join("01"[int(right)] for right in block.right)
        value = {"first": first, "right": text, "seconds": block.seconds, "warnings": block.warnings}
        value |= {} if block.broken_by is None else {"broken_by": block.broken_by.tolist()}
        value |= {} if block.predicted is None else {"predicted": block.predicted.tolist()}
        with locked(self._results):  # another evaluation may be removing the folder
            make_folder(self._folder)
            write_json(self._folder / f"block-{first:08d}.json", value)

    def clear(self) -> None:
        """Remove the blocks, once the results file holds the whole attack."""
        with locked(self._results):
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):  # not empty: blocks of another key
                self._folder.parent.rmdir()


def outcome_digest(outcome: Outcome) -> str:
    """Hex SHA-256 of an outcome, which results.json records to identify the arrays."""
    ids, right = outcome
    return hashlib.sha256(ids.astype("<i8").tobytes() + np.packbits(right).tobytes()).hexdigest()


def fits(outcome: Outcome, predictions: Predictions) -> bool:
    """Whether predictions are those of an outcome: right where the predicted class is the label, and nowhere else."""
    labels, predicted = predictions
    return len(labels) == len(predicted) == len(outcome[1]) and np.array_equal(labels == predicted, outcome[1])


def write_arrays(
    results: Path, outcomes: Mapping[str, Outcome], predictions: Mapping[str, Predictions] | None = None
) -> None:
    """Write the outcomes, and the predictions that fit them, keyed by `<label>/<attack>`, beside `results`."""
    arrays: dict[str, np.ndarray] = {}
    for name, (ids, right) in sorted(outcomes.items()):
        arrays |= {f"{name}/ids": ids.astype(np.int64), f"{name}/right": right.astype(bool)}
        found = (predictions or {}).get(name)
        if found is not None and fits((ids, right), found):
            arrays |= {f"{name}/labels": found[0].astype(np.int32), f"{name}/predicted": found[1].astype(np.int32)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(results.with_suffix(".npz"), buffer.getvalue())


def read_arrays(results: Path) -> dict[str, Outcome]:
    """The outcomes beside `results`, keyed by `<label>/<attack>`; empty if there is no file, `UserError` if damaged."""
    return _pairs(_load(results), "ids", "right")


def read_predictions(results: Path) -> dict[str, Predictions]:
    """The predictions beside `results`, keyed by `<label>/<attack>`, as far as they were stored and fit the outcomes."""
    arrays = _load(results)
    outcomes = _pairs(arrays, "ids", "right")
    found = _pairs(arrays, "labels", "predicted")
    return {name: pair for name, pair in found.items() if name in outcomes and fits(outcomes[name], pair)}


def _pairs(arrays: Mapping[str, np.ndarray], one: str, other: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = {name.removesuffix(f"/{one}") for name in arrays if name.endswith(f"/{one}")}
    return {name: (arrays[f"{name}/{one}"], arrays[f"{name}/{other}"]) for name in names if f"{name}/{other}" in arrays}


def _load(results: Path) -> dict[str, np.ndarray]:
    path = results.with_suffix(".npz")
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"The per-image outcomes {path} are damaged. Move them and {results.name} away.") from error


def package_versions() -> dict[str, str]:
    """The packages that an outcome depends on, by name."""
    installed = {name: version(name) for name in ("torch", "timm")}
    return {"nrat_scale": nrat_scale.__version__, **installed, autoattack_package(): autoattack_version()}


def new_results(shards: ShardSet, threat: ThreatSpec) -> dict[str, Any]:
    """The content of results.json before the first measurement."""
    facts = {"fingerprint": shards.fingerprint, "dataset": shards.dataset, "num_images": len(shards)}
    return {
        "format": FORMAT,
        "version": 1,
        "data": {"folder": Path(shards.folder).name, **facts},
        "threat": {"norm": threat.norm, "eps": threat.eps, "step": threat.step, "space": threat.space},
        "versions": package_versions(),
        "checkpoints": {},
    }


def earlier_results(out: Path, new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The checkpoints and outcomes in `out`; an entry whose arrays are missing or do not match is dropped.

    Args:
        new: `new_results`; data, threat and versions must be equal.
    """
    if not out.is_file():
        return {}, {}
    results, arrays = read_json(out, "results"), read_arrays(out)
    if results.get("format") != FORMAT:
        raise UserError(f"{out} exists and is not a results file. Choose another --out.")
    for key in ("data", "threat", "versions"):
        if changes := _changes(results.get(key, {}), new[key]):
            words = ", ".join(changes.values())
            raise UserError(f"{out} holds results with other {key}: {words}. Give another --out, or move that file.")
    checkpoints, outcomes = dict[str, Any](), dict[str, Outcome]()
    for label, record in results.get("checkpoints", {}).items():
        checkpoints[label] = {**record, "attacks": {}, **({"curves": {}} if "curves" in record else {})}
        for section in SECTIONS:
            for name, entry in record.get(section, {}).items():
                outcome = arrays.get(f"{label}/{name}")
                if outcome is None or not isinstance(entry, dict) or entry.get("n") != len(outcome[0]):
                    continue
                if outcome_digest(outcome) == entry.get("outcome_sha256"):
                    checkpoints[label][section][name] = entry
                    outcomes[f"{label}/{name}"] = outcome
    return checkpoints, outcomes


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Name -> both values, in words, for each entry that differs."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return {name: f"{name} {old.get(name)} (requested: {new.get(name)})" for name in names}


def measured_entries(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All entries of a checkpoint's record: its attacks, and the points of its curves."""
    return {name: entry for section in SECTIONS for name, entry in record.get(section, {}).items()}


def unlike(record: dict[str, Any], model: ModelKey) -> str | None:
    """Why the results of a checkpoint are not those of `model`, in words; None if they are."""
    for name, entry in measured_entries(record).items():
        if "key" not in entry:
            return f"{name} was measured by an earlier version, which did not record the whole model"
        if words := difference(entry, asdict(model), MODEL_FIELDS):
            return words
    return None


def keep_apart(out: Path) -> Path:
    """Copy `out` and its arrays to `results.earlier-<8 hex>`, whose name follows from the content; returns the copy of `out`."""
    content = out.read_bytes()
    copy = out.with_name(f"{out.stem}.earlier-{hashlib.sha256(content).hexdigest()[:8]}.json")
    if out.with_suffix(".npz").is_file():
        write_atomically(copy.with_suffix(".npz"), out.with_suffix(".npz").read_bytes())
    write_atomically(copy, content)
    return copy


_SLICE = ("n", "skipped_sha256")  # fields that change when an attack is measured again on more images


def is_more(new: dict[str, Any], old: dict[str, Any], name: str) -> bool:
    """Whether `new` (an entry, or the record of a key) is `old` over more images, and may replace it.

    Raises:
        UserError: they differ in anything else: a measured number is never replaced.
    """
    fields = [field for field in KEY_FIELDS if new["n"] == old.get("n") or field not in _SLICE]
    if words := difference(old, new, fields):
        raise UserError(f"The results hold {name} with {words}. Give another --out; no number is replaced.")
    return bool(new["n"] > old["n"])


def is_measured(entry: dict[str, Any] | None, key: EvaluationKey, name: str) -> bool:
    """Whether `entry` has this key; an entry over fewer images may be replaced. Raises as `is_more`, and for more images."""
    if entry is None or is_more(key.record(), entry, name):
        return False
    if words := difference(entry, key.record(), KEY_FIELDS):
        raise UserError(f"The results hold {name} with {words}. Give another --out; no number is replaced.")
    return True


def merged_entries(
    stored: Mapping[str, dict[str, Any]], ours: Mapping[str, dict[str, Any]], out: Path
) -> dict[str, dict[str, Any]]:
    """The entries that another evaluation has written meanwhile, and ours. For one key the stored entry is kept.

    Raises:
        UserError: an attack was measured with other settings meanwhile.
    """
    entries = dict(stored)
    for name, entry in ours.items():
        if name not in stored or is_more(entry, stored[name], name):
            entries[name] = entry
        elif entry["key"] == stored[name]["key"] and entry["outcome_sha256"] != stored[name]["outcome_sha256"]:
            warn(f"{out} has other outcomes of {name} for the same key: this device does not compute the same twice.")
    return entries


def left_out_notes(attacks: Mapping[str, Any]) -> list[str]:
    """A sentence for each attack without the parts of AutoAttack that the number of classes does not define.

    Args:
        attacks: attack -> its entry in results.json.
    """
    left_out = {name: entry.get("left_out") for name, entry in attacks.items() if isinstance(entry, dict)}
    return [
        f"{name} is not the standard version of AutoAttack: {'; '.join(map(str, reasons))}."
        for name, reasons in left_out.items()
        if reasons and isinstance(reasons, list)
    ]


def results_text(results: dict[str, Any], labels: list[str]) -> str:
    """The accuracies and flags of these checkpoints, for a terminal."""
    threat = results["threat"]
    lines = [
        f"{results['data']['dataset']}, {threat_text(threat['norm'], threat['eps'], threat.get('space', 'pixel'))}, 95 % Wilson intervals"
    ]
    for label in labels:
        record = results["checkpoints"][label]
        worst = record["worst"] or {}
        apart = worst.get("on_common")  # other numbers than those of the attacks' own images
        beside = {"worst case": worst} if worst and not apart else {}
        lines += [_accuracy_line(label, *item) for item in {**record["attacks"], **beside}.items()]
        if apart:
            lines.append(f"  {label:8s} on the {worst['n']} images that all attacks saw:")
            lines += [_accuracy_line(label, f"  {name}", e) for name, e in {**apart, "worst case": worst}.items()]
        lines += [_accuracy_line(label, *item) for item in record.get("curves", {}).items()]
        lines += [f"  {label:8s} NOTE: {note}" for note in left_out_notes(record["attacks"])]
        lines += [f"  {label:8s} FLAG: {flag}" for flag in record["flags"]]
        lines += [f"  {label:8s} {text}" for text in _key_lines(record["attacks"])]
    return "\n".join(lines)


def _accuracy_line(label: str, name: str, entry: Mapping[str, Any]) -> str:
    accuracy, low, high = (100 * entry[key] for key in ("accuracy", "low", "high"))
    return f"  {label:8s} {name:12s} {accuracy:6.2f} %  [{low:.1f}, {high:.1f}]  n = {entry['n']}"


def _key_lines(attacks: Mapping[str, dict[str, Any]]) -> list[str]:
    """The keys of a checkpoint's results for a terminal: what all attacks share, then what is each one's own."""
    shown = [name for name in KEY_FIELDS if name not in ("n", "norm", "eps", "attack")]  # those are printed above
    keyed = {attack: {name: entry[name] for name in shown if name in entry} for attack, entry in attacks.items()}
    shared = dict(next(iter(keyed.values()), {}))
    for fields in keyed.values():
        shared = {name: value for name, value in shared.items() if fields.get(name) == value}
    lines = [f"keys: {_fields_text(shared)}"]
    for attack, fields in keyed.items():
        own = {name: value for name, value in fields.items() if name not in shared}
        lines.append(f"key of {attack}: {_fields_text({'': attacks[attack].get('key', 'unknown'), **own}).strip()}")
    return lines


def _fields_text(fields: Mapping[str, Any]) -> str:
    return printable(", ".join(f"{name} {value_text(value)}" for name, value in fields.items()))
