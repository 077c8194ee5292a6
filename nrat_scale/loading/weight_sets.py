"""The sets of weights in a file: the raw weights, an average of them, a teacher, under whatever names and containers.

The names of the architecture decide, not a list of containers: a tensor belongs to the set of what precedes the architecture's
name in its own, `ema.module.conv1.weight` to `ema.module`. Nested dictionaries are read as such names too.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nrat_scale.core.errors import UserError, quoted

# Inserted into names by torch.compile, FSDP, activation checkpointing and (Distributed)DataParallel.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
_COUNTERS = frozenset({"n_averaged", "num_updates", "decay", "step", "initted"})  # of averages: one number each
_CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}  # of a normalisation
_NOT_WEIGHTS = re.compile(r"(.*_)?(optimizer|optim|opt|scheduler|sched|scaler)s?(_states?|_state_dict)?")
_AVERAGES = frozenset({"ema", "swa", "average", "averaged", "shadow", "polyak"})  # words in keys of averages
_SLOTS = frozenset({"momentum", "exp", "square", "sq", "velocity", "mu", "nu"})  # words in keys of an optimizer's state
_DEEPEST, _MOST_ENTRIES = 8, 500_000  # of nested dictionaries and lists
_ROOT = "."  # on the command line, the set whose names have nothing before them
UNUSED_BATCH_COUNT = "num_batches_tracked"  # of BatchNorm: torch before 0.4.1 had none, and evaluation does not use it

Constants = dict[str, list[list[float]]]  # "mean" and "std" -> the different values found in a file


@dataclass(frozen=True)
class Saved:
    """A tensor in a file."""

    tensor: Tensor
    container: str  # the path of the dictionary that holds it


@dataclass(frozen=True)
class WeightSet:
    """Tensors of a file that are one model's."""

    path: str  # what precedes or surrounds the architecture's names; "" for nothing
    names: dict[str, str]  # the architecture's name -> that in the file


def flatten(
    content: Any, layouts: Sequence[Mapping[str, Tensor]] = (), *, optimizers: bool = False
) -> dict[str, Saved]:
    """All tensors of nested containers under dotted names, except those of optimizers and the like.

    Args:
        content: of a file.
        layouts: the architecture's parameters, and its state dict. A list of tensors with as many dimensions as one of them
            has (`shadow_params` of torch_ema and diffusers) takes its names.
        optimizers: also the tensors of optimizers and the like.

    Raises:
        UserError: there are too many entries.
    """
    found: dict[str, Saved] = {}
    visited = 0

    def visit(value: Any, path: tuple[str, ...]) -> None:
        nonlocal visited
        visited += 1
        if visited > _MOST_ENTRIES:  # a file of some bytes can contain one dictionary a million times
            raise UserError("it holds too many nested entries for a weight file.")
        if isinstance(value, Tensor):
            found[".".join(path)] = Saved(value, ".".join(path[:-1]))
        elif isinstance(value, Mapping | list | tuple) and len(path) < _DEEPEST:
            for key, inner in _entries(value, layouts):
                if optimizers or not _NOT_WEIGHTS.fullmatch(key):
                    visit(inner, (*path, key))

    visit(content, ())
    return found


def _entries(value: Any, layouts: Sequence[Mapping[str, Tensor]]) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return ((str(key), inner) for key, inner in value.items())
    dimensions = [item.ndim if isinstance(item, Tensor) else None for item in value]
    fitting = (names for names in layouts if [tensor.ndim for tensor in names.values()] == dimensions)
    return zip(next(fitting, map(str, range(len(value)))), value, strict=True)


