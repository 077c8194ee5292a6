"""Natural and robust accuracy, per image, with intervals: `python -m nrat_scale.evaluate WHAT --data SHARDS`.

Every number comes with n and a 95 % Wilson interval, and names the weights (sha256), data (fingerprint), threat, seed and
versions it belongs to. The images are split into fixed blocks of `--batch-size` in the order of their ids. Under `accelerate
launch` each process takes whole blocks; a finished block is on disk, and the same command goes on with the next. What is
measured how stands in `accuracy`, what can be evaluated in `subjects`, what is suspicious in `scrutiny`.
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
from nrat_scale.evaluate.measures import Attack, Images, block_outcome
from nrat_scale.evaluate.request import TRANSFER, Request, read_images
from nrat_scale.evaluate.results import (
    BlockLog,
    FinishedBlock,
    Outcome,
    digest,
    earlier_results,
    is_answered,
    results_header,
    write_arrays,
)
from nrat_scale.evaluate.sanity import check_model, contradictions
from nrat_scale.evaluate.statistics import accuracy_record, worst_case
from nrat_scale.evaluate.targets import Target

_CHECKED_IMAGES = 64  # images that the model is checked with before anything is measured


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass
class _Answers:
    """What is known of one set of weights: what results.json says of it, its entries and the outcomes behind them."""

    facts: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def evaluate(
    subjects: Sequence[Target], shards: ShardSet, plan: Request, out: Path | None, *, progress: bool = True
) -> dict[str, Any]:
    """Run `plan` on every subject, over all processes; returns the content of results.json.

    Results (and per-image outcomes, see `outcomes`) are written to `out` after each attack. What `out` already holds for the
    same weights, data and settings is not measured again.

    Args:
        subjects: on the device to use, the same in every process.

    Raises:
        UserError: `out` holds results that must not be mixed with or replaced by these, or a model cannot be measured.
    """
    evaluation = _Evaluation(shards, plan, out, progress)
    answers: dict[str, _Answers] = {}
    for subject in subjects:
        sha256 = subject.identity["sha256"]
        if sha256 not in answers:
            answers[sha256] = evaluation.known(subject)
        evaluation.complete(subject, answers[sha256])
    return evaluation.results


class _Evaluation:
    """One evaluation under way, in each of its processes.

    Attributes:
        results: the content of results.json so far.
    """

    def __init__(self, shards: ShardSet, plan: Request, out: Path | None, progress: bool) -> None:
        self.shards, self.plan, self.out, self.progress = shards, plan, out, progress
        self.state = join_processes()
        self.results = results_header(shards, plan)
        earlier: tuple[dict[str, Any], dict[str, Outcome]]
        earlier = known_to_all(self.state, lambda: earlier_results(out, self.results))
        self.results["checkpoints"], self.arrays = earlier

    def known(self, subject: Target) -> _Answers:
        """Look at the model, and at what earlier results hold for its weights."""
        images = read_images(self.shards, min(_CHECKED_IMAGES, len(self.shards)))
        flags = check_model(subject.model, images, self.plan.threat, subject.label)
        answers = _Answers({**subject.identity, "flags": flags})
        for label, record in self.results["checkpoints"].items():
            if record.get("sha256") == subject.identity["sha256"]:
                answers.entries |= record["attacks"]
                answers.outcomes |= {name: self.arrays[f"{label}/{name}"] for name in record["attacks"]}
        return answers

    def complete(self, subject: Target, answers: _Answers) -> None:
        """Measure what is not answered yet, attack by attack."""
        plan = self.plan
        broken: set[int] = set()  # ids that an earlier attack of the list broke
        before: list[str] = []
        for attack in plan.attacks:
            key = plan.key(attack)
            images = read_images(self.shards, plan.count(attack, len(self.shards)), plan.seed)
            dropped = list(before) if plan.drop_broken and attack.kind not in ("aa", "natural") else []
            settings = plan.settings(attack, len(images), dropped)
            if not is_answered(answers.entries.get(key), settings, key):
                skip = np.isin(images.ids, list(broken)) if dropped else None
                log = BlockLog(self.out, self._question(attack, subject, settings))
                blocks = self._blocks(attack, subject, images, skip, log)
                outcome = images.ids, np.concatenate([block.right for block in blocks])
                assert len(outcome[1]) == len(images)
                answers.outcomes[key] = outcome
                answers.entries[key] = {
                    **accuracy_record(outcome[1]),
                    **settings,
                    "seconds": round(sum(block.seconds for block in blocks), 2),
                    "warnings": sorted({warning for block in blocks for warning in block.warnings}),
                    "outcome_sha256": digest(outcome),
                }
                self._publish(subject, answers)
                on_main(self.state, log.clear)
            ids, right = answers.outcomes[key]
            broken.update(ids[~right].tolist())
            before.append(key)
        self._publish(subject, answers)

    def _question(self, attack: Attack, subject: Target, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything that an outcome depends on."""
        given = {"attack": attack.name, "weights": subject.identity["sha256"], "data": self.shards.fingerprint}
        return {**settings, **given, "space": self.plan.threat.space, "versions": self.results["versions"]}

    def _blocks(
        self, attack: Attack, subject: Target, images: Images, skip: np.ndarray | None, log: BlockLog
    ) -> list[FinishedBlock]:
        """All blocks of one attack, in order; each process takes whole ones, and finished ones are not repeated."""
        plan, state = self.plan, self.state
        done: dict[int, FinishedBlock] = known_to_all(state, log.read)
        wanted = {int(rows[0]): rows for rows in images.blocks(plan.batch_size)}
        missing = [first for first in wanted if first not in done]
        mine: dict[int, FinishedBlock] = {}
        with tqdm(
            total=len(images),
            initial=sum(len(wanted[first]) for first in done),
            desc=f"{subject.label} {attack.name}",
            unit="img",
            disable=not self.progress or not state.is_main_process,
            leave=False,
        ) as bar:
            for first in missing[state.process_index :: state.num_processes]:
                rows, began, warnings = wanted[first], time.perf_counter(), list[str]()
                right = block_outcome(
                    attack,
                    subject.model,
                    images.take(rows),
                    plan.threat,
                    seed=plan.seed,
                    source=None if plan.source is None else plan.source.model,
                    broken=None if skip is None else skip[rows],
                    warn=warnings.append,
                    bar=bar,
                )
                mine[first] = FinishedBlock(right, time.perf_counter() - began, warnings)
                log.write(first, mine[first])
                bar.update(len(rows) * state.num_processes)
        for part in gather_object([mine]):
            assert not done.keys() & part.keys(), "a block was evaluated twice"
            done |= part
        return [done[first] for first in wanted]

    def _publish(self, subject: Target, answers: _Answers) -> None:
        """Bring results.json and the arrays up to date."""
        alone = {
            name: outcome
            for name, outcome in answers.outcomes.items()
            if not name.startswith(TRANSFER) and "without_images_broken_by" not in answers.entries[name]
        }
        warned = [f"AutoAttack ({name}): {w}" for name, entry in answers.entries.items() for w in entry["warnings"]]
        self.results["checkpoints"][subject.label] = {
            **answers.facts,
            "flags": [*answers.facts["flags"], *contradictions(alone), *warned],
            "worst": worst_case(answers.outcomes),
            "attacks": dict(answers.entries),
        }
        for name in [name for name in self.arrays if name.startswith(f"{subject.label}/")]:
            del self.arrays[name]  # of weights that had this label before
        self.arrays |= {f"{subject.label}/{name}": outcome for name, outcome in answers.outcomes.items()}

        def write() -> None:
            if self.out is not None:
                make_folder(self.out.parent)
                write_arrays(self.out, self.arrays)  # first: results say what the arrays must be
                write_json(self.out, self.results)

        on_main(self.state, write)
