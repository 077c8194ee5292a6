"""SCORE, IKL-AT, GKL and DM_AT with CutMix against re-derivations from their papers and code, in float64 to 1e-9."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from nrat_scale.objectives import OBJECTIVES, Objective, build
from nrat_scale.publications import ORIGINS, PAPERS
from tests.support.formulas import random_logits, random_soft_labels, tensors


def _batch(seed: int, num_classes: int = 5, batch: int = 12, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    z, z_adv, y = random_logits(seed, num_classes, scale, batch)
    logits, logits_adv, labels = tensors(z, z_adv, y)
    return logits.requires_grad_(), logits_adv.requires_grad_(), labels


def _check(ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    one, two = (torch.autograd.grad(value, leaves, materialize_grads=True) for value in (ours, theirs))
    for gradient, expected in zip(one, two, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_every_preset_names_its_publication_or_says_that_it_is_ours() -> None:
    """A preset without an origin fails here; each published one has a citation."""
    assert set(ORIGINS) == set(OBJECTIVES)
    for name, origin in ORIGINS.items():
        assert name == "natural" or any(key in origin for key in PAPERS), name
    ours = {name for name, origin in ORIGINS.items() if origin.startswith("a combination of ours")}
    assert ours == {"nrat_ikl", "trades_gce", "trades_sce", "trades_nfl_rce", "trades_agce"}


# ---- SCORE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "mixed", "plugin"])
@pytest.mark.parametrize("num_classes", [3, 10])
def test_score(num_classes: int, mode: str) -> None:
    """||p - q||^2 + 4 ||p' - p||^2 with the smoothed label q inside the square, whatever the smoothing mode; the attack
    maximises ||p' - p||^2 from a uniform start under batch statistics."""
    logits, logits_adv, y = _batch(0, num_classes)
    objective = build("score", smoothing_mode=mode)
    p, p_adv = (z.exp() / z.exp().sum(1, keepdim=True) for z in (logits, logits_adv))
    q = torch.full_like(p, 0.1 / num_classes)
    q[torch.arange(len(y)), y] += 0.9
    outer = ((p - q) ** 2).sum(1).mean() + 4 * ((p_adv - p) ** 2).sum(1).mean()
    _check(objective.loss(logits, logits_adv, y), outer, [logits, logits_adv])
    inner = ((logits_adv.softmax(1) - p.detach()) ** 2).sum()
    _check(objective.inner(logits, y)(logits_adv).sum(), inner, [logits_adv])
    assert (objective.spec.init, objective.spec.bn) == ("uniform", "batch")


# ---- IKL-AT and GKL -------------------------------------------------------------------------------------------------