def find_sets(saved: Iterable[str], expected: Iterable[str]) -> list[WeightSet]:
    """The sets of weights among the names in a file, in its order: those with a quarter of the `expected` names or more.

    A quarter, because averages often lack the buffers.
    """
    saved = list(saved)
    wanted = {name for name in expected if not name.endswith(UNUSED_BATCH_COUNT)}
    groups = _by_prefix(saved, {*wanted, *expected})
    sets, claimed = _largest(groups, wanted, set())
    # What is left may have an affix elsewhere in its names (`conv1.weight_ema`, `ema_conv1.weight`).
    left = [name for name in saved if name not in claimed]
    if sets and len(left) * 4 >= len(wanted):
        sets += _largest(_by_affix(left, wanted), wanted, claimed)[0]
    position = {name: number for number, name in enumerate(saved)}
    return sorted(sets, key=lambda found: min(position[name] for name in found.names.values()))


_Groups = dict[tuple[str, Any], dict[str, list[str]]]  # (path, how it was found) -> architecture's name -> file's names


def _by_prefix(saved: Iterable[str], expected: set[str]) -> _Groups:
    wrappers = _WRAPPERS - {part for name in expected for part in name.split(".")}
    dotless = {name.replace(".", ""): name for name in expected}  # as LitEma of latent diffusion saves names
    groups: _Groups = defaultdict(lambda: defaultdict(list))
    for name in saved:
        parts = name.split(".")
        for start, first in enumerate(parts):
            if first in wrappers:
                continue
            suffix = ".".join(part for part in parts[start:] if part not in wrappers)
            if suffix in expected:
                groups[".".join(parts[:start]), ""][suffix].append(name)
            elif start == len(parts) - 1 and suffix in dotless:
                groups[".".join(parts[:start]), "dotless"][dotless[suffix]].append(name)
    return groups


def _by_affix(saved: Iterable[str], expected: set[str]) -> _Groups:
    """Groups by the one piece of text that a name of the file has more than the architecture's."""
    groups: _Groups = defaultdict(lambda: defaultdict(list))
    for name in saved:
        for wanted in expected:
            affix = _inserted(name, wanted) if len(name) > len(wanted) else None
            if affix:
                groups[affix, "affix"][wanted].append(name)
    return groups


def _inserted(name: str, wanted: str) -> str | None:
    """The text without which `name` is `wanted`, without the dots and underscores at its ends; None if there is none."""
    more = len(name) - len(wanted)
    at = next((i for i, (a, b) in enumerate(zip(name, wanted, strict=False)) if a != b), len(wanted))
    if name[at + more :] != wanted[at:]:
        return None
    start = at  # the same text may begin earlier: of `bn.ema.e`, cut to `bn.e`, `ema.` instead of `ma.e`
    while (
        start
        and name[start - 1] == name[start + more - 1]
        and name[start] not in "._"
        and name[start + more - 1] not in "._"
    ):
        start -= 1
    return name[start : start + more].strip("._")


def _largest(groups: _Groups, wanted: set[str], claimed: set[str]) -> tuple[list[WeightSet], set[str]]:
    """The groups with a quarter of the `wanted` names, each file's name in the largest group only."""
    sets, claimed = [], set(claimed)
    for (path, _), found in sorted(groups.items(), key=lambda item: (-len(item[1]), len(item[0][0]))):
        own = {name: [saved for saved in names if saved not in claimed] for name, names in found.items()}
        own = {name: names for name, names in own.items() if names}
        if len(own.keys() & wanted) * 4 >= len(wanted):
            twice = next((names for names in own.values() if len(names) > 1), None)
            if twice:
                raise UserError(f"it holds one tensor twice, as {quoted(twice[0])} and {quoted(twice[1])}.")
            sets.append(WeightSet(path, {name: names[0] for name, names in own.items()}))
            claimed |= {names[0] for names in own.values()}
    return sets, claimed


def hidden_sets(everything: Iterable[str], expected: Iterable[str]) -> list[WeightSet]:
    """The sets of weights under keys that are named like an optimizer's: averages (`optimizer.ema`), and a whole state dict.

    An optimizer has its own tensors of each parameter's shape (`momentum`, `exp_avg`, fp32 masters): those are no sets.
    """
    under = [
        name
        for name in everything
        if any(_NOT_WEIGHTS.fullmatch(part) for part in name.split(".")) and not _words(name) & _SLOTS
    ]
    found = find_sets(under, expected)
    return [one for one in found if _words(one.path) & _AVERAGES or _NOT_WEIGHTS.fullmatch(one.path.rpartition(".")[2])]


