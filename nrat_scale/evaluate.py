"""Natural and robust accuracy, per image, with intervals: `python -m nrat_scale.evaluate WHAT --data SHARDS`.

Every number comes with n and a 95 % Wilson interval, and names the weights (sha256), data (fingerprint), threat, seed and
versions it belongs to. The images are split into fixed blocks of `--batch-size` in the order of their ids. Under `accelerate
launch` each process takes whole blocks; a finished block is on disk, and the same command goes on with the next. What is
measured how stands in `accuracy`, what can be evaluated in `subjects`, what is suspicious in `scrutiny`.
"""

import argparse
import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

import nrat_scale
from nrat_scale.accuracy import KNOWN, Attack, Images, accuracy_record, block_outcome, parse_attack
from nrat_scale.attacks import NORMS, ThreatSpec
from nrat_scale.autoattack import autoattack_package
from nrat_scale.data import to_nchw
from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import make_folder, read_json, write_json
from nrat_scale.outcomes import BlockLog, FinishedBlock, Outcome, digest, read_arrays, write_arrays
from nrat_scale.processes import joined, known_to_all, on_main, use_all_cores
from nrat_scale.scrutiny import contradictions, scrutinise
from nrat_scale.seeds import KeyedPermutation
from nrat_scale.shards import ShardSet, open_shards
from nrat_scale.subjects import CHECKPOINTS, WEIGHTS, Options, Subject, find

TRANSFER = "transfer-"
_SCRUTINISED = 64  # images that the model is checked with before anything is measured
_HEADER = ("data", "threat", "versions")


# ---- what is asked --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to run on each subject.

    Attributes:
        attacks: in this order.
        threat: eps, step, norm and space.
        images, aa_images: a fixed seeded choice of so many images, for AutoAttack another number; None means all.
        batch_size: of the blocks.
        seed: of random starts, AutoAttack and the choice of images.
        source: whose adversarial images are used instead of the subject's own (transfer).
        drop_broken: do not attack again what an earlier attack of the list broke; AutoAttack excepted, which needs whole
            blocks.
    """

    attacks: tuple[Attack, ...]
    threat: ThreatSpec
    images: int | None = None
    aa_images: int | None = None
    batch_size: int = 256
    seed: int = 0
    source: Subject | None = None
    drop_broken: bool = False

    def key(self, attack: Attack) -> str:
        """What results call it."""
        return attack.name if self.source is None or attack.kind == "natural" else TRANSFER + attack.name

    def count(self, attack: Attack, available: int) -> int:
        """How many of the images it is run on."""
        limits = [available, self.images, self.aa_images if attack.kind == "aa" else None]
        return min(limit for limit in limits if limit is not None)

    def settings(self, attack: Attack, n: int, dropped: list[str]) -> dict[str, Any]:
        """What the entry of results.json says of how it was measured."""
        settings: dict[str, Any] = {"n": n, "seed": self.seed, "batch_size": self.batch_size}
        settings |= {"eps": self.threat.eps, "norm": self.threat.norm}
        if attack.kind in ("pgd", "cw", "fgsm"):
            step = self.threat.eps if attack.kind == "fgsm" else self.threat.step
            settings |= {"step": step, "steps": attack.steps, "restarts": attack.restarts}
        if attack.components:
            settings["components"] = list(attack.components)
        if self.source is not None and attack.kind != "natural":
            settings["source"] = {"label": self.source.label, "sha256": self.source.identity["sha256"]}
        if dropped:
            settings["without_images_broken_by"] = dropped
        return settings


def read_images(shards: ShardSet, count: int | None = None, seed: int = 0) -> Images:
    """All images of `shards`, or a fixed seeded choice of `count` of them, in source order."""
    positions = shards.in_source_order()
    if count is not None and count < len(shards):
        positions = positions[np.sort(KeyedPermutation(len(shards), seed, "evaluate")(np.arange(count)))]
    images, labels = to_nchw(shards.images(positions)), torch.from_numpy(shards.labels(positions))
    return Images(images, labels, shards.source_ids(positions))


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass
class _Answers:
    """What is known of one set of weights: what results.json says of it, its entries and the outcomes behind them."""

    facts: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def evaluate(
    subjects: Sequence[Subject], shards: ShardSet, plan: Plan, out: Path | None, *, progress: bool = True
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

    def __init__(self, shards: ShardSet, plan: Plan, out: Path | None, progress: bool) -> None:
        self.shards, self.plan, self.out, self.progress = shards, plan, out, progress
        self.state = joined()
        self.results = _header(shards, plan)
        earlier: tuple[dict[str, Any], dict[str, Outcome]]
        earlier = known_to_all(self.state, lambda: _earlier(out, self.results))
        self.results["checkpoints"], self.arrays = earlier

    def known(self, subject: Subject) -> _Answers:
        """Look at the model, and at what earlier results hold for its weights."""
        images = read_images(self.shards, min(_SCRUTINISED, len(self.shards)))
        flags = scrutinise(subject.model, images, self.plan.threat, subject.label)
        answers = _Answers({**subject.identity, "flags": flags})
        for label, record in self.results["checkpoints"].items():
            if record.get("sha256") == subject.identity["sha256"]:
                answers.entries |= record["attacks"]
                answers.outcomes |= {name: self.arrays[f"{label}/{name}"] for name in record["attacks"]}
        return answers

    def complete(self, subject: Subject, answers: _Answers) -> None:
        """Measure what is not answered yet, attack by attack."""
        plan = self.plan
        broken: set[int] = set()  # ids that an earlier attack of the list broke
        before: list[str] = []
        for attack in plan.attacks:
            key = plan.key(attack)
            images = read_images(self.shards, plan.count(attack, len(self.shards)), plan.seed)
            dropped = list(before) if plan.drop_broken and attack.kind not in ("aa", "natural") else []
            settings = plan.settings(attack, len(images), dropped)
            if not _answered(answers.entries.get(key), settings, key):
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

    def _question(self, attack: Attack, subject: Subject, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything that an outcome depends on."""
        given = {"attack": attack.name, "weights": subject.identity["sha256"], "data": self.shards.fingerprint}
        return {**settings, **given, "space": self.plan.threat.space, "versions": self.results["versions"]}

    def _blocks(
        self, attack: Attack, subject: Subject, images: Images, skip: np.ndarray | None, log: BlockLog
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

    def _publish(self, subject: Subject, answers: _Answers) -> None:
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


def worst_case(outcomes: Mapping[str, Outcome]) -> dict[str, Any] | None:
    """Accuracy where an image must survive every attack that was run, on the images that all of them saw: counts, interval and
    the names of the attacks. None for a single attack, or where they have no image in common."""
    common: np.ndarray | None = None
    for ids, _ in outcomes.values():
        common = ids if common is None else np.intersect1d(common, ids, assume_unique=True)
    if common is None or len(outcomes) < 2 or not len(common):
        return None
    right = np.ones(len(common), bool)
    for ids, survived in outcomes.values():
        order = np.argsort(ids)
        right &= survived[order[np.searchsorted(ids, common, sorter=order)]]
    return {"attacks": sorted(outcomes), **accuracy_record(right)}


# ---- results that are there already ---------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    package = autoattack_package()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", package)}
    return {"nrat_scale": nrat_scale.__version__, **versions}


def _header(shards: ShardSet, plan: Plan) -> dict[str, Any]:
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


def _earlier(out: Path | None, header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Outcome]]:
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


