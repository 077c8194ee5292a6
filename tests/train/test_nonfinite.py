"""Steps that are not finite: each failure and signal is reported once, with step and kind, and ends the run on all ranks."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.nonfinite import WRONG, StepChecks, Verdict, images_not_finite
from nrat_scale.train.setup import start
from nrat_scale.train.signals import SIGNALS
from nrat_scale.train.state import MicroBatch
from nrat_scale.train.step import train_step
from tests.support.launched import launched

CPU = torch.device("cpu")
LOCAL = ("attack", "ball", "loss")  # the gradient is the same on all ranks
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def stepped(checks: StepChecks, step: int, *, bad: str | None = None, signum: int = 0, late: str | None = None) -> bool:
    """One training step in which `bad` happens before the ranks agree and `late` after; whether the step counts."""
    checks.begin(signum)
    for kind in LOCAL:
        checks.note(kind, TRUE if kind == bad else FALSE)
    good = checks.agree()
    assert good.shape == () and good.dtype == torch.bool
    good = checks.note_everywhere("gradient", TRUE if late == "gradient" else FALSE)
    checks.post(step)
    return bool(good)


@pytest.fixture
def ranks() -> list[StepChecks]:
    """Two ranks; each total adds what the other has noted."""
    pair: list[StepChecks] = []

    def total(own: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor + pair[1 - own].here

    pair += [StepChecks(CPU, total(0)), StepChecks(CPU, total(1))]
    return pair


# ---- failures -------------------------------------------------------------------------------------------------------


def test_no_verdict_while_all_steps_are_finite():
    """Every step is good, and steps that were read are dropped."""
    checks = StepChecks(CPU)
    for step in range(1, 200):
        assert stepped(checks, step)
        assert checks.read() is None
        assert len(checks.pending) == 0
    assert checks.read(everything=True) is None


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("everything", [False, True])
def test_a_verdict_has_kind_and_step(kind, everything):
    """The verdict names the step of the failure, not the one in which it is read."""
    checks = StepChecks(CPU)
    assert stepped(checks, 6)
    when = {"late": kind} if kind == "gradient" else {"bad": kind}
    assert not stepped(checks, 7, **when)
    assert checks.read(everything=everything) == Verdict(7, (kind,), (kind,), 0)
    assert checks.read(everything=everything) is None


def test_several_kinds_are_in_one_verdict():
    """Several failures of a step are in the order of WRONG, not of noting."""
    checks = StepChecks(CPU)
    checks.begin(0)
    checks.note("loss", TRUE)
    checks.note("attack", TRUE)
    assert not checks.agree()
    assert not checks.note_everywhere("gradient", TRUE)
    checks.post(1)
    assert checks.read() == Verdict(1, ("attack", "loss", "gradient"), ("attack", "loss", "gradient"), 0)


def test_one_bad_micro_batch_among_good_ones():
    """A later finite micro-batch does not clear what an earlier one noted."""
    checks = StepChecks(CPU)
    checks.begin(0)
    for bad in (FALSE, TRUE, FALSE):
        checks.note("loss", bad)
    assert not checks.agree()
    checks.post(1)
    assert checks.read() == Verdict(1, ("loss",), ("loss",), 0)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_stays_wrong(kind):
    """Steps that were started before the host knew are bad too; the first verdict is that of the first bad step."""
    checks = StepChecks(CPU)
    assert stepped(checks, 1)
    when = {"late": kind} if kind == "gradient" else {"bad": kind}
    assert not stepped(checks, 2, **when)
    assert not stepped(checks, 3)
    checks.begin(0)
    assert not checks.agree()
    checks.post(4)
    assert [checks.read(), checks.read(), checks.read()] == [Verdict(step, (kind,), (kind,), 0) for step in (2, 3, 4)]
    assert checks.read() is None


def test_later_notes_do_not_change_a_posted_step():
    """A failure in the next step leaves the counts of a step that the host has not read yet."""
    checks = StepChecks(CPU)
    assert stepped(checks, 1)
    assert not stepped(checks, 2, bad="ball")
    verdict = checks.read()
    assert verdict is not None and verdict.step == 2


def test_unknown_kind_is_a_bug():
    """A misspelt kind raises."""
    with pytest.raises(ValueError, match="not in tuple"):
        StepChecks(CPU).note("weather", TRUE)


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", LOCAL)
def test_ranks_agree(ranks, where, kind):
    """What one rank noted makes the step bad on both; `here` says on which it happened."""
    for rank in ranks:
        rank.begin(0)
    ranks[where].note(kind, TRUE)
    assert [bool(rank.agree()) for rank in ranks] == [False, False]
    for rank in ranks:
        rank.post(3)
    assert ranks[where].read() == Verdict(3, (kind,), (kind,), 0)
    assert ranks[1 - where].read() == Verdict(3, (kind,), (), 0)


def test_each_kind_keeps_its_rank(ranks):
    """Two ranks with different failures: both kinds in `wrong`, each rank's own in `here`."""
    for rank, kind in zip(ranks, ("attack", "loss"), strict=True):
        rank.begin(0)
        rank.note(kind, TRUE)
    for rank in ranks:
        assert not rank.agree()
        rank.post(1)
    assert [rank.read() for rank in ranks] == [
        Verdict(1, ("attack", "loss"), ("attack",), 0),
        Verdict(1, ("attack", "loss"), ("loss",), 0),
    ]


