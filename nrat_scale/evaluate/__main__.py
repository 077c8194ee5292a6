"""Command line of evaluation: `python -m nrat_scale.evaluate WHAT --data SHARDS`."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from nrat_scale.attacks import NORMS, parse_fraction
from nrat_scale.core.distributed import join_processes, on_main, use_all_cores
from nrat_scale.core.errors import UserError, first_line, run_cli, warn
from nrat_scale.core.float32 import use_float32
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate.attacks import attack_usage, parse_attack
from nrat_scale.evaluate.measures import memory_errors
from nrat_scale.evaluate.request import Request, check_fits, check_unseen, request_threat
from nrat_scale.evaluate.results import results_text
from nrat_scale.evaluate.run import evaluate
from nrat_scale.evaluate.targets import CHECKPOINTS, WEIGHT_CHOICES, TargetOptions, find_targets


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.evaluate",
        description="Natural and robust accuracy of a run's checkpoints, a release or any other weights, with 95 % intervals.",
        epilog="Example: python -m nrat_scale.evaluate runs/quickstart --data data/digits/test --attacks natural,pgd20,aa",
    )
    add = parser.add_argument
    names, number = _option(_names), _option(parse_fraction)
    numbers = _option(lambda text: [parse_fraction(part) for part in text.split(",")])
    attacks = _option(lambda text: tuple(map(parse_attack, _names(text))))
    what = "run directory, release folder, user/repo[@revision] on the Hub, weight file with --arch, or timm model"
    add("what", metavar="WHAT", help=what)
    add("--data", required=True, metavar="SHARDS", help="folder of shards with the test images")
    add("--attacks", type=attacks, default="natural,pgd20,cw20,aa", help=f"{attack_usage()} (default: %(default)s)")
    add("--checkpoint", type=names, default=",".join(CHECKPOINTS), help="of a run (default: %(default)s)")
    weights = "of a run: evaluated (the EMA if there is one), ema, raw (default: %(default)s)"
    add("--weights", type=names, default=WEIGHT_CHOICES[0], help=weights)
    add("--arch", help="of a weight file: a model that timm knows, such as wrn28_10_silu")
    add("--mean", type=numbers, help="normalisation of a weight file, comma-separated (default: the model's)")
    add("--std", type=numbers, help="the same")
    key = "of a weight file with several sets of weights (raw and averaged): that to load, such as ema"
    add("--weights-key", metavar="KEY", help=key)
    add("--transfer-from", metavar="WHAT", help="make the adversarial images on this model instead")
    add("--source-arch", metavar="ARCH", help="--arch of --transfer-from")
    add("--source-weights-key", metavar="KEY", help="--weights-key of --transfer-from")
    drop = "skip images that an earlier attack broke (not for AutoAttack): faster, but the numbers are cumulative"
    add("--drop-broken", action="store_true", help=drop)
    add("--images", type=int, help="number of images, a fixed seeded choice (default: all)")
    add("--aa-images", type=int, help="the same for AutoAttack alone")
    add("--norm", choices=NORMS, help="default: the recipe's, else linf")
    add("--eps", type=number, help="radius, such as 8/255 (default: the recipe's)")
    add(
        "--step",
        type=number,
        help="step of PGD and CW, such as 2/255 (default: the recipe's, of another radius eps / 4)",
    )
    add("--batch-size", type=int, default=256, help="images per evaluation block (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", help="default: one GPU per process if available")
    tf32 = "convolutions in TF32 on GPUs: faster, with a logit error of about 1e-3 (default: IEEE float32)"
    add("--tf32", action="store_true", help=tf32)
    out = "results file (default: RUN/results.json, or evaluations/NAME-HASH/results.json with a hash of the model)"
    graphs = "run the passes of attacks as CUDA graphs on padded batches: for small models on GPUs (not measured yet)"
    add("--graphs", action="store_true", help=graphs)
    add("--out", type=Path, help=out)
    return parser.parse_args(argv)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _option(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows the message of an `ArgumentTypeError` but not of other `ValueError`s."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _join(device: str | None) -> tuple[PartialState, torch.device]:
    """The processes of this launch, and the device of this one."""
    try:
        state = join_processes(on_cpu=device is not None and torch.device(device).type == "cpu")
        chosen = state.device if device is None or state.num_processes > 1 else torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {first_line(error)}") from error
    if chosen.type == "cpu":
        use_all_cores()
    return state, chosen


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    given = _arguments(argv)
    state, device = _join(given.device)
    use_float32("tf32" if given.tf32 else "ieee")
    shards = open_shards(given.data, "--data")
    options = TargetOptions(given.checkpoint, given.weights, given.arch, given.mean, given.std, given.weights_key)
    found = find_targets(given.what, options)
    if found.run is not None:
        check_unseen(found.run, shards)
    source = None
    if given.transfer_from is not None:
        options = TargetOptions(("best",), arch=given.source_arch, weights_key=given.source_weights_key)
        (source,) = find_targets(given.transfer_from, options).targets
        source = replace(source, label=Path(given.transfer_from).name)
    threat = request_threat(given.what, found.threat, given.norm, given.eps, given.step)
    counts = given.images, given.aa_images, given.batch_size
    if given.graphs and device.type != "cuda":
        raise UserError(f"--graphs needs a GPU, and this evaluation is on {device.type}. Omit it.")
    request = Request(given.attacks, threat, *counts, given.seed, source, given.drop_broken, given.graphs)
    out = given.out or found.results
    if given.out is None and found.earlier is not None and found.earlier.is_file():
        warn(f"{found.earlier} is not used: an earlier version wrote it, which did not tell all models apart.")
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"--out {out} must be a .json file (the per-image outcomes go beside it). Choose another name.")
    on_main(state, shards.verify)
    for target in [*found.targets, *([] if source is None else [source])]:
        check_fits(target.model, shards, given.what)
        with memory_errors(f"The model of {target.label}", 1):
            target.model.to(device)
    results = evaluate(found.targets, shards, request, out, replace_models=given.out is None)
    if state.is_main_process:
        print(f"{results_text(results, [target.label for target in found.targets])}\nwritten to {out}")


if __name__ == "__main__":
    run_cli(main)
