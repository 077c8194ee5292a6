"""Command line of evaluation: `python -m nrat_scale.evaluate WHAT --data SHARDS`."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from nrat_scale.attacks import NORMS
from nrat_scale.core.distributed import join_processes, on_main, use_all_cores
from nrat_scale.core.errors import UserError, run_cli
from nrat_scale.data.shards import open_shards
from nrat_scale.evaluate.measures import KNOWN, parse_attack
from nrat_scale.evaluate.request import Request, check_fits, check_unseen, parse_numbers, requested_threat
from nrat_scale.evaluate.run import evaluate
from nrat_scale.evaluate.targets import CHECKPOINTS, WEIGHTS, TargetOptions, find_targets

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


def _state(arguments: argparse.Namespace) -> tuple[PartialState, torch.device]:
    """The processes, and the device of this one."""
    device = arguments.device
    on_cpu = device is not None and torch.device(device).type == "cpu"
    state = join_processes(on_cpu=on_cpu)
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
    mean, std = parse_numbers("mean", arguments.mean), parse_numbers("std", arguments.std)
    found = find_targets(
        arguments.what, TargetOptions(_list(arguments.checkpoint), _list(arguments.weights), arguments.arch, mean, std)
    )
    if found.run is not None:
        check_unseen(found.run, shards)
    source = None
    if arguments.transfer_from is not None:
        options = TargetOptions(checkpoints=("best",), arch=arguments.source_arch)
        source = replace(
            find_targets(arguments.transfer_from, options).subjects[0], label=Path(arguments.transfer_from).name
        )
    threat = requested_threat(arguments, found.threat)
    on_main(state, shards.verify)
    for subject in [*found.subjects, *([] if source is None else [source])]:
        check_fits(subject.model, shards, arguments.what)
        subject.model.to(device)
    plan = Request(
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
