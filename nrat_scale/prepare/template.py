"""Write a commented recipe that fits given shards: a first guess for every value that depends on the data."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nrat_scale.core.errors import UserError, printable, quoted
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.data.index import INDEX
from nrat_scale.data.plan import mix_counts
from nrat_scale.data.shards import ShardSet, check_validation_fits, open_shards
from nrat_scale.labels import UNKNOWN, NoiseSpec
from nrat_scale.remote.address import is_remote

_FRACTION = 0.7  # generated part of a batch
_MOST_VALIDATION = 1024  # images, unless a rare class needs more
_MOST_EPOCHS = 200
_SHOWN_CLASSES = 8
_PLAIN = re.compile(r"[A-Za-z0-9_.~@-]*/[A-Za-z0-9_./~@-]*")  # a path that needs no quotes in YAML


@dataclass(frozen=True)
class _Model:
    """A model with the optimizer and the number of steps that suit it."""

    text: str  # of the section `model`
    optim: str
    num_steps: int
    batch_size: int


_SMALL = _Model(
    "name: cnn4  # small, trains on a CPU; wider with kwargs: {width: 32, hidden: 128}\n  kwargs: {width: 16, hidden: 64}",
    "name: adamw\n  lr: 0.002  # at 0.005 NRAT collapses to one class on some sets",
    3000,
    128,
)
_RESNET = "name: resnet18_cifar  # wrn28_10_silu is the larger one of the published recipes"
_SGD = "name: sgd\n  lr: 0.05  # lower it if training collapses to one class\n  weight_decay: 5.0e-4"
_LARGE = _Model(_RESNET, _SGD, 20_000, 128)
_HUGE = _Model(f"{_RESNET}; at this image size a GPU is needed", _SGD, 20_000, 64)

# Attacks of data sets in the literature: eps, step, number of steps.
_THREATS = {"digits": ("0.2", "0.05", 5), "mnist": ("0.3", "0.05", 10), "fashion_mnist": ("0.1", "0.03", 5)}


_TEXT = """\
# {what} ({names}).
#
#   {train}
#   {evaluate}
#
# Written by `python -m nrat_scale.prepare template`. The values are first guesses from the shards; docs/recipe_keys.md has all keys.
name: {name}
seed: 0
precision: fp32  # bf16 is faster on a GPU

model:
  {model}

objective:
  name: nrat  # or trades, mart, pgd_at, ...; natural trains without an attack

threat:
  eps: {eps}  # the largest change of a pixel, as a fraction of its range
  step: {step}
  num_steps: {num_steps}

data:
  batch_size: {batch}
  real:
    shards: {root}
    noise: {noise}
{generated}{validation}
  augment: {{crop: {crop}, flip: {flip}}}  # {flip_reason}

optim:
  {optim}
  schedule: onecycle
  pct_start: 0.2

ema:
  decay: 0.99

train:
  epochs: {epochs}  # of {steps} steps
  validation_attack: pgd10
  validate_every: {every}
  save_every: {every}
