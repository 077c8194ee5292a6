"""How long the cells that are not finished take on this machine."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nrat_scale import models
from nrat_scale.core.errors import UserError
from nrat_scale.cost import TRAINED, forward_equivalents
from nrat_scale.data.shards import ShardSet, open_shards
from nrat_scale.data.training_data import normalisation
from nrat_scale.evaluate.key import machine_facts
from nrat_scale.report.run import number_at, value_at
from nrat_scale.reproduce.cells import Place
from nrat_scale.reproduce.jobs import duration
from nrat_scale.reproduce.table_text import counted

_TIMED_SECONDS = 2.0  # of forward and backward passes
_COSTS = ("train_seconds", "evaluate_seconds", "steps", "images", "forward_equivalents")


def forecast(missing: Sequence[Place], finished: Sequence[Mapping[str, Any]]) -> str:
    """The hours of these cells, in sentences: by the speed of cells finished on this machine, or of a few passes of the model.

    Args:
        finished: content of cell.json of cells of the same grid.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    here = str(machine_facts(device or torch.device("cpu"), 1)["device_name"])
    finished = [
        cell
        for cell in finished
        if all(number_at(cell, f"cost.{key}") for key in _COSTS)
        and str(value_at(cell, "cost.hardware", "")).startswith(here)
    ]
    lines = []
    for name in dict.fromkeys(place.cell.edition.name for place in missing):
        places = [place for place in missing if place.cell.edition.name == name]
        lines.append(f"{name}: {_of_edition(places, [cell for cell in finished if cell.get('edition') == name])}")
    return "\n".join(lines)


def _of_edition(places: Sequence[Place], finished: Sequence[Mapping[str, Any]]) -> str:
    device = "GPU" if torch.accelerator.is_available() else "CPU"
    data = places[0].recipe.data
    part = data.real if data.real.shards else data.generated
    try:
        shards = open_shards(str(part.shards))
    except UserError:
        commands = f":\n{part.prepare}" if part.prepare else "."
        return f"{counted(len(places), 'cell')}; their hours are not known without the training data. Prepare them first{commands}"
    passes = [_passes(place, shards) for place in places]
    if finished:
        done = sum(
            cell["cost"]["steps"] * cell["cost"]["images"] * cell["cost"]["forward_equivalents"] for cell in finished
        )
        train, attack = (sum(cell["cost"][key] for cell in finished) for key in _COSTS[:2])
        seconds, evaluation = train / done * sum(passes), attack / len(finished) * len(places)
        hardware = ", ".join(sorted({str(value_at(cell, "cost.hardware", "unknown")) for cell in finished}))
        parts = f"training {duration(seconds)}, evaluation {duration(evaluation)}"
        source = f"by {counted(len(finished), 'finished cell')} on {hardware}"
        return f"{counted(len(places), 'cell')}: about {(seconds + evaluation) / 3600:.3g} {device}-hours ({parts}; {source})."
    seconds = _seconds_per_pass(places[0], shards) * sum(passes)
    return (
        f"{counted(len(places), 'cell')}: about {seconds / 3600:.3g} {device}-hours of training, by the speed of a few passes of the model "
        "here; evaluation comes on top and is known once a cell is finished."
    )


def _passes(place: Place, shards: ShardSet) -> float:
    """Forward passes of one image that a training costs."""
    recipe = place.recipe
    samples = recipe.data.epoch_samples or len(shards)
    steps = recipe.train.epochs * math.ceil(samples / recipe.data.batch_size)
    return min(steps, recipe.train.max_steps or steps) * recipe.data.batch_size * forward_equivalents(recipe)


def _seconds_per_pass(place: Place, shards: ShardSet) -> float:
    """Seconds of one forward pass of one image, a third of a pass that trains, on this machine."""
    recipe, channels = place.recipe, shards.image_shape[2]
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    arguments = models.model_arguments(recipe.model, shards.num_classes, channels, *normalisation(shards))
    with torch.random.fork_rng(devices=[]):
        model = models.create(recipe.model.name, arguments, trust_code=True).to(device).train()
        x = torch.rand(recipe.data.batch_size, channels, *shards.image_shape[:2], device=device)
    began, count = 0.0, 0
    while count < 2 or time.perf_counter() - began < _TIMED_SECONDS:
        model(x).sum().backward()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        count += 1
        if count == 1:  # the first pass allocates memory
            began = time.perf_counter()
    return (time.perf_counter() - began) / ((count - 1) * len(x) * TRAINED)