def test_ranks_stay_wrong_together(ranks):
    """A failure on one rank makes all later steps bad on both."""
    for step in (1, 2, 3):
        for rank in ranks:
            rank.begin(0)
        ranks[1].note("loss", TRUE if step == 2 else FALSE)
        assert [bool(rank.agree()) for rank in ranks] == [step == 1] * 2
        for rank in ranks:
            assert bool(rank.note_everywhere("gradient", FALSE)) == (step == 1)
            rank.post(step)
    assert [rank.read().step for rank in ranks] == [2, 2]


def test_what_is_the_same_on_all_ranks(ranks):
    """The norm of the averaged gradient is checked after the ranks agreed: it makes the step bad at once, without another
    exchange, is reported as `gradient` on all ranks, and stays."""
    for rank in ranks:
        rank.begin(0)
    assert all(rank.agree() for rank in ranks)
    for rank in ranks:
        assert rank.note_everywhere("gradient", FALSE)
        assert not rank.note_everywhere("gradient", TRUE)
        rank.post(5)
    for rank in ranks:
        rank.begin(0)
    assert not any(rank.agree() for rank in ranks)
    assert [rank.read() for rank in ranks] == [Verdict(5, ("gradient",), ("gradient",), 0)] * 2


def test_an_earlier_failure_stays(ranks):
    """`note_everywhere` returns whether the whole step is finite, not only its own kind."""
    for rank in ranks:
        rank.begin(0)
    ranks[0].note("attack", TRUE)
    for rank in ranks:
        rank.agree()
    assert not any(rank.note_everywhere("gradient", FALSE) for rank in ranks)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_is_reported_once(signum):
    """A step with a signal counts; the verdict has the signal, and the next step has no verdict."""
    checks = StepChecks(CPU)
    assert stepped(checks, 1, signum=int(signum))
    assert stepped(checks, 2)
    verdict = checks.read()
    assert verdict == Verdict(1, (), (), int(signum))
    assert type(verdict.signum) is int
    assert checks.read() is None


def test_signal_of_another_rank(ranks):
    """Both ranks stop by it in the same step; of two different signals both stop by the same."""
    received = [(signal.SIGUSR1, 0), (0, 0), (signal.SIGINT, signal.SIGTERM)]
    for step, signals in enumerate(received):
        for rank, signum in zip(ranks, signals, strict=True):
            rank.begin(int(signum))
        for rank in ranks:
            assert rank.agree()
            rank.post(step)
    read = [[rank.read(), rank.read(), rank.read()] for rank in ranks]
    assert read[0] == read[1] == [Verdict(0, (), (), signal.SIGUSR1), Verdict(2, (), (), signal.SIGTERM), None]


def test_a_signal_does_not_hide_a_failure():
    """Both are in the verdict: a bad step must not be saved because a signal made it the last."""
    checks = StepChecks(CPU)
    assert not stepped(checks, 4, bad="loss", signum=int(signal.SIGTERM))
    assert checks.read() == Verdict(4, ("loss",), ("loss",), signal.SIGTERM)
    assert not stepped(checks, 5)
    assert checks.read() == Verdict(5, ("loss",), ("loss",), 0), "the signal is cleared, the failure is not"


# ---- devices --------------------------------------------------------------------------------------------------------


def test_a_device_that_lags_is_not_waited_for():
    """The last step is read after the next one, or with `everything`."""
    checks = StepChecks(CPU, lag=1)  # as on a GPU
    stepped(checks, 1, signum=int(signal.SIGINT))
    assert checks.read() is None
    stepped(checks, 2)
    assert checks.read() == Verdict(1, (), (), signal.SIGINT)
    for step in range(3, 50):
        stepped(checks, step)
        assert checks.read() is None
        assert len(checks.pending) == 1
    stepped(checks, 50, bad="ball")
    assert checks.read() is None
    assert checks.read(everything=True) == Verdict(50, ("ball",), ("ball",), 0)
    assert len(checks.pending) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_read_one_step_later():
    """The copy does not wait, and holds the counts of its own step."""
    device = torch.device("cuda")
    checks = StepChecks(device)
    for step in (1, 2, 3):
        checks.begin(0)
        checks.note("loss", torch.tensor(step == 2, device=device))
        assert checks.agree().device.type == "cuda"
        checks.post(step)
        assert checks.read() == (Verdict(2, ("loss",), ("loss",), 0) if step == 3 else None)
    assert checks.read(everything=True) == Verdict(3, ("loss",), ("loss",), 0)


