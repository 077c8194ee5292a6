"""Evaluate every target under every attack, over all processes; a killed evaluation resumes.

The images are split into fixed blocks of `batch_size` in the order of their ids. Under `accelerate launch` each process
evaluates whole blocks. Each finished block is written to disk, and the same command resumes with the next one.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from nrat_scale.attacks import ThreatSpec
from nrat_scale.core.distributed import join_processes, known_to_all, on_main
from nrat_scale.core.errors import UserError, warn
from nrat_scale.core.files import write_json
from nrat_scale.core.locks import locked
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate import results
from nrat_scale.evaluate.attacks import Attack, for_classes, needs_gradient
from nrat_scale.evaluate.autoattack import AutoAttackLog
from nrat_scale.evaluate.differentiable import check_differentiable
from nrat_scale.evaluate.gallery import (
    NUM_IMAGES,
    gallery_attack,
    gallery_key,
    make_gallery,
    read_galleries,
    write_gallery,
)
from nrat_scale.evaluate.graphed_model import GraphedModel
from nrat_scale.evaluate.key import machine_facts
from nrat_scale.evaluate.measures import (
    Images,
    OutOfMemory,
    block_outcome,
    count_classes,
    memory_errors,
    read_images,
)
from nrat_scale.evaluate.package_warnings import merge_warnings
from nrat_scale.evaluate.request import Request
from nrat_scale.evaluate.sanity import (
    ModelCheck,
    contradictions,
    doubtful_normalisation,
    inspect_model,
    short_reaches,
    square_warning,
)
from nrat_scale.evaluate.statistics import accuracy_record, worst_case
from nrat_scale.evaluate.targets import Target

_CHECKED_IMAGES = 64  # for `inspect_model`


def evaluate(
    targets: Sequence[Target], shards: ShardSet, request: Request, out: Path, *, replace_models: bool = False
) -> dict[str, Any]:
    """Measure every target as requested, over all processes; returns the content of results.json.

    Results and per-image outcomes are written to `out` after each attack. Entries of `out` with the same `EvaluationKey` are
    not measured again. Several evaluations may write to `out` at the same time.

    Args:
        targets: on the device to use, the same in every process.
        replace_models: results of another model under the label of a target (a run's best checkpoint has changed, or an
            earlier version measured it) are copied to a file beside `out` and measured again, instead of refused.

    Raises:
        UserError: `out` holds results that must not be mixed with these or replaced, or a model cannot be measured.
    """
    evaluation = _Evaluation(targets, shards, request, out, replace_models)
    measured: dict[str, _Measured] = {}  # by model: best and last may be the same
    for target in targets:
        if target.key.digest not in measured:
            measured[target.key.digest] = evaluation.start(target)
        evaluation.measure(target, measured[target.key.digest])
    return evaluation.results


@contextmanager
def _own_errors() -> Iterator[None]:
    """Print an error that only this process meets; `run_cli` prints those of local rank 0 alone."""
    try:
        yield
    except (UserError, FloatingPointError) as error:
        if (rank := os.environ.get("LOCAL_RANK", "0")) != "0":
            print(f"error (process {rank}): {error}", file=sys.stderr, flush=True)
        raise


@dataclass
class _Measured:
    """The results of one model: facts, and per attack its entry of results.json and its outcome."""

    facts: dict[str, Any]
    num_classes: int  # of the attacked model
    # By section and name, such as `pgd20` in `attacks`.
    sections: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=lambda: {name: {} for name in results.SECTIONS}
    )
    outcomes: dict[str, results.Outcome] = field(default_factory=dict)
    predictions: dict[str, results.Predictions] = field(default_factory=dict)  # of what this evaluation measured


@dataclass(frozen=True)
class _Job:
    """One attack to measure."""

    section: str  # of the record, from `results.SECTIONS`
    name: str  # of its entry
    attack: Attack
    request: Request  # with the threat and the number of images of this attack
    dropped: tuple[str, ...] = ()  # earlier attacks; the images that they broke are not attacked
    facts: dict[str, Any] = field(default_factory=dict)  # more fields of the entry


class _Evaluation:
    """One evaluation, in each of its processes; `results` and `arrays` are the content of both files so far."""

    def __init__(
        self, targets: Sequence[Target], shards: ShardSet, request: Request, out: Path, replace_models: bool
    ) -> None:
        self.shards, self.request, self.out, self.state = shards, request, out, join_processes()
        self.results = results.new_results(shards, request.threat)
        self.arrays: dict[str, results.Outcome]
        earlier = known_to_all(self.state, lambda: self._earlier(targets, replace_models))
        self.results["checkpoints"], self.arrays = earlier

    def _earlier(self, targets: Sequence[Target], replace_models: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of `out` before this evaluation, on the main process."""
        if not self.out.is_file():
            return {}, {}
        with locked(self.out):
            checkpoints, arrays = results.earlier_results(self.out, self.results)
            unlike = {target.label: self._unlike(checkpoints, target) for target in targets}
            replaced = {label: words for label, words in unlike.items() if words is not None}
            if not replaced:
                return checkpoints, arrays
            label, words = next(iter(replaced.items()))
            if not replace_models:
                raise UserError(f"{self.out} holds another {label}: {words}. Give another --out, or move that file.")
            copy = results.keep_apart(self.out)
            warn(f"{self.out} holds another {label}: {words}. Its results are kept in {copy} and measured again.")
            checkpoints = {label: record for label, record in checkpoints.items() if label not in replaced}
            arrays = {name: outcome for name, outcome in arrays.items() if name.partition("/")[0] not in replaced}
            self._write_files(checkpoints, arrays, {})
        return checkpoints, arrays

    @staticmethod
    def _unlike(checkpoints: dict[str, Any], target: Target) -> str | None:
        record = checkpoints.get(target.label)
        return None if record is None else results.unlike(record, target.key)

    def start(self, target: Target) -> _Measured:
        """Check the model, and collect earlier results of the same model."""
        check = self._check(target)
        attacked = target if self.request.source is None else self.request.source
        num_classes = count_classes(attacked.model, read_images(self.shards, 1))
        facts = {**target.identity, **asdict(target.key), "flags": check.flags, "checks": check.numbers}
        measured, stored = _Measured(facts, num_classes), results.read_predictions(self.out)
        for label, record in self.results["checkpoints"].items():
            if results.unlike(record, target.key) is None:
                for name in results.SECTIONS:
                    measured.sections[name] |= record.get(name, {})
                names = results.measured_entries(record)
                measured.outcomes |= {name: self.arrays[f"{label}/{name}"] for name in names}
                measured.predictions |= {
                    name: stored[f"{label}/{name}"] for name in names if f"{label}/{name}" in stored
                }
        return measured

    def _check(self, target: Target) -> ModelCheck:
        """`inspect_model`, on fewer images if these do not fit into memory but a block may."""
        size, block, source = _CHECKED_IMAGES, self.request.batch_size, self.request.source
        attacks = [*self.request.attacks, *(point.attack for point in self.request.points)]
        follows_gradient = any(map(needs_gradient, attacks))
        attacked = any(attack.kind != "natural" for attack in attacks)
        options = {"follows_gradient": follows_gradient and source is None, "attacked": attacked}
        while True:
            try:
                with memory_errors(f"The check of {target.label}", block):
                    images = read_images(self.shards, size)
                    if source is not None and follows_gradient:
                        check_differentiable(source.model, images, source.label)
                    return inspect_model(target.model, images, self.request.threat, target.label, **options)
            except OutOfMemory:
                if size <= block:
                    raise
                size = block
                warn(f"The check of {target.label} sees {size} images: {_CHECKED_IMAGES} do not fit into memory.")

    def measure(self, target: Target, measured: _Measured) -> None:
        """Run the attacks and the points of curves that have no result yet, then add the gallery."""
        request, before, broken = self.request, list[str](), set[int]()  # earlier attacks, ids of the images they broke
        for requested in request.attacks:
            attack, left_out = for_classes(requested, measured.num_classes)
            key = request.key(attack)
            dropped = before if request.drops_broken(attack) else []
            facts = {"left_out": left_out} if left_out else {}
            self._measure(target, measured, _Job("attacks", key, attack, request, tuple(dropped), facts), broken)
            ids, right = measured.outcomes[key]
            broken.update(ids[~right].tolist())
            before.append(key)
        for point in request.points:
            job = _Job("curves", point.name, point.attack, request.of_point(point))
            self._measure(target, measured, job, set())
        self._write(target, measured)
        self._add_gallery(target)

    def _measure(self, target: Target, measured: _Measured, job: "_Job", broken: set[int]) -> None:
        """Run one attack, unless its result is there."""
        request, attack = job.request, job.attack
        images = read_images(self.shards, request.count(attack, len(self.shards)), request.seed)
        skipped = np.isin(images.ids, list(broken) if job.dropped else [])
        record = request.evaluation_key(attack, target, self.shards, images, list(job.dropped), skipped)
        section = measured.sections[job.section]
        if results.is_measured(section.get(job.name), record, job.name):
            return
        log = results.BlockLog(self.out, record.digest)
        blocks = self._run_blocks(job, target, images, skipped, log)
        outcome = images.ids, np.concatenate([block.right for block in blocks])
        assert len(outcome[1]) == len(images)
        predicted = [block.predicted for block in blocks if block.predicted is not None]
        broken_by = _broken_by(attack, blocks)
        square = None if request.source is not None else square_warning(broken_by, len(images))
        measured.outcomes[job.name] = outcome
        if known := len(predicted) == len(blocks):
            measured.predictions[job.name] = images.labels.numpy(), np.concatenate(predicted)
        section[job.name] = {
            **accuracy_record(outcome[1]),
            **record.record(),
            **machine_facts(next(target.model.parameters()).device, self.state.num_processes),
            "seconds": round(sum(block.seconds for block in blocks), 2),
            "warnings": merge_warnings([*(block.warnings for block in blocks), [square] if square else []]),
            **({"broken_by": broken_by} if broken_by else {}),
            **({"predictions": results.PREDICTIONS_VERSION} if known else {}),
            **job.facts,
            "outcome_sha256": results.outcome_digest(outcome),
        }
        self._write(target, measured)
        on_main(self.state, log.clear)

    def _add_gallery(self, target: Target) -> None:
        """Attack a few images for the report, on the main process, unless that was done before."""
        request, attack = self.request, gallery_attack(self.request.attacks)
        if attack is None or request.source is not None:
            return

        def add() -> None:
            images = read_images(self.shards, min(NUM_IMAGES, len(self.shards)), request.seed)
            given = attack, images, request.threat, request.seed
            found = read_galleries(self.out).get(target.label)
            if found is not None and found.key == gallery_key(target.key.weights_sha256, *given):
                return
            with memory_errors(f"The gallery of {target.label}", len(images)):
                write_gallery(self.out, target.label, make_gallery(target.model, target.key.weights_sha256, *given))

        on_main(self.state, add)

    def _run_blocks(
        self, job: "_Job", target: Target, images: Images, skipped: np.ndarray, log: results.BlockLog
    ) -> list[results.FinishedBlock]:
        """All blocks of one attack, in order; finished ones are read, the others are distributed over the processes."""
        request, attack, state = job.request, job.attack, self.state
        source = None if request.source is None else request.source.model
        model = target.model
        if request.graphs:
            model, source = GraphedModel(model), None if source is None else GraphedModel(source)
        done: dict[int, results.FinishedBlock] = known_to_all(state, log.read)
        wanted = {int(rows[0]): rows for rows in images.blocks(request.batch_size)}
        missing = [first for first in wanted if first not in done]
        mine: dict[int, results.FinishedBlock] = {}
        counts = {"total": len(images), "initial": sum(len(wanted[first]) for first in done), "unit": "img"}
        title = f"{target.label} {job.name}"
        with tqdm(desc=title, disable=not state.is_main_process, leave=False, **counts) as bar:
            for first in missing[state.process_index :: state.num_processes]:
                rows, began = wanted[first], time.perf_counter()
                given = images.take(rows), request.threat
                options = {"seed": request.seed, "source": source, "broken": skipped[rows]}
                log_shown, classes = AutoAttackLog(bar.set_postfix_str), np.zeros(len(rows), np.int32)
                with _own_errors(), memory_errors(title, request.batch_size):
                    right = block_outcome(attack, model, *given, **options, log=log_shown, predicted=classes)
                seconds = time.perf_counter() - began
                mine[first] = results.FinishedBlock(right, seconds, log_shown.warnings, log_shown.broken_by, classes)
                log.write(first, mine[first])
                bar.update(len(rows) * state.num_processes)
        for part in gather_object([mine]):
            assert not done.keys() & part.keys(), "a block was evaluated twice"
            done |= part
        return [done[first] for first in wanted]

    def _write(self, target: Target, measured: _Measured) -> None:
        """Merge what is measured into both files, and learn what other evaluations have written there meanwhile."""
        label = target.label

        def write() -> tuple[dict[str, Any], dict[str, results.Outcome]]:
            with locked(self.out):
                checkpoints, arrays = results.earlier_results(self.out, self.results)
                if (words := self._unlike(checkpoints, target)) is not None:
                    raise UserError(f"{self.out} got another {label} meanwhile: {words}. Give another --out.")
                stored = checkpoints.get(label, {})
                sections = {
                    name: results.merged_entries(stored.get(name, {}), ours, self.out)
                    for name, ours in measured.sections.items()
                }
                known = results.measured_entries(stored)
                outcomes = {
                    name: arrays[f"{label}/{name}"] if entry is known.get(name) else measured.outcomes[name]
                    for name, entry in results.measured_entries(sections).items()
                }
                checkpoints[label] = _record(measured.facts, sections, outcomes, self.request.threat)
                arrays |= {f"{label}/{name}": outcome for name, outcome in outcomes.items()}
                self._write_files(checkpoints, arrays, {f"{label}/{k}": v for k, v in measured.predictions.items()})
            return checkpoints, arrays

        self.results["checkpoints"], self.arrays = known_to_all(self.state, write)
        record = self.results["checkpoints"][label]
        measured.sections = {name: dict(record.get(name, {})) for name in results.SECTIONS}
        names = results.measured_entries(record)
        measured.outcomes = {name: self.arrays[f"{label}/{name}"] for name in names}

    def _write_files(
        self,
        checkpoints: dict[str, Any],
        arrays: dict[str, results.Outcome],
        predictions: dict[str, results.Predictions],
    ) -> None:
        # The arrays first, so that results.json never names missing ones.
        results.write_arrays(self.out, arrays, {**results.read_predictions(self.out), **predictions})
        write_json(self.out, {**self.results, "checkpoints": checkpoints})