"""


def write_template(root: str, out: Path, generated: str | None = None, validation: str | None = None) -> str:
    """Write a recipe for the shards at `root` to the new file `out`; returns what to run next.

    Args:
        root: folder of shards, or one with `train` (and perhaps `test`) in it, or an address.
        generated, validation: further shards, for `data.generated.shards` and `data.validation.shards`.

    Raises:
        UserError: `out` exists, there are no such shards, or they do not fit together.
    """
    if out.exists() or out.suffix not in (".yaml", ".yml"):
        problem = "exists already and is never overwritten" if out.exists() else "is not a .yaml file"
        raise UserError(f"{out} {problem}. Choose another name with --out.")
    for path in (root, str(out), generated, validation):
        if path is not None and path != printable(path):
            raise UserError(
                f"The path {quoted(path)} has unprintable characters. Rename it, so that a recipe can hold it."
            )
    if not is_remote(root) and not (Path(root) / INDEX).is_file() and (Path(root) / "train" / INDEX).is_file():
        root = str(Path(root) / "train")
    shards = open_shards(root, "the training images", commands=_commands(root))
    more = None if generated is None else open_shards(generated, "--generated")
    if more is not None and (more.image_shape, more.num_classes) != (shards.image_shape, shards.num_classes):
        there, here = (f"{list(s.image_shape)} and {s.num_classes} classes" for s in (more, shards))
        raise UserError(f"--generated {generated} has image shape {there}, but {root} has {here}. Give fitting images.")
    apart = None if validation is None else open_shards(validation, "--validation")
    for kind, others in (("real", shards), ("generated", more)):
        if apart is not None and others is not None:
            check_validation_fits(apart, others, kind)
    test = _test_folder(root)
    commands = _next(out, _name(root), test)
    text, summary = _recipe(shards, more, apart, (root, generated, validation), commands)
    make_folder(out.parent)
    write_atomically(out, text)
    listed = "\n".join(f"  {line}" for line in commands)
    where = "" if test else "\nTEST_SHARDS are images that are not in the training shards, prepared in the same way."
    return f"{out}: {summary}. Train, then measure it with:\n{listed}{where}"


def _recipe(
    shards: ShardSet,
    generated: ShardSet | None,
    apart: ShardSet | None,
    paths: Sequence[str | None],
    commands: Sequence[str],
) -> tuple[str, str]:
    """(the recipe, a summary of its choices); `paths` are those of the three sets as the user wrote them."""
    root = str(paths[0])
    height, width, channels = shards.image_shape
    side, model = min(height, width), _model(shards)
    held_out = 0 if apart is not None else _num_held_out(shards)
    left = len(shards) - held_out
    batch = _batch_size(model.batch_size, left, None if generated is None else len(generated))
    steps = -(-left // batch)
    epochs = min(_MOST_EPOCHS, max(10, -(-model.num_steps // steps)))
    eps, step, num_steps = _threat(shards)
    flip, flip_reason = _flip(shards)
    colour = "grey" if channels == 1 else "RGB"
    what = f"{len(shards)} images of {height} x {width} pixels, {colour}, in {shards.num_classes} classes"
    text = _TEXT.format(
        what=what,
        names=printable(", ".join(shards.class_names[:_SHOWN_CLASSES]))
        + ", ..." * (shards.num_classes > _SHOWN_CLASSES),
        train=commands[0],
        evaluate=commands[1],
        name=_scalar(_name(root)),
        model=model.text,
        eps=eps,
        step=step,
        num_steps=num_steps,
        batch=batch,
        root=_scalar(root),
        noise=_noise(shards),
        generated=_generated(paths[1], batch),
        validation=_validation(paths[2], apart, held_out),
        crop=max(1, side // 8),
        flip=flip,
        flip_reason=flip_reason,
        optim=model.optim,
        epochs=epochs,
        steps=steps,
        every=max(1, epochs // 20),
    )
    return text, f"{what}; {model.text.split()[1]}, eps {eps}, {epochs} epochs of {steps} steps"


def _next(out: Path, name: str, test: str | None) -> list[str]:
    data = "TEST_SHARDS" if test is None else shlex.quote(test)
    return [
        f"accelerate launch -m nrat_scale.train {shlex.quote(str(out))}",
        f"python -m nrat_scale.evaluate runs/{name} --data {data} --attacks natural,pgd20,aa",
    ]


def _commands(root: str) -> list[str]:
    """What makes shards of the folder `root`, if it is one of images in subfolders."""
    path = Path(root)
    is_tree = not is_remote(root) and path.is_dir() and any(child.is_dir() for child in path.iterdir())
    return [f"python -m nrat_scale.prepare folder {shlex.quote(root)} --size 32 --out SHARDS"] if is_tree else []


def _test_folder(root: str) -> str | None:
    """The folder `test` beside a folder `train`."""
    path = Path(root)
    is_split = not is_remote(root) and path.name == "train" and (path.with_name("test") / INDEX).is_file()
    return str(path.with_name("test")) if is_split else None


def _name(root: str) -> str:
    """A name for the run: the last folder that is not only called train."""
    parts = [part for part in re.split(r"[/\\]+", root.rstrip("/")) if part.strip(".")]
    if len(parts) > 1 and parts[-1] in ("train", "training"):
        parts.pop()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "").strip("-.") or "mine"


def _model(shards: ShardSet) -> _Model:
    height, width, channels = shards.image_shape
    if (channels == 1 and max(height, width) <= 32) or max(height, width) < 16:
        return _SMALL
    return _LARGE if max(height, width) <= 64 else _HUGE


def _num_held_out(shards: ShardSet) -> int:
    """A tenth, or as many as give every class an image in proportion."""
    counts = [count for count in shards.class_counts if count]
    needed = -(-len(shards) // min(counts))
    size = max(min(len(shards) // 10, _MOST_VALIDATION), needed)
    if size > len(shards) // 3:
        rarest = shards.class_names[shards.class_counts.index(min(counts))]
        raise UserError(
            f"{shards.folder} has only {min(counts)} of {len(shards)} images of class {quoted(rarest)}, too few to hold some out "
            "of every class. Give images for validation with --validation SHARDS."
        )
    return size


def _batch_size(most: int, left: int, generated: int | None) -> int:
    """A power of two of at least ten steps an epoch, if there are enough images; never more than there are."""
    size = min(most, max(16, 1 << max(0, left // 10).bit_length() - 1))
    if generated is None:
        return min(size, left)
    while size > 2 and not all(c <= n for c, n in zip(mix_counts(size, _FRACTION), (left, generated), strict=True)):
        size -= 1
    return size


def _threat(shards: ShardSet) -> tuple[str, str, int]:
    """(eps, step, number of steps)."""
    height, width, channels = shards.image_shape
    if shards.dataset in _THREATS:
        return _THREATS[shards.dataset]
    if channels == 1:
        return "0.1", "0.025", 10
    return ("8/255", "2/255", 10) if max(height, width) <= 64 else ("4/255", "1/255", 10)


def _flip(shards: ShardSet) -> tuple[str, str]:
    if shards.image_shape[2] == 1 or shards.dataset == "svhn":
        return "false", "a mirrored digit or letter is another one; set flip: true if yours keep their class"
    return "true", "set flip: false if a mirrored image has another class"


def _noise(shards: ShardSet) -> str:
    kind = NoiseSpec().settled(shards.dataset).kind
    if kind == UNKNOWN:
        return f"{{kind: {kind}}}  # nobody has checked these labels; none, if you know that they are right"
    return f"{{kind: {kind}}}  # its labels are clean; to inject noise: {{kind: symmetric, rate: 0.4, seed: 0}}"


def _generated(path: str | None, batch: int) -> str:
    if path is None:
        return ""
    real, more = mix_counts(batch, _FRACTION)
    return f"""\
  generated:
    shards: {_scalar(path)}
    fraction: {_FRACTION}  # a batch has {real} real and {more} generated images
"""


def _validation(path: str | None, apart: ShardSet | None, held_out: int) -> str:
    if path is None or apart is None:
        return f"  validation: {{size: {held_out}}}  # training images held out to select the checkpoint, with their labels as given"
    return f"""\
  validation:  # selects the checkpoint
    shards: {_scalar(path)}
    size: {len(apart)}
    labels: given  # clean, if you know that these labels are right"""


def _scalar(text: str) -> str:
    """`text` as a YAML string, which OmegaConf does not interpolate."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text.replace("${", "\\${"), ensure_ascii=False)
