"""What went wrong in a step, on any rank, and the signal to stop by: told once, of the right step, by the right name."""

import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nrat_scale.train.nonfinite import WRONG, StepChecks, Verdict
from nrat_scale.train.signals import SIGNALS

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def stepped(flags: StepChecks, step: int, *, bad: str | None = None, signum: int = 0, late: str | None = None) -> bool:
    """One training step in which `bad` happens before the ranks agree and `late` after; whether the step counts."""
    flags.begin(signum)
    for kind in WRONG[:3]:
        flags.note(kind, TRUE if kind == bad else FALSE)
    good = flags.agree()
    assert good.shape == () and good.dtype == torch.bool
    good = flags.note_everywhere("gradient", TRUE if late == "gradient" else FALSE)
    flags.post(step)
    return bool(good)


@pytest.fixture
def ranks() -> list[StepChecks]:
    """Two ranks; each total adds what the other has noted."""
    pair: list[StepChecks] = []

    def total(own: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor + pair[1 - own]._here

    pair += [StepChecks(CPU, total(0)), StepChecks(CPU, total(1))]
    return pair


# ---- what went wrong ------------------------------------------------------------------------------------------------


def test_nothing_is_told_while_all_is_well():
    """However many steps: no verdict, every step counts, and what was read is not kept."""
    flags = StepChecks(CPU)
    for step in range(1, 200):
        assert stepped(flags, step)
        assert flags.read() is None
        assert len(flags._posted) == 0
    assert flags.read(everything=True) is None


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("everything", [False, True])
def test_kind_and_step_are_told(kind, everything):
    """Each kind by its own name, with the step in which it happened and not the one in which it is read."""
    flags = StepChecks(CPU)
    assert stepped(flags, 6)
    when = {"late": kind} if kind == "gradient" else {"bad": kind}
    assert not stepped(flags, 7, **when)
    assert flags.read(everything=everything) == Verdict(7, (kind,), (kind,), 0)
    assert flags.read(everything=everything) is None


def test_several_kinds_are_told_together():
    """In the order of WRONG, whatever was noted first."""
    flags = StepChecks(CPU)
    flags.begin(0)
    flags.note("loss", TRUE)
    flags.note("attack", TRUE)
    assert not flags.agree()
    assert not flags.note_everywhere("gradient", TRUE)
    flags.post(1)
    assert flags.read() == Verdict(1, ("attack", "loss", "gradient"), ("attack", "loss", "gradient"), 0)


def test_one_bad_piece_among_good_ones():
    """A later micro-batch that is well does not take back what an earlier one noted."""
    flags = StepChecks(CPU)
    flags.begin(0)
    for bad in (FALSE, TRUE, FALSE):
        flags.note("loss", bad)
    assert not flags.agree()
    flags.post(1)
    assert flags.read() == Verdict(1, ("loss",), ("loss",), 0)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_stays_wrong(kind):
    """Steps that were begun before the host knew change nothing either; the first verdict is that of the first bad
    step."""
    flags = StepChecks(CPU)
    assert stepped(flags, 1)
    when = {"late": kind} if kind == "gradient" else {"bad": kind}
    assert not stepped(flags, 2, **when)
    assert not stepped(flags, 3)
    flags.begin(0)
    assert not flags.agree()
    flags.post(4)
    assert [flags.read(), flags.read(), flags.read()] == [Verdict(step, (kind,), (kind,), 0) for step in (2, 3, 4)]
    assert flags.read() is None


def test_flags_of_a_step_are_those_of_its_end():
    """What is noted later does not reach back into a step that was posted and not read yet."""
    flags = StepChecks(CPU)
    assert stepped(flags, 1)
    assert not stepped(flags, 2, bad="ball")
    verdict = flags.read()
    assert verdict is not None and verdict.step == 2


def test_unknown_kind_is_a_bug():
    """A flag that nobody reads would be lost."""
    with pytest.raises(ValueError, match="not in tuple"):
        StepChecks(CPU).note("weather", TRUE)


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", WRONG[:3])
def test_ranks_agree(ranks, where, kind):
    """What one rank noted makes the step bad on both; `here` says on which it was."""
    for rank in ranks:
        rank.begin(0)
    ranks[where].note(kind, TRUE)
    assert [bool(rank.agree()) for rank in ranks] == [False, False]
    for rank in ranks:
        rank.post(3)
    assert ranks[where].read() == Verdict(3, (kind,), (kind,), 0)
    assert ranks[1 - where].read() == Verdict(3, (kind,), (), 0)


def test_place_is_kept_for_each_kind(ranks):
    """Two ranks with different troubles: both kinds everywhere, each one's own under `here`."""
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
    """In later steps too, also where nothing new happens."""
    for step in (1, 2, 3):
        for rank in ranks:
            rank.begin(0)
        ranks[1].note("loss", TRUE if step == 2 else FALSE)
        assert [bool(rank.agree()) for rank in ranks] == [step == 1] * 2
        for rank in ranks:
            assert bool(rank.note_everywhere("gradient", FALSE)) == (step == 1)
            rank.post(step)
    assert [rank.read().step for rank in ranks] == [2, 2]


def test_what_all_ranks_see_alike(ranks):
    """The norm of the averaged gradient is looked at after the ranks agreed: it makes the step bad at once, without
    another exchange, is told as `gradient` on all, and stays."""
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


def test_what_was_wrong_before_is_not_forgiven(ranks):
    """`note_everywhere` answers for the whole step, not for its own kind alone."""
    for rank in ranks:
        rank.begin(0)
    ranks[0].note("attack", TRUE)
    for rank in ranks:
        rank.agree()
    assert not any(rank.note_everywhere("gradient", FALSE) for rank in ranks)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_is_told_once_and_by_name(signum):
    """A step with a signal counts; it is told which one, and the next step without is quiet again."""
    flags = StepChecks(CPU)
    assert stepped(flags, 1, signum=int(signum))
    assert stepped(flags, 2)
    verdict = flags.read()
    assert verdict == Verdict(1, (), (), int(signum))
    assert type(verdict.signum) is int
    assert flags.read() is None


def test_signal_of_another_rank(ranks):
    """Both stop by it, in the same step; of two different ones both stop by the same."""
    received = [(signal.SIGUSR1, 0), (0, 0), (signal.SIGINT, signal.SIGTERM)]
    for step, signals in enumerate(received):
        for rank, signum in zip(ranks, signals, strict=True):
            rank.begin(int(signum))
        for rank in ranks:
            assert rank.agree()
            rank.post(step)
    told = [[rank.read(), rank.read(), rank.read()] for rank in ranks]
    assert told[0] == told[1] == [Verdict(0, (), (), signal.SIGUSR1), Verdict(2, (), (), signal.SIGTERM), None]


def test_a_signal_does_not_hide_what_is_wrong():
    """Both are told: a step that went wrong must not be saved because it was asked to be the last."""
    flags = StepChecks(CPU)
    assert not stepped(flags, 4, bad="loss", signum=int(signal.SIGTERM))
    assert flags.read() == Verdict(4, ("loss",), ("loss",), signal.SIGTERM)
    assert not stepped(flags, 5)
    assert flags.read() == Verdict(5, ("loss",), ("loss",), 0), "the signal is forgotten, the fault is not"


# ---- devices --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_behind_is_not_waited_for():
    """Where copies are under way the last step's is left alone until the next one, or until all are asked for."""
    flags = StepChecks(CPU)
    flags._lag = 1  # as on a GPU
    stepped(flags, 1, signum=int(signal.SIGINT))
    assert flags.read() is None
    stepped(flags, 2)
    assert flags.read() == Verdict(1, (), (), signal.SIGINT)
    for step in range(3, 50):
        stepped(flags, step)
        assert flags.read() is None
        assert len(flags._posted) == 1
    stepped(flags, 50, bad="ball")
    assert flags.read() is None
    assert flags.read(everything=True) == Verdict(50, ("ball",), ("ball",), 0)
    assert len(flags._posted) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_one_step_later():
    """The copy is made without waiting, and what it holds is that of its own step."""
    device = torch.device("cuda")
    flags = StepChecks(device)
    for step in (1, 2, 3):
        flags.begin(0)
        flags.note("loss", torch.tensor(step == 2, device=device))
        assert flags.agree().device.type == "cuda"
        flags.post(step)
        assert flags.read() == (Verdict(2, ("loss",), ("loss",), 0) if step == 3 else None)
    assert flags.read(everything=True) == Verdict(3, ("loss",), ("loss",), 0)