def _record(
    facts: dict[str, Any],
    sections: dict[str, dict[str, dict[str, Any]]],
    outcomes: dict[str, results.Outcome],
    threat: ThreatSpec,
) -> dict[str, Any]:
    """The record of one checkpoint in results.json; points of curves take no part in the worst case and in comparisons."""
    entries = sections["attacks"]
    outcomes = {name: outcomes[name] for name in entries}
    alone = {name: outcome for name, outcome in outcomes.items() if "without_images_broken_by" not in entries[name]}
    warned = [f"AutoAttack ({name}): {text}" for name, entry in entries.items() for text in entry["warnings"]]
    return {
        **facts,
        "flags": [
            *facts["flags"],
            *doubtful_normalisation(facts, entries),
            *short_reaches(entries, threat),
            *contradictions(alone),
            *warned,
        ],
        "worst": worst_case(outcomes),
        "attacks": entries,
        **({"curves": sections["curves"]} if sections["curves"] else {}),
    }


def _broken_by(attack: Attack, blocks: Sequence[results.FinishedBlock]) -> dict[str, int]:
    """Component of AutoAttack -> number of images that it was the first to break; empty for other attacks."""
    numbers = [block.broken_by for block in blocks if block.broken_by is not None]  # None: nothing left to attack
    return {name: sum(int((found == i).sum()) for found in numbers) for i, name in enumerate(attack.components)}
