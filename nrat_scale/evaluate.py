"""Natural and robust accuracy, per image, with intervals: `python -m nrat_scale.evaluate RUN --data SHARDS`.

Every number comes with n and a 95 % Wilson interval, and names the weights (sha256), data (fingerprint), threat, seed and
versions it belongs to. What is measured how stands in `accuracy`.
"""

import argparse
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

import nrat_scale
from nrat_scale import models
from nrat_scale.accuracy import ATTACK, Images, accuracy_record, autoattack_package, correct_under
from nrat_scale.attacks import ThreatSpec
from nrat_scale.checkpoint import Checkpoint, named_checkpoint
from nrat_scale.data import to_nchw
from nrat_scale.errors import UserError, run_cli
from nrat_scale.files import read_json, sha256_of, write_json
from nrat_scale.recipe import load_recipe
from nrat_scale.seeds import KeyedPermutation
from nrat_scale.shards import ShardSet, open_shards
from nrat_scale.sources import SKIPPED

RESULTS = "results.json"


# ---- what is evaluated ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """One set of weights to evaluate, with what its results say of it."""

    label: str
    model: nn.Module
    identity: dict[str, Any]


def run_model(run: Path, checkpoint: Checkpoint) -> nn.Module:
    """The evaluated weights (EMA where there is one) of a run's checkpoint, in evaluation mode."""
    description = read_json(run / "model.json", "description of the model")
    model = models.create(str(description["architecture"]), dict(description["model_args"]))
    try:
        model.load_state_dict(checkpoint.tensors(checkpoint.evaluated))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{checkpoint.folder} does not fit the model of {run / 'model.json'}: {error}") from error
    return model.eval()


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run directory (and not a release)."""
    return (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir()


def skipped_shards(run: Path) -> list[dict[str, Any]]:
    """The shards that a run did without (`data.on_bad_shard: skip`): source, name, number of images, reason."""
    path = run / SKIPPED
    return list(read_json(path, "log of skipped shards").get("skipped", [])) if path.is_file() else []


def run_subjects(run: Path, names: Sequence[str]) -> list[Subject]:
    """The named checkpoints of a run; two names of the same step share one model and are evaluated once."""
    by_step: dict[int, Subject] = {}
    subjects = []
    for name in names:
        checkpoint = named_checkpoint(run, name)
        if checkpoint.step not in by_step:
            weights = checkpoint.evaluated
            identity = {
                "step": checkpoint.step,
                "epoch": checkpoint.state["epoch"],
                "weights": "ema" if weights == "ema" else "raw",
                "sha256": checkpoint.sha256[f"{weights}.safetensors"],
                "skipped_shards": skipped_shards(run),
            }
            by_step[checkpoint.step] = Subject(name, run_model(run, checkpoint), identity)
        subjects.append(replace(by_step[checkpoint.step], label=name))
    return subjects


def release_subject(source: str) -> tuple[Subject, ThreatSpec | None]:
    """A release, and the threat it was trained for where its folder says so."""
    folder = models.resolve(source)
    recipe = folder / "recipe.yaml"
    threat = load_recipe(recipe).threat if recipe.is_file() else None
    identity = {"sha256": sha256_of(folder / "model.safetensors"), "weights": "released"}
    return Subject("release", models.load(folder), identity), threat


def read_images(shards: ShardSet, count: int | None = None, seed: int = 0) -> Images:
    """All images of `shards`, or a fixed seeded choice of `count` of them, in source order."""
    positions = shards.in_source_order()
    if count is not None and count < len(shards):
        positions = positions[np.sort(KeyedPermutation(len(shards), seed, "evaluate")(np.arange(count)))]
    images, labels = to_nchw(shards.images(positions)), torch.from_numpy(shards.labels(positions))
    return Images(images, labels, shards.source_ids(positions))


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to run on each subject."""

    attacks: tuple[str, ...]
    threat: ThreatSpec
    images: int | None
    aa_images: int | None
    batch_size: int
    seed: int


def evaluate(
    subjects: Sequence[Subject], shards: ShardSet, plan: Plan, out: Path | None, *, progress: bool = True
) -> dict[str, Any]:
    """Run `plan` on every subject; results are written to `out` after each attack. Returns them.

    Attacks that `out` already holds for the same weights, data, threat and settings are not run again.
    """
    results = _header(shards, plan)
    known = _known(out, results)
    done: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        sha256 = subject.identity["sha256"]
        record = done.get(sha256) or {**subject.identity, "attacks": _reusable(known, sha256, plan)}
        done[sha256] = results["checkpoints"][subject.label] = record
        for attack in plan.attacks:
            if attack not in record["attacks"]:
                record["attacks"][attack] = _run_attack(attack, subject, shards, plan, progress)
                if out is not None:
                    write_json(out, results)
    if out is not None:
        write_json(out, results)
    return results


def _run_attack(attack: str, subject: Subject, shards: ShardSet, plan: Plan, progress: bool) -> dict[str, Any]:
    count = _count(attack, plan, len(shards))
    images = read_images(shards, count, plan.seed)
    began = time.perf_counter()
    outcome = correct_under(
        attack, subject.model, images, plan.threat, seed=plan.seed, batch_size=plan.batch_size, progress=progress
    )
    settings = {"seed": plan.seed, "batch_size": plan.batch_size}
    return {**accuracy_record(outcome), **settings, "seconds": round(time.perf_counter() - began, 2)}


def _count(attack: str, plan: Plan, available: int) -> int:
    limits = [available, plan.images, plan.aa_images if attack == "aa" else None]
    return min(limit for limit in limits if limit is not None)


