"""Evaluate every target under every attack, over all processes; a killed evaluation resumes.

The images are split into fixed blocks of `batch_size` in the order of their ids. Under `accelerate launch` each process
evaluates whole blocks. Each finished block is written to disk, and the same command resumes with the next one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from nrat_scale.core.distributed import join_processes, known_to_all, on_main
from nrat_scale.core.files import make_folder, write_json
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate import results
from nrat_scale.evaluate.attacks import Attack
from nrat_scale.evaluate.autoattack import autoattack_log
from nrat_scale.evaluate.measures import Images, block_outcome, read_images
from nrat_scale.evaluate.request import Request
from nrat_scale.evaluate.sanity import contradictions, inspect_model
from nrat_scale.evaluate.statistics import accuracy_record, worst_case
from nrat_scale.evaluate.targets import Target

_CHECKED_IMAGES = 64  # for `inspect_model`


def evaluate(targets: Sequence[Target], shards: ShardSet, request: Request, out: Path) -> dict[str, Any]:
    """Measure every target as requested, over all processes; returns the content of results.json.

    Results and per-image outcomes are written to `out` after each attack. Entries of `out` for the same weights, data and
    settings are not measured again.

    Args:
        targets: on the device to use, the same in every process.

    Raises:
        UserError: `out` holds results that must not be mixed with these or replaced, or a model cannot be measured.
    """
    evaluation = _Evaluation(shards, request, out)
    measured: dict[str, _Measured] = {}  # by sha256: best and last may be the same weights
    for target in targets:
        sha256 = target.identity["sha256"]
        if sha256 not in measured:
            measured[sha256] = evaluation.start(target)
        evaluation.measure(target, measured[sha256])
    return evaluation.results


@dataclass
class _Measured:
    """The results of one set of weights: facts, and per attack its entry of results.json and its outcome."""

    facts: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, results.Outcome] = field(default_factory=dict)


class _Evaluation:
    """One evaluation, in each of its processes; `results` and `arrays` are the content of both files so far."""

    def __init__(self, shards: ShardSet, request: Request, out: Path) -> None:
        self.shards, self.request, self.out, self.state = shards, request, out, join_processes()
        self.results = results.new_results(shards, request.threat)
        self.arrays: dict[str, results.Outcome]
        earlier = known_to_all(self.state, lambda: results.earlier_results(out, self.results))
        self.results["checkpoints"], self.arrays = earlier

    def start(self, target: Target) -> _Measured:
        """Check the model, and collect earlier results of the same weights."""
        images = read_images(self.shards, _CHECKED_IMAGES)
        check = inspect_model(target.model, images, self.request.threat, target.label)
        measured = _Measured({**target.identity, "flags": check.flags, "checks": check.numbers})
        for label, record in self.results["checkpoints"].items():
            if record.get("sha256") == target.identity["sha256"]:
                measured.entries |= record["attacks"]
                measured.outcomes |= {name: self.arrays[f"{label}/{name}"] for name in record["attacks"]}
        return measured

    def measure(self, target: Target, measured: _Measured) -> None:
        """Run the attacks that have no result yet."""
        request, before, broken = self.request, list[str](), set[int]()  # earlier attacks, ids of the images they broke
        for attack in request.attacks:
            key = request.key(attack)
            images = read_images(self.shards, request.count(attack, len(self.shards)), request.seed)
            dropped = list(before) if request.drops_broken(attack) else []
            settings = request.settings(attack, len(images), dropped)
            if not results.is_measured(measured.entries.get(key), settings, key):
                weights = {"weights": target.identity["sha256"], "data": self.shards.fingerprint}
                threat = {"space": request.threat.space, "versions": self.results["versions"]}
                log = results.BlockLog(self.out, {**settings, "attack": attack.name, **weights, **threat})
                skipped = np.isin(images.ids, list(broken) if dropped else [])
                blocks = self._run_blocks(attack, target, images, skipped, log)
                outcome = images.ids, np.concatenate([block.right for block in blocks])
                assert len(outcome[1]) == len(images)
                measured.outcomes[key] = outcome
                measured.entries[key] = {
                    **accuracy_record(outcome[1]),
                    **settings,
                    "seconds": round(sum(block.seconds for block in blocks), 2),
                    "warnings": sorted({warning for block in blocks for warning in block.warnings}),
                    "outcome_sha256": results.outcome_digest(outcome),
                }
                self._write(target, measured)
                on_main(self.state, log.clear)
            ids, right = measured.outcomes[key]
            broken.update(ids[~right].tolist())
            before.append(key)
        self._write(target, measured)

    def _run_blocks(
        self, attack: Attack, target: Target, images: Images, skipped: np.ndarray, log: results.BlockLog
    ) -> list[results.FinishedBlock]:
        """All blocks of one attack, in order; finished ones are read, the others are distributed over the processes."""
        request, state = self.request, self.state
        source = None if request.source is None else request.source.model
        done: dict[int, results.FinishedBlock] = known_to_all(state, log.read)
        wanted = {int(rows[0]): rows for rows in images.blocks(request.batch_size)}
        missing = [first for first in wanted if first not in done]
        mine: dict[int, results.FinishedBlock] = {}
        counts = {"total": len(images), "initial": sum(len(wanted[first]) for first in done), "unit": "img"}
        title = f"{target.label} {attack.name}"
        with tqdm(desc=title, disable=not state.is_main_process, leave=False, **counts) as bar:
            for first in missing[state.process_index :: state.num_processes]:
                rows, began = wanted[first], time.perf_counter()
                given = images.take(rows), request.threat
                options = {"seed": request.seed, "source": source, "broken": skipped[rows]}
                with autoattack_log(bar.set_postfix_str) as warnings:
                    right = block_outcome(attack, target.model, *given, **options)
                mine[first] = results.FinishedBlock(right, time.perf_counter() - began, warnings)
                log.write(first, mine[first])
                bar.update(len(rows) * state.num_processes)
        for part in gather_object([mine]):
            assert not done.keys() & part.keys(), "a block was evaluated twice"
            done |= part
        return [done[first] for first in wanted]

    def _write(self, target: Target, measured: _Measured) -> None:
        """Update results.json and the arrays."""
        entries = measured.entries
        alone = {
            name: outcome
            for name, outcome in measured.outcomes.items()
            if "without_images_broken_by" not in entries[name]
        }
        warned = [f"AutoAttack ({name}): {text}" for name, entry in entries.items() for text in entry["warnings"]]
        self.results["checkpoints"][target.label] = {
            **measured.facts,
            "flags": [*measured.facts["flags"], *contradictions(alone), *warned],
            "worst": worst_case(measured.outcomes),
            "attacks": dict(entries),
        }
        prefix = f"{target.label}/"  # drop its earlier arrays, because the label may have belonged to other weights
        others = {name: outcome for name, outcome in self.arrays.items() if not name.startswith(prefix)}
        self.arrays = others | {prefix + name: outcome for name, outcome in measured.outcomes.items()}

        def write() -> None:
            make_folder(self.out.parent)
            # The arrays first, so that results.json never names missing ones.
            results.write_arrays(self.out, self.arrays)
            write_json(self.out, self.results)

        on_main(self.state, write)
