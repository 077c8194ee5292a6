"""Command line of evaluation: `python -m nrat_scale.evaluate WHAT --data SHARDS`."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from nrat_scale.attacks import NORMS, parse_fraction
from nrat_scale.core.distributed import join_processes, on_main, use_all_cores
from nrat_scale.core.errors import UserError, first_line, run_cli
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate.attacks import attack_usage, parse_attack
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
    what = "run directory, release folder, user/repo[@revision] on the Hub, weight file with --arch, or timm model"
    add("what", metavar="WHAT", help=what)
    add("--data", required=True, metavar="SHARDS", help="folder of shards with the test images")
    add("--attacks", default="natural,pgd20,cw20,aa", help=f"of {attack_usage()} (default: %(default)s)")
    add("--checkpoint", default=",".join(CHECKPOINTS), help="of a run (default: %(default)s)")
    weights = "of a run: evaluated (the EMA if there is one), ema, raw (default: %(default)s)"
    add("--weights", default=WEIGHT_CHOICES[0], help=weights)
    add("--arch", help="of a weight file: a model that timm knows, such as wrn28_10_silu")
    add("--mean", help="normalisation of a weight file, comma-separated (default: the model's)")
    add("--std", help="the same")
    add("--transfer-from", metavar="WHAT", help="make the adversarial images on this model instead")
    add("--source-arch", metavar="ARCH", help="--arch of --transfer-from")
    drop = (
        "skip images that an earlier attack broke (not for AutoAttack): faster, but all numbers except the worst case and "
        "the first attack's are cumulative"
    )
    add("--drop-broken", action="store_true", help=drop)
    add("--images", type=int, help="number of images, a fixed seeded choice (default: all)")
    add("--aa-images", type=int, help="the same for AutoAttack alone")
    add("--norm", choices=NORMS, help="default: the recipe's, else linf")
    add("--eps", help="radius, such as 8/255 (default: the recipe's)")
    add("--step", help="step of PGD and CW, such as 2/255 (default: the recipe's, else eps / 4)")
    add("--batch-size", type=int, default=256, help="size of the blocks (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", help="default: one GPU per process if available")
    add("--out", type=Path, help="results file (default: RUN/results.json, or evaluations/NAME/results.json)")
    return parser.parse_args(argv)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _number(option: str, text: str | None) -> float | None:
    try:
        return None if text is None else parse_fraction(text)
    except ValueError as error:
        raise UserError(f"{option} {error}") from None


def _numbers(option: str, text: str | None) -> list[float] | None:
    return (
        None if text is None else [number for part in text.split(",") if (number := _number(option, part)) is not None]
    )


def _join(device: str | None) -> tuple[PartialState, torch.device]:
    """All processes, and the device of this one."""
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
    arguments = _arguments(argv)
    attacks = tuple(parse_attack(name) for name in _names(arguments.attacks))
    state, device = _join(arguments.device)
    shards = open_shards(arguments.data, "--data")
    options = TargetOptions(
        _names(arguments.checkpoint),
        _names(arguments.weights),
        arguments.arch,
        _numbers("--mean", arguments.mean),
        _numbers("--std", arguments.std),
    )
    found = find_targets(arguments.what, options)
    if found.run is not None:
        check_unseen(found.run, shards)
    source = None
    if arguments.transfer_from is not None:
        options = TargetOptions(checkpoints=("best",), arch=arguments.source_arch)
        (source,) = find_targets(arguments.transfer_from, options).targets
        source = replace(source, label=Path(arguments.transfer_from).name)
    eps, step = _number("--eps", arguments.eps), _number("--step", arguments.step)
    request = Request(
        attacks,
        request_threat(arguments.what, found.threat, arguments.norm, eps, step),
        arguments.images,
        arguments.aa_images,
        arguments.batch_size,
        arguments.seed,
        source,
        arguments.drop_broken,
    )
    out = arguments.out or found.results
    if out.is_dir() or out.suffix != ".json":
        raise UserError(f"--out {out} must be a .json file (the per-image outcomes go beside it). Choose another name.")
    on_main(state, shards.verify)
    for target in [*found.targets, *([] if source is None else [source])]:
        check_fits(target.model, shards, arguments.what)
        target.model.to(device)
    results = evaluate(found.targets, shards, request, out)
    if state.is_main_process:
        print(f"{results_text(results, [target.label for target in found.targets])}\nwritten to {out}")


if __name__ == "__main__":
    run_cli(main)