# ---- images ---------------------------------------------------------------------------------------------------------


def test_the_image_whose_attack_failed_is_named():
    """Even if BatchNorm spread its NaN over the logits of the batch; without an attack, natural logits are checked."""
    x, y = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    x_adv, logits, spread = x.clone(), torch.zeros(3, 2), torch.full((3, 2), torch.nan)
    x_adv[1], logits[2] = torch.nan, torch.inf
    first, second = MicroBatch(x, y, y, x, x_adv, None, spread, spread), MicroBatch(x, y, y, x, x, None, spread, spread)
    assert images_not_finite([first, second]).tolist() == [False, True, False, False, False, False]
    assert images_not_finite([MicroBatch(x, y, y, x, None, None, logits)]).tolist() == [False, False, True]
    assert not images_not_finite([MicroBatch(x, y, y, x, x, None, x.flatten(1))]).any()


# ---- runs ----------------------------------------------------------------------------------------------------------

DIVERGING = ["objective.name=trades", "optim.lr=1e30", "optim.schedule=constant", "train.epochs=2"]


@pytest.mark.parametrize("lag", [0, 1], ids=["read at once", "read a step later"])
def test_a_bad_step_changes_no_weights(wide_path: Path, tmp_path: Path, lag: int) -> None:
    """Parameters and momentum stay those of the step before, whether the host reads the checks at once or a step later."""
    state = start(load_recipe(wide_path, [*DIVERGING, f"run_dir={tmp_path / 'run'}"]))
    state.checks = StepChecks(torch.device("cpu"), lag=lag)
    before: list[torch.Tensor] = []
    for batch in state.data.batches(0, 2 + lag):
        kept = list(state.base.parameters())
        kept += [value["momentum_buffer"] for value in state.optimizer.state.values()]
        before = [tensor.detach().clone() for tensor in kept] if state.step < 2 else before
        train_step(state, batch)
        state.step += 1
        verdict = state.checks.read()
        assert (verdict is None) == (state.step < 2 + lag)
    assert verdict is not None and verdict.step == 2
    assert all(map(torch.equal, kept, before))


def test_divergence_names_step_images_and_file(recipe_path: Path, tmp_path: Path) -> None:
    """The file holds images and the weights from before the step; the run has no checkpoint of it or of a later one."""
    good = train(load_recipe(recipe_path, [*DIVERGING, "train.max_steps=1", f"run_dir={tmp_path / 'good'}"]))
    run = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"Step 2 was not applied.*rank 0, images (real|generated) \d+, .*Lower optim"
    ):
        train(load_recipe(recipe_path, [*DIVERGING, f"run_dir={run}"]))
    kept = load_file(RunFolder(run).bad_step(2, rank=0))
    assert kept["x"].shape == kept["x_adv"].shape == (16, 1, 12, 12)
    assert kept["ids"].shape == kept["generated"].shape == (16,)
    for name, value in named_checkpoint(good, "last").tensors("model").items():
        assert torch.equal(kept[f"model.{name}"], value), name
    assert not list((run / "checkpoints").glob("step-*"))


SABOTAGED = """
import os
from nrat_scale.core.errors import run_cli
from nrat_scale.objectives import Objective
from nrat_scale.train.__main__ import main
loss, calls = Objective.loss, []
def sabotaged(self, *given):
    calls.append(1)
    return loss(self, *given) * (float("nan") if len(calls) == 6 and os.environ["RANK"] == "1" else 1.0)
Objective.loss = sabotaged
run_cli(main)
"""


def test_a_bad_step_on_one_rank_stops_all(recipe_path: Path, tmp_path: Path) -> None:
    """A loss that is NaN on rank 1 only: both ranks end, rank 1 is named and saves its images, no checkpoint is later."""
    run = tmp_path / "run"
    with launched([str(recipe_path), f"run_dir={run}"], processes=2, script=SABOTAGED) as launch:
        assert launch.wait() == [1, 1]
    assert "Step 6 was not applied" in launch.text("err") and "(rank 1, images" in launch.text("err")
    assert [path.name for path in run.glob("bad-*")] == ["bad-step-00000006-rank1.safetensors"]
    assert named_checkpoint(run, "last").step == 4