def few_averaged(
    everything: Mapping[str, Saved], sets: Sequence[WeightSet], expected: Mapping[str, Tensor]
) -> list[str]:
    """The names of averaged tensors that are too few for a set: under a key such as `ema`, named and shaped as the model's."""
    claimed = {name for found in sets for name in found.names.values()}
    few = []
    for name, entry in everything.items():
        if name in claimed or _words(name) & _SLOTS:
            continue
        parts = name.split(".")
        for start in range(1, len(parts)):
            wanted = expected.get(".".join(parts[start:]))
            if wanted is not None and wanted.shape == entry.tensor.shape and _words(*parts[:start]) & _AVERAGES:
                few.append(name)
                break
    return few


def _words(*names: str) -> set[str]:
    return {word for name in names for word in re.split(r"[._]", name.lower())}


def choose(sets: Sequence[WeightSet], key: str | None, saved: Mapping[str, Saved], where: str) -> WeightSet:
    """The only set, or that of `key`: its path, or a beginning of it.

    Raises:
        UserError: there are several sets and no key, or the key names none or more than one of them.
    """
    path = None if key is None else key.strip(".")
    exact = [found for found in sets if found.path == path]
    under = [found for found in sets if path is None or found.path == path or found.path.startswith(f"{path}.")]
    chosen = exact if len(exact) == 1 else under
    if len(chosen) == 1:
        return chosen[0]
    paths = list(map(quoted, _short_paths(chosen or sets, saved)))
    shown = ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")
    if not chosen:
        raise UserError(f"{where} has no weights under {quoted(key)}; it has those of {shown}.")
    raise UserError(
        f"{where} holds {len(chosen)} sets of weights: {shown}. Choose one with weights_key=, on the command line "
        "--weights-key (of --transfer-from: --source-weights-key)."
    )


def _short_paths(sets: Sequence[WeightSet], saved: Mapping[str, Saved]) -> list[str]:
    """For each set the beginning of its path down to its dictionary, and as far as no other set has the same."""
    paths = [found.path.split(".") for found in sets]
    short = []
    for found, parts in zip(sets, paths, strict=True):
        container = saved[next(iter(found.names.values()))].container.split(".")
        least = len(container) if parts[: len(container)] == container else 1
        others = [other for other in paths if other is not parts]
        unique = (n for n in range(least, len(parts)) if all(other[:n] != parts[:n] for other in others))
        short.append(".".join(parts[: next(unique, len(parts))]) or _ROOT)
    return short


def left_over(saved: Mapping[str, Saved], chosen: WeightSet, sets: Sequence[WeightSet]) -> tuple[list[str], Constants]:
    """(names of the chosen set's dictionaries that are no part of any set, its normalisation constants).

    Constants belong to the set whose path shares most with theirs.
    """
    containers = {saved[name].container for name in chosen.names.values()}
    claimed = {name for found in sets for name in found.names.values()}
    constants: Constants = {"mean": [], "std": []}
    more = []
    for name, entry in saved.items():
        if name in claimed or entry.container not in containers:
            continue
        kind, last = _CONSTANTS.get(name.rpartition(".")[2]), name.rpartition(".")[2]
        if kind is not None and entry.tensor.numel() <= 4:
            shared = {found.path: _shared_parts(name, found.path) for found in (chosen, *sets)}
            values = entry.tensor.flatten().double().tolist()
            if shared[chosen.path] == max(shared.values()) and values not in constants[kind]:
                constants[kind].append(values)
        elif last not in _COUNTERS or entry.tensor.numel() != 1:
            more.append(name)
    return more, constants


def _shared_parts(a: str, b: str) -> int:
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((number for number, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1)