def _answered(entry: dict[str, Any] | None, settings: dict[str, Any], key: str) -> bool:
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


# ---- the command ----------------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.evaluate",
        description="Natural and robust accuracy of a run's checkpoints, a release or any other weights, with 95 % intervals.",
        epilog="Example: python -m nrat_scale.evaluate runs/quickstart --data data/digits/test --attacks natural,pgd20,aa",
    )
    what = "run directory, release folder, user/repo[@revision] on the Hub, file of weights with --arch, or timm model"
    parser.add_argument("what", metavar="WHAT", help=what)
    parser.add_argument("--data", required=True, metavar="SHARDS", help="folder of shards with the test images")
    parser.add_argument(
        "--attacks", default="natural,pgd20,cw20,aa", help=f"comma-separated (default: %(default)s). {KNOWN}"
    )
    parser.add_argument("--checkpoint", default=",".join(CHECKPOINTS), help="of a run (default: %(default)s)")
    parser.add_argument(
        "--weights",
        default=WEIGHTS[0],
        help="of a run: evaluated (the EMA where there is one), ema, raw (default: %(default)s)",
    )
    parser.add_argument("--arch", help="of a file of weights: a model that timm knows, such as wrn28_10_silu")
    parser.add_argument("--mean", help="normalisation of a file of weights, comma-separated (default: the model's)")
    parser.add_argument("--std", help="the same")
    parser.add_argument("--transfer-from", metavar="WHAT", help="make the adversarial images on this model instead")
    parser.add_argument("--source-arch", metavar="ARCH", help="--arch of --transfer-from")
    parser.add_argument(
        "--drop-broken", action="store_true",
        help="do not attack again what an earlier attack broke (AutoAttack excepted): faster, but only the worst case and the "
        "first attack's number are then those of an attack by itself",
    )  # fmt: skip
    parser.add_argument("--images", type=int, help="a fixed seeded choice of so many images (default: all)")
    parser.add_argument("--aa-images", type=int, help="the same for AutoAttack alone")
    parser.add_argument("--norm", choices=NORMS, help="default: the recipe's, else linf")
    parser.add_argument("--eps", help="radius, such as 8/255 (default: the recipe's)")
    parser.add_argument("--step", help="step of PGD and CW, such as 2/255 (default: the recipe's, else eps / 4)")
    parser.add_argument("--batch-size", type=int, default=256, help="of the blocks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: each process's GPU where there is one")
    parser.add_argument(
        "--out", type=Path, help="results file (default: RUN/results.json, or evaluations/NAME/results.json)"
    )
    return parser.parse_args(argv)