def _robust_term(logits: Tensor, logits_adv: Tensor, prior: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """The robust loss of the authors' repository, GKL's version of 2025; gamma 1 is IKL, whose weights sum to 1."""
    prior = prior**gamma
    weight = prior[:, :, None] * prior[:, None, :]
    delta_n = logits[:, :, None] - logits[:, None, :]
    delta_a = logits_adv[:, :, None] - logits_adv[:, None, :]
    mse = 0.25 * ((delta_n - delta_a) ** 2 * weight).sum() / weight.sum()
    log_adv = logits_adv - logits_adv.exp().sum(1, keepdim=True).log()
    soft = (logits.exp() / logits.exp().sum(1, keepdim=True)).detach()
    return beta * mse - alpha * (soft * log_adv).sum(1).mean()


def _means(seen: list[tuple[Tensor, Tensor]], temperature: float, num_classes: int) -> Tensor:
    """The mean of softmax(z / T) over the images of each class in the batches `seen`."""
    rows = []
    for c in range(num_classes):
        of_class = torch.cat([z.detach()[y == c] for z, y in seen]) / temperature
        rows.append((of_class.exp() / of_class.exp().sum(1, keepdim=True)).mean(0))
    return torch.stack(rows)


CONSTANTS = [
    {},  # CIFAR-10
    {"ikl_alpha": 3.0, "ikl_beta": 10.0},  # 20M generated images
    {"ikl_temperature": 1.0, "ikl_gamma": 0.2},  # GKL
    {"ikl_gamma": 1.0},
]


@pytest.mark.parametrize("constants", CONSTANTS, ids=["IKL", "20M", "GKL", "gamma 1"])
@pytest.mark.parametrize("name", ["trades_ikl", "nrat_ikl"])
def test_ikl_over_three_epochs(name: str, constants: dict[str, float]) -> None:
    """In each epoch the class means are those of the whole previous one, in the first 1 / K; value and gradients."""
    given = {"ikl_alpha": 4.0, "ikl_beta": 20.0, "ikl_temperature": 4.0, "ikl_gamma": 0.0} | constants
    objective, natural = (
        build(name, num_classes=5, **constants),
        build("trades_apl" if name == "nrat_ikl" else "trades", lam=0),
    )
    means = torch.full((5, 5), 0.2, dtype=torch.float64)
    for epoch in range(3):
        seen = []
        for step in range(3):
            logits, logits_adv, y = _batch(10 * epoch + step, batch=24)
            objective.begin_step([y], new_epoch=step == 0 and epoch > 0)
            term = _robust_term(
                logits, logits_adv, means[y], given["ikl_alpha"], given["ikl_beta"], given["ikl_gamma"] or 1.0
            )
            theirs = natural.loss(logits, logits_adv, y) + term
            _check(objective.loss(logits, logits_adv, y), theirs, [logits, logits_adv])
            objective.update(logits, y)
            seen.append((logits, y))
        means = _means(seen, given["ikl_temperature"], 5)


def _state_after(
    objective: Objective, batches: list[tuple[Tensor, Tensor]], per_epoch: int, first: int = 0
) -> Objective:
    for step, (logits, y) in enumerate(batches, start=first):
        objective.begin_step([y], new_epoch=step > 0 and step % per_epoch == 0)
        objective.update(logits, y)
    return objective


@pytest.mark.parametrize("stop", range(1, 7))
def test_class_means_resume_exactly(stop: int) -> None:
    """Saved and loaded at any step, also between two epochs, the buffers end with the same bits."""
    batches = [(logits, y) for logits, _, y in map(_batch, range(7))]
    whole = _state_after(build("trades_ikl", num_classes=5), batches, 3)
    first = _state_after(build("trades_ikl", num_classes=5), batches[:stop], 3)
    second = build("trades_ikl", num_classes=5)
    second.load_state_dict(first.state_dict())
    _state_after(second, batches[stop:], 3, stop)
    assert set(whole.state_dict()) == {"class_means", "class_sums"}
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("constants", CONSTANTS[1:3], ids=["IKL", "GKL"])
def test_ranks_and_micro_batches_share_class_means(constants: dict[str, float]) -> None:
    """Two ranks of two micro-batches, summed over ranks, have the class means and the mean loss of one whole batch."""
    logits, logits_adv, y = _batch(0, batch=16)
    whole, *ranks = (build("trades_ikl", num_classes=5, **constants) for _ in range(3))
    whole.update(logits, y)
    whole.begin_step([y], new_epoch=True)
    parts = [slice(0, 4), slice(4, 8)], [slice(8, 12), slice(12, 16)]  # of each rank

    def together(call: Callable[[int, Callable[[Tensor], Tensor]], None]) -> None:
        """`call` for both ranks; `reduce` returns the sum of what the two give it."""
        given: list[Tensor] = []
        with ThreadPoolExecutor(2) as pool:
            barrier = Barrier(2, timeout=60)

            def reduce(value: Tensor) -> Tensor:
                given.append(value)
                barrier.wait()
                return given[0] + given[1]

            for future in [pool.submit(call, rank, reduce) for rank in range(2)]:
                future.result()

    for number in range(2):
        seen = [rank[number] for rank in parts]
        together(lambda rank, reduce, seen=seen: ranks[rank].update(logits[seen[rank]], y[seen[rank]], reduce))
    together(lambda rank, reduce: ranks[rank].begin_step([y[part] for part in parts[rank]], reduce, new_epoch=True))
    losses = []
    for objective, own in zip(ranks, parts, strict=True):
        torch.testing.assert_close(objective.class_means, whole.class_means, rtol=0, atol=1e-12)
        losses += [objective.loss(logits[part], logits_adv[part], y[part]) for part in own]
    torch.testing.assert_close(torch.stack(losses).mean(), whole.loss(logits, logits_adv, y), rtol=0, atol=1e-9)


# ---- CutMix ---------------------------------------------------------------------------------------------------------


def _soft(seed: int, batch: int, num_classes: int) -> Tensor:
    return torch.from_numpy(random_soft_labels(seed, batch, num_classes))


def test_dm_at_with_cutmix() -> None:
    """KL(y || p) + 5 KL(p || p') without label smoothing; the attack maximises KL(y || p')."""
    logits, logits_adv, _ = _batch(0)
    y = _soft(0, 12, 5)
    p, p_adv = logits.softmax(1), logits_adv.softmax(1)
    outer = (y * (y / p).log()).sum(1).mean() + 5 * (p * (p / p_adv).log()).sum(1).mean()
    objective = build("dm_at")
    _check(objective.loss(logits, logits_adv, y), outer, [logits, logits_adv])
    _check(objective.inner(logits, y)(logits_adv).sum(), (y * (y / logits_adv.softmax(1)).log()).sum(), [logits_adv])


def test_score_with_cutmix() -> None:
    """||p - y||^2 + 4 ||p' - p||^2 without label smoothing; the attack maximises ||p' - y||^2."""
    logits, logits_adv, _ = _batch(1)
    y = _soft(1, 12, 5)
    p, p_adv = logits.softmax(1), logits_adv.softmax(1)
    outer = ((p - y) ** 2).sum(1).mean() + 4 * ((p_adv - p) ** 2).sum(1).mean()
    objective = build("score")
    _check(objective.loss(logits, logits_adv, y), outer, [logits, logits_adv])
    _check(objective.inner(logits, y)(logits_adv).sum(), ((logits_adv.softmax(1) - y) ** 2).sum(), [logits_adv])


@pytest.mark.parametrize("name", [name for name, spec in OBJECTIVES.items() if spec.family != "mart"])
def test_what_cutmix_changes_is_said(name: str) -> None:
    """Objectives whose attack or smoothing changes say so, and the others say nothing."""
    logits, logits_adv, y = _batch(2)
    objective, one_hot = build(name), torch.nn.functional.one_hot(y, 5).double()
    if not objective.attacks:
        assert not objective.spec.cutmix_notes
        return
    hard, soft = (objective.inner(logits, label)(logits_adv) for label in (y, one_hot))
    notes = " ".join(objective.spec.cutmix_notes)
    assert torch.allclose(hard, soft) == ("the attack maximises" not in notes)
    assert ("not smoothed" in notes) == (name in ("dm_at", "score"))