def _header(shards: ShardSet, plan: Plan) -> dict[str, Any]:
    package = autoattack_package()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", package)}
    return {
        "format": "nrat_scale.results",
        "version": 1,
        "data": {
            "folder": Path(shards.folder).name,
            "fingerprint": shards.fingerprint,
            "dataset": shards.dataset,
            "num_images": len(shards),
        },
        "threat": {"norm": "linf", "eps": plan.threat.eps, "step": plan.threat.step, "space": plan.threat.space},
        "versions": {"nrat_scale": nrat_scale.__version__, **versions},
        "checkpoints": {},
    }


def _known(out: Path | None, header: dict[str, Any]) -> dict[str, Any]:
    """Earlier results in `out` for the same data, threat and versions."""
    if out is None or not out.is_file():
        return {}
    earlier = read_json(out, "results")
    same = all(earlier.get(key) == header[key] for key in ("version", "data", "threat", "versions"))
    return dict(earlier.get("checkpoints", {})) if same else {}


def _reusable(known: dict[str, Any], sha256: str, plan: Plan) -> dict[str, Any]:
    for record in known.values():
        if record.get("sha256") == sha256:
            return {
                name: value
                for name, value in record.get("attacks", {}).items()
                if value["seed"] == plan.seed
                and value["batch_size"] == plan.batch_size
                and (plan.images is None and (name != "aa" or plan.aa_images is None or value["n"] == plan.aa_images))
            }
    return {}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.evaluate",
        description="Natural and robust accuracy of a run's checkpoints or of a release, with 95 % intervals.",
        epilog="Example: python -m nrat_scale.evaluate runs/quickstart --data data/digits/test --attacks natural,pgd20,aa",
    )
    parser.add_argument("what", metavar="RUN_OR_RELEASE", help="run directory, release folder, or user/repo on the Hub")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="folder of shards with the test images")
    parser.add_argument("--attacks", default="natural,pgd20,cw20,aa", help="comma-separated (default: %(default)s)")
    parser.add_argument("--checkpoint", default="best,last", help="of a run (default: %(default)s)")
    parser.add_argument("--images", type=int, help="a fixed seeded choice of so many images (default: all)")
    parser.add_argument("--aa-images", type=int, help="the same for AutoAttack alone")
    parser.add_argument("--eps", help="radius, such as 8/255 (default: the recipe's)")
    parser.add_argument("--step", help="step of PGD and CW, such as 2/255 (default: the recipe's)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="results file (default: RUN/results.json; none for a release)")
    return parser.parse_args(argv)


def _threat(arguments: argparse.Namespace, trained: ThreatSpec | None) -> ThreatSpec:
    values = {}
    for name in ("eps", "step"):
        text = getattr(arguments, name)
        if text is None and trained is None:
            raise UserError(
                f"{arguments.what} does not say what it was trained for: give --{name}, such as --{name} 8/255."
            )
        values[name] = getattr(trained, name) if text is None else _number(name, text)
    space = trained.space if trained is not None else "pixel"
    return ThreatSpec(values["eps"], values["step"], num_steps=1, space=space)


def _number(name: str, text: str) -> float:
    parts = text.split("/")
    try:
        return float(parts[0]) / (float(parts[1]) if len(parts) == 2 else 1.0)
    except (ValueError, ZeroDivisionError, IndexError):
        raise UserError(f"--{name} '{text}' is not a number; write 8/255 or 0.03.") from None


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
                    f"{shards.folder} is the {kind} training data of {run}. Give the test split with --data."
                )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    arguments = _arguments(argv)
    attacks = tuple(name.strip() for name in arguments.attacks.split(",") if name.strip())
    if not attacks:
        raise UserError("--attacks names no attack. Known: natural, fgsm, pgdN, cwN (such as pgd20), aa.")
    for name in attacks:
        if not ATTACK.fullmatch(name):
            raise UserError(
                f"Unknown attack '{name}' in --attacks. Known: natural, fgsm, pgdN, cwN (such as pgd20), aa."
            )
    for option in ("images", "aa_images", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device} cannot be used here: {str(error).splitlines()[0]}") from error
    shards = open_shards(arguments.data, "--data")
    run, out = Path(arguments.what), arguments.out
    if is_run(run):
        _check_unseen(run, shards)
        names = [name.strip() for name in arguments.checkpoint.split(",")]
        if unknown := sorted(set(names) - {"best", "last"}):
            raise UserError(f"--checkpoint names '{unknown[0]}'; a run has best and last.")
        trained: ThreatSpec | None = load_recipe(run / "recipe.yaml").threat
        subjects, out = run_subjects(run, names), out or run / RESULTS
    else:
        subject, trained = release_subject(arguments.what)
        subjects = [subject]
    shards.verify()
    plan = Plan(
        attacks,
        _threat(arguments, trained),
        arguments.images,
        arguments.aa_images,
        arguments.batch_size,
        arguments.seed,
    )
    for subject in subjects:
        _check_fits(subject.model, shards, arguments.what)
        subject.model.to(arguments.device)
    results = evaluate(subjects, shards, plan, out)
    _print(results, out)


def _print(results: dict[str, Any], out: Path | None) -> None:
    space = results["threat"]["space"]
    print(f"{results['data']['dataset']}, l_inf eps {results['threat']['eps']:.4g}, 95 % Wilson intervals")
    if space != "pixel":
        print(
            f"NOTE: threat space '{space}' is not the standard one; these numbers cannot be compared with RobustBench."
        )
    for label, record in results["checkpoints"].items():
        for attack, value in record["attacks"].items():
            low, high = 100 * value["low"], 100 * value["high"]
            print(
                f"  {label:8s} {attack:8s} {100 * value['accuracy']:6.2f} %  [{low:.1f}, {high:.1f}]  n = {value['n']}"
            )
    if out is not None:
        print(f"written to {out}")


if __name__ == "__main__":
    run_cli(main)