def _list(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _threat(arguments: argparse.Namespace, trained: ThreatSpec | None) -> ThreatSpec:
    norm = arguments.norm or (trained.norm if trained is not None else "linf")
    if trained is not None and norm != trained.norm:
        trained = None  # a radius means nothing in another norm
    if arguments.eps is None and trained is None:
        raise UserError(
            f"{arguments.what} does not say what {norm} radius it was trained for: give --eps, such as --eps 8/255."
        )
    eps = trained.eps if arguments.eps is None and trained is not None else _number("eps", arguments.eps)
    if arguments.step is not None:
        step = _number("step", arguments.step)
    else:
        step = trained.step if trained is not None else eps / 4
    space = trained.space if trained is not None else "pixel"
    return ThreatSpec(eps, step, num_steps=1, space=space, norm=norm)


def _number(name: str, text: str) -> float:
    parts = text.split("/")
    try:
        value = float(parts[0]) / (float(parts[1]) if len(parts) == 2 else 1.0)
    except (ValueError, ZeroDivisionError, IndexError):
        value = math.nan
    if len(parts) > 2 or not math.isfinite(value):
        raise UserError(f"--{name} '{text}' is not a number; write 8/255 or 0.03.")
    return value


def _numbers(name: str, text: str | None) -> list[float] | None:
    return None if text is None else [_number(name, part) for part in text.split(",")]


def _check_fits(model: nn.Module, shards: ShardSet, what: str) -> None:
    channels, classes = getattr(model, "in_chans", None), getattr(model, "num_classes", None)
    if channels not in (None, shards.image_shape[2]) or classes not in (None, shards.num_classes):
        raise UserError(
            f"{what} takes {channels} channels and knows {classes} classes, but {shards.folder} has "
            f"{shards.image_shape[2]} channels and {shards.num_classes} classes. Evaluate it on its own data set."
        )


def _check_unseen(run: Path, shards: ShardSet) -> None:
    """Test images that were trained or selected on would make the numbers worthless."""
    path = run / "data.json"
    if path.is_file():
        for kind, entry in read_json(path, "record of the training data").items():
            if entry.get("fingerprint") == shards.fingerprint:
                raise UserError(
                    f"{shards.folder} is the {kind} training data of {run}, and validation images are held out from it. "
                    "Give the test split with --data."
                )


def _state(arguments: argparse.Namespace) -> tuple[PartialState, torch.device]:
    """The processes, and the device of this one."""
    device = arguments.device
    on_cpu = device is not None and torch.device(device).type == "cpu"
    state = joined(on_cpu=on_cpu)
    chosen = state.device if device is None or state.num_processes > 1 else torch.device(device)
    if chosen.type == "cpu":
        use_all_cores()
    torch.zeros(1, device=chosen)
    return state, chosen


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    arguments = _arguments(argv)
    attacks = tuple(parse_attack(name) for name in _list(arguments.attacks))
    if not attacks:
        raise UserError(f"--attacks names no attack. Known: {KNOWN}.")
    for option in ("images", "aa_images", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    try:
        state, device = _state(arguments)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device} cannot be used here: {str(error).splitlines()[0]}") from error
    shards = open_shards(arguments.data, "--data")
    mean, std = _numbers("mean", arguments.mean), _numbers("std", arguments.std)
    found = find(
        arguments.what, Options(_list(arguments.checkpoint), _list(arguments.weights), arguments.arch, mean, std)
    )
    if found.run is not None:
        _check_unseen(found.run, shards)
    source = None
    if arguments.transfer_from is not None:
        options = Options(checkpoints=("best",), arch=arguments.source_arch)
        source = replace(find(arguments.transfer_from, options).subjects[0], label=Path(arguments.transfer_from).name)
    threat = _threat(arguments, found.threat)
    on_main(state, shards.verify)
    for subject in [*found.subjects, *([] if source is None else [source])]:
        _check_fits(subject.model, shards, arguments.what)
        subject.model.to(device)
    plan = Plan(
        attacks, threat, arguments.images, arguments.aa_images, arguments.batch_size, arguments.seed, source,
        arguments.drop_broken,
    )  # fmt: skip
    out = arguments.out or found.results
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"--out {out} must be a .json file (the per-image outcomes go beside it). Choose another name.")
    results = evaluate(found.subjects, shards, plan, out)
    if state.is_main_process:
        _print(results, out, [subject.label for subject in found.subjects])


def _print(results: dict[str, Any], out: Path, labels: Sequence[str]) -> None:
    threat = results["threat"]
    print(f"{results['data']['dataset']}, {threat['norm']} eps {threat['eps']:.4g}, 95 % Wilson intervals")
    for label in labels:
        record = results["checkpoints"][label]
        rows = dict(record["attacks"])
        if record["worst"] is not None:
            rows["worst case"] = record["worst"]
        for attack, value in rows.items():
            low, high = 100 * value["low"], 100 * value["high"]
            print(
                f"  {label:8s} {attack:10s} {100 * value['accuracy']:6.2f} %  [{low:.1f}, {high:.1f}]  n = {value['n']}"
            )
        for flag in record["flags"]:
            print(f"  {label:8s} FLAG: {flag}")
    print(f"written to {out}")


if __name__ == "__main__":
    run_cli(main)
