"""Short fault campaigns: after any fault, the same command ends with the bits of the undisturbed run."""

import pytest

from faults.__main__ import CAMPAIGNS, main
from faults.checkpoints import Row, checkpoints, operations
from nrat_scale.core.distributed import use_all_cores
from nrat_scale.core.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trials", "lost_at_most"),
    [("runs", 4, 12), ("ranks", 1, 12), ("stopped", 1, 12), ("files", 1, 4), ("full-disk", 1, 0)],
)
def test_a_disturbed_run_ends_with_the_same_bits(
    name: str, trials: int, lost_at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, SIGTERM, a lost or frozen rank, damaged files, a full disk; an epoch has 6 steps and ends with a save."""
    # As many threads here as in the processes of the campaign: their number decides how sums round.
    monkeypatch.setattr("nrat_scale.train.setup.use_all_cores", use_all_cores)
    campaign, _ = CAMPAIGNS[name]
    row = campaign(trials)
    assert row.wrong == []
    assert row.lost_steps <= lost_at_most


@pytest.mark.slow
def test_killed_before_every_file_operation() -> None:
    """Whichever file operation of a save is the last, the run resumes from an intact checkpoint, one step back at most."""
    row = operations(0)
    assert row.wrong == []
    assert row.lost_steps == 1
    assert row.trials > 40, "reads, writes, renames, pointers and removals of two saves"


@pytest.mark.medium
def test_killed_at_random_moments() -> None:
    """A process that saves without pause is killed; the run resumes from the last or the previous checkpoint, exactly."""
    row = checkpoints(6)
    assert row.wrong == []
    assert row.lost_steps <= 1


def test_the_table_of_campaigns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints one row per campaign; a wrong result is printed and ends with status 1."""

    def campaign(trials: int) -> Row:
        return Row("Made up", trials, 4, ["trial 2: nothing is left"], "")

    monkeypatch.setitem(CAMPAIGNS, "checkpoints", (campaign, 9))
    with pytest.raises(SystemExit, match="1"):
        main(["checkpoints", "--trials", "3"])
    printed = capsys.readouterr()
    assert "| Made up | 3 | 4 | 1 |" in printed.out
    assert "nothing is left" in printed.err
    with pytest.raises(UserError, match=r"no campaign 'chekpoints'.*'checkpoints'"):
        main(["chekpoints"])
