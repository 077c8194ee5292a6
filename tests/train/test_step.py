"""One step: random numbers of the global batch, the textbook's result at the textbook's cost, low precision."""

from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from bench import step as bench_step
from nrat_scale.recipe import load_recipe
from nrat_scale.train.setup import prepare_for_skipped_steps, start
from nrat_scale.train.step import micro_batches, train_step


@pytest.mark.parametrize("world_size", [2, 4])
def test_images_labels_augmentation_and_noise_are_those_of_the_global_batch(
    recipe_path: Path, tmp_path: Path, world_size: int
) -> None:
    """Each rank has exactly its slice of what is drawn for the global batch."""
    overrides = ["data.augment.flip=true", "data.augment.crop=2", f"run_dir={tmp_path / 'run'}"]
    state = start(load_recipe(recipe_path, overrides))
    whole = [micro_batches(state, batch) for batch in state.data.batches(5, 8)]
    ranks = [
        [micro_batches(state, batch) for batch in state.data.batches(5, 8, rank, world_size)]
        for rank in range(world_size)
    ]
    for number, parts in enumerate(whole):
        (one,) = parts
        slices = [next(iter(rank[number])) for rank in ranks]
        for name in ("x", "y", "clean", "noise"):
            assert torch.equal(torch.cat([getattr(part, name) for part in slices]), getattr(one, name)), name


@pytest.mark.medium
@pytest.mark.parametrize(("objective", "most"), [("nrat", 27), ("trades", 27), ("dm_at", 26)])
def test_the_step_is_the_textbook_step_and_costs_no_more(tmp_path: Path, objective: str, most: int) -> None:
    """In float64 the same adversarial images, pixel for pixel, and the same loss; by torch's FLOP formulas at most 27
    forward passes for each image, and 26 if the natural logits are used twice."""
    bench_step.make_images(tmp_path, 64)
    differing, loss, forwards = bench_step.equality(tmp_path, "resnet18_cifar", objective, 2)
    assert differing == 0
    assert abs(loss) < 1e-9
    assert most - 1 < forwards <= most


def test_mixed_precision_starts_in_float32(recipe_path: Path, tmp_path: Path) -> None:
    """Under bf16 the first attack step of a divergence from a tiny start is computed in float32, the others are not."""
    state = start(load_recipe(recipe_path, ["precision=bf16", "threat.num_steps=3", f"run_dir={tmp_path / 'run'}"]))
    types: list[torch.dtype] = []
    for module in (state.attack_model.module, state.attack_model.low):
        module.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    train_step(state, next(state.data.batches(0, 1)))
    assert types == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]  # natural logits, three steps


def test_a_step_that_overflows_under_loss_scaling_changes_nothing(wide_path: Path, tmp_path: Path) -> None:
    """As under fp16: the first step overflows and is skipped. Weights, momentum, BatchNorm and sums stay as they were, the
    step is no error, and the second one is applied."""
    state = start(load_recipe(wide_path, ["objective.lam=1e4", f"run_dir={tmp_path / 'run'}"]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
    state.accelerator.scaler = scaler
    state.optimizer = AcceleratedOptimizer(state.optimizer.optimizer, scaler=scaler)
    prepare_for_skipped_steps(state)
    kept = [*state.base.state_dict().values(), state.sums, state.guard.sums]
    kept += [value["momentum_buffer"] for value in state.optimizer.state.values()]
    for batch in state.data.batches(0, 2):
        before = [tensor.detach().clone() for tensor in kept]
        train_step(state, batch)
        assert state.checks.read() is None
        changed = [not torch.equal(tensor, old) for tensor, old in zip(kept, before, strict=True)]
        assert all(changed) if state.step else not any(changed)
        state.step += 1
