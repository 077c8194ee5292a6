"""Label refinement in training: steps as in the authors' code, exact resumption, what graphs cannot run."""

import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.core.seeds import derive, hash64, uniform01
from nrat_scale.labels import corrupt
from nrat_scale.optim import build_optimizer, set_rates
from nrat_scale.recipe import load_recipe
from nrat_scale.train.graphs import use_graphs
from nrat_scale.train.loop import train
from nrat_scale.train.setup import start
from nrat_scale.train.step import micro_batches, train_step
from tests.support.runs import digest

METHODS = {
    "adr": [],
    "trades_adr": [],
    "te": ["objective.refine.te_start=0.3", "objective.refine.te_full=0.7"],
    "trades_te": ["objective.refine.te_start=0.3", "objective.refine.te_full=0.7"],
    "sglr": ["objective.refine.sglr_start=0.3"],
    "noilin": ["objective.refine.noilin_window=1", "objective.refine.noilin_first=0.4"],
    "trades_noilin": [],
}
EPS, STEP = 0.1, 0.05


class Textbook:
    """The methods as their authors' code has them: one image table, one model, no options."""

    def __init__(self, name: str, model: nn.Module, num_images: int, num_steps: int, per_epoch: int, seed: int) -> None:
        self.trades, self.method = name.startswith("trades"), name.removeprefix("trades_")
        self.model, self.teacher = copy.deepcopy(model), copy.deepcopy(model).eval()
        self.table = torch.full((num_images, 10), math.nan, dtype=torch.float64)
        self.num_steps, self.per_epoch, self.seed = num_steps, per_epoch, seed

    def label(self, x: Tensor, y: Tensor, step: int, places: np.ndarray) -> Tensor:
        """The label of the losses, before the attack."""
        if self.method == "adr":
            way = (1 + math.cos(math.pi * step / self.num_steps)) / 2
            p = F.softmax(self.teacher(x).detach() / (2.0 + 0.5 * way), dim=1)
            own = (0.95 - 0.25 * way) - (p.max(1).values - p[torch.arange(len(y)), y])
            own = own.clamp(0, 1).unsqueeze(1)
            return own * p + (1 - own) * F.one_hot(y, 10)
        if self.method == "noilin":
            rate = 0.05 if self.trades else 0.3  # at most half of 0.6 once the first epoch is validated
            rate = 0.4 if not self.trades and step < self.per_epoch else rate
            keys = [derive(self.seed, "noilin", key, step) for key in ("draw", "shift")]
            changes = uniform01(keys[0], places) < rate
            shifts = 1 + (hash64(keys[1], places) % np.uint64(9)).astype(np.int64)
            return torch.from_numpy(np.where(changes, (y.numpy() + shifts) % 10, y.numpy()))
        return y

    def loss(self, x: Tensor, y: Tensor, noise: Tensor, images: Tensor, step: int, places: np.ndarray) -> Tensor:
        """The outer loss of one batch, with its attack."""
        epoch, epochs = step // self.per_epoch + 1, self.num_steps // self.per_epoch
        started, model = epoch >= 0.3 * epochs, self.model
        label, soft = self.label(x, y, step, places), torch.zeros(())
        weight = 300 * math.exp(-5 * max(0.0, 1 - (epoch / epochs - 0.3) / 0.4) ** 2) if started else 0.0
        model.eval()
        natural = model(x).detach()
        if self.method == "te" and started:
            old = torch.nan_to_num(self.table[images])
            self.table[images] = 0.9 * old + 0.1 * F.softmax(natural, dim=1)
            soft = self.table[images] / self.table[images].sum(1, keepdim=True)
        x_adv = x + 0.001 * noise if self.trades else (x + EPS * noise).clamp(0, 1)
        for _ in range(2):
            x_adv.requires_grad_()
            logits = model(x_adv)
            if self.trades:
                attacked = 6 * F.kl_div(logits.log_softmax(1), natural.softmax(1), reduction="sum") / len(x)
            else:
                attacked = F.cross_entropy(logits, label)
            if self.method == "te" and started:
                attacked = attacked + weight * ((logits.softmax(1) - soft) ** 2).mean()
            (gradient,) = torch.autograd.grad(attacked, x_adv)
            x_adv = x_adv.detach() + STEP * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        model.train()
        if self.trades:
            logits, logits_adv = model(x), model(x_adv)
            kl = F.kl_div(logits_adv.log_softmax(1), logits.softmax(1), reduction="sum") / len(x)
            loss = F.cross_entropy(logits, label) + 6 * kl
        else:
            logits = model(x_adv)
            loss = F.cross_entropy(logits, label)
        if self.method == "te" and started:
            return loss + weight * ((logits.softmax(1) - soft) ** 2).mean()
        if self.method == "sglr" and started:
            p = 0.2 * model(x).detach().softmax(1) + 0.8 * logits.detach().softmax(1)
            old = torch.where(self.table[images].isnan(), F.one_hot(y, 10), self.table[images])
            self.table[images] = 0.9 * old + 0.1 * p
            return (-logits.log_softmax(1) * self.table[images]).sum(1).mean()
        return loss


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_the_authors(wide_path: Path, tmp_path: Path, name: str) -> None:
    """Eight steps in float64, two epochs of four, with BatchNorm: the losses and weights of a second implementation."""
    changes = [
        f"objective.name={name}",
        *METHODS[name],
        "precision=fp64",
        "train.epochs=2",
        "model.bn_first_step=false",
    ]
    changes += ["data.generated.shards=null", "data.batch_size=16", "data.epoch_samples=64", "threat.bn=eval"]
    state = start(load_recipe(wide_path, [*changes, f"run_dir={tmp_path / 'run'}"]))
    book = Textbook(name, state.base, state.data.num_images, 8, 4, state.recipe.seed)
    optimizer = build_optimizer(book.model, state.recipe.optim)
    for batch in state.data.batches(0, 8):
        assert len(set(batch.image_numbers.tolist())) == 16, "the second implementation has no rule for an image twice"
        for steps in (state.optimizer, optimizer):
            set_rates(steps, 0.05, 0.9)
        before = state.sums.clone()
        (part,) = micro_batches(state, batch)
        train_step(state, batch)
        loss = book.loss(part.x, part.y, part.noise, batch.image_numbers, batch.step, batch.places.numpy())
        assert float((state.sums - before)[0]) / 16 == pytest.approx(loss.item(), abs=1e-9), batch.step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        assert state.ema is not None
        book.teacher.load_state_dict(state.ema.module.state_dict())
        if state.step == 4:
            state.objective.refinement.validated(0.5, 0.5)
    for ours, theirs in zip(state.base.state_dict().values(), book.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    if (history := state.objective.refinement.history) is not None:
        torch.testing.assert_close(history, torch.nan_to_num(book.table), rtol=0, atol=1e-9)
        assert history.any()


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_has_the_same_bits(recipe_path: Path, tmp_path: Path, name: str) -> None:
    """Stopped within an epoch in which predictions are remembered, and after a validation that changed NoiLIn's rate."""
    for run, stops in (("whole", [[]]), ("parts", [["train.max_steps=6"], ["train.max_steps=9"], []])):
        for stop in stops:
            train(
                load_recipe(recipe_path, [f"objective.name={name}", *METHODS[name], *stop, f"run_dir={tmp_path / run}"])
            )
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    assert "objective.safetensors" in digest(tmp_path / "whole") or name.endswith("adr")
    rates = [row["noilin_rate"] for row in RunFolder(tmp_path / "whole").read_metrics() if "noilin_rate" in row]
    assert len(rates) == (3 if name.endswith("noilin") else 0)


def test_what_is_remembered_is_said(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its size, and that images which are seen once have no history."""
    changes = ["objective.name=te", "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    train(load_recipe(recipe_path, changes))
    said = r"kind=te remembers predictions of 210 images, 0\.0084 MB in every checkpoint\. From 45 % of training on it sees "
    assert re.search(said + r"real images [\d.]+ times, generated images [\d.]+ times\.", capsys.readouterr().out)


def test_graphs_are_refused_where_predictions_are_remembered(recipe_path: Path, tmp_path: Path) -> None:
    """`auto` says so and runs eager, `true` is a sentence; ADR and NoiLIn have graphs (tests/train/test_graphs.py)."""
    state = start(load_recipe(recipe_path, ["objective.name=te", f"run_dir={tmp_path / 'run'}"]))
    said: list[str] = []
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, print=said.append)
    state.accelerator = gpu  # type: ignore[assignment]
    use_graphs(state)
    assert state.graphs is None
    assert said == ["CUDA graphs are off: they do not remember predictions, as objective.refine.kind=te does."]
    state.recipe = load_recipe(recipe_path, ["objective.name=sglr", "train.graphs=true"])
    with pytest.raises(UserError, match=r"train\.graphs is true, but they do not remember .*kind=sglr does\. Use"):
        use_graphs(state)


def test_scores_of_a_run_are_the_noise_of_another(recipe_path: Path, tmp_path: Path) -> None:
    """A natural run adds 0.1 log p of every step to the rows of its images; its file is the next run's `badlabel`."""
    keys = ["data.real.noise.kind=none", "data.real.noise.rate=0", "objective.name=natural"]
    recipe = load_recipe(recipe_path, [*keys, "objective.refine.kind=scores", f"run_dir={tmp_path / 'scores'}"])
    run = RunFolder(train(recipe))
    scores = np.load(run.label_scores)
    assert scores.shape == (120, 10) and scores.dtype == np.float32
    run.label_scores.unlink()
    train(recipe)  # complete: only the file is missing
    np.testing.assert_array_equal(np.load(run.label_scores), scores)

    given = ["data.real.noise.kind=badlabel", "data.real.noise.rate=0.3", f"data.real.noise.scores={run.label_scores}"]
    state = start(load_recipe(recipe_path, [*given, f"run_dir={tmp_path / 'noisy'}"]))
    real = state.data.real
    assert real is not None and real.given is not None and real.clean is not None
    order = real.shards.in_source_order()
    expected = corrupt(real.clean[order], "badlabel", 0.3, 0, 10, scores=scores.astype(np.float64))
    np.testing.assert_array_equal(real.given[order], expected)
    assert (real.given != real.clean).sum() == 36
    seen = np.abs(scores.sum(1) - 1) > 1e-6  # an image of the validation split keeps the row of its label
    assert 80 <= seen.sum() <= 100 and (scores[~seen].max(1) == 1).all()
