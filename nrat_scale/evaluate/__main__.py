"""Command line of evaluation: `python -m nrat_scale.evaluate WHAT --data SHARDS`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from nrat_scale.attacks import NORMS, SPACES, parse_fraction
from nrat_scale.core.errors import run_cli
from nrat_scale.evaluate.api import DEFAULT_ATTACKS, evaluate
from nrat_scale.evaluate.attacks import attack_usage, parse_attack
from nrat_scale.evaluate.curves import parse_curve
from nrat_scale.evaluate.targets import CHECKPOINTS, WEIGHT_CHOICES


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
    add("--attacks", type=attacks, help=f"{attack_usage()} (default: {DEFAULT_ATTACKS}; none with --curve)")
    curve = "accuracy against eps or attack steps, such as eps=0,2/255,8/255 or steps=1,10,50; may be given twice"
    add("--curve", action="append", default=[], type=_option(parse_curve), metavar="AXIS=VALUES", help=curve)
    add("--checkpoint", type=names, default=",".join(CHECKPOINTS), help="of a run (default: %(default)s)")
    weights = "of a run: evaluated (the EMA if there is one), ema, raw (default: %(default)s)"
    add("--weights", type=names, default=WEIGHT_CHOICES[0], help=weights)
    add(
        "--arch",
        help="of a weight file: a model that timm knows, or MODULE:FACTORY, which is imported (also of a release)",
    )
    arch_args = "further arguments of --arch, such as width=8,hidden=32"
    add("--arch-args", type=_option(_arguments_of), default={}, metavar="NAME=VALUE,...", help=arch_args)
    add("--mean", type=numbers, help="normalisation of a weight file, comma-separated (default: the model's)")
    add("--std", type=numbers, help="the same")
    key = "of a weight file with several sets of weights (raw and averaged): that to load, such as ema"
    add("--weights-key", metavar="KEY", help=key)
    add("--trust-code", action="store_true", help="import the model's code of a run outside the working directory")
    add("--transfer-from", metavar="WHAT", help="make the adversarial images on this model instead")
    add("--source-arch", metavar="ARCH", help="--arch of --transfer-from")
    add("--source-weights-key", metavar="KEY", help="--weights-key of --transfer-from")
    drop = "skip images that an earlier attack broke (not for AutoAttack): faster, but the numbers are cumulative"
    add("--drop-broken", action="store_true", help=drop)
    add("--images", type=int, help="number of images, a fixed seeded choice (default: all; for curves at most 1000)")
    add("--aa-images", type=int, help="the same for AutoAttack alone")
    add("--norm", choices=NORMS, help="default: the recipe's, else linf")
    space = "released_code: the threat space of NRAT's released code, another threat model (default: the recipe's)"
    add("--space", choices=SPACES, help=space)
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


def _arguments_of(text: str) -> dict[str, Any]:
    """`width=8,global_pool=max` as a dictionary; values are read as YAML scalars."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(name.strip().isidentifier() and equals and value.strip() for name, equals, value in pairs):
        raise ValueError(f"'{text}' is not NAME=VALUE,NAME=VALUE")
    values = {name.strip(): yaml.safe_load(value) for name, _, value in pairs}
    if taken := values.keys() & {"mean", "std", "weights_key", "arch", "device", "model", "source"}:
        raise ValueError(f"{sorted(taken)[0]} is not an argument of the architecture; it has an option of its own")
    return values


def _option(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows the message of an `ArgumentTypeError` but not of other `ValueError`s."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    given = vars(_arguments(argv))
    evaluation = evaluate(given.pop("what"), given.pop("data"), **given)
    if PartialState().is_main_process:
        print(f"{evaluation}\nwritten to {evaluation.path}")


if __name__ == "__main__":
    run_cli(main)
