"""Time by section of a training step, against a clock that the tests set, and the profile of a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.profiling import SECTIONS, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`now.host`: the host's clock; `now.device`: the time that an event of a GPU records; `now.waited`: how many events
    were waited for."""
    shown = SimpleNamespace(host=100.0, device=0.0, waited=0)

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            self.at = shown.device

        def synchronize(self) -> None:
            shown.waited += 1

        def elapsed_time(self, other: "Event") -> float:
            assert self.at is not None and other.at is not None
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr("nrat_scale.train.profiling.time", SimpleNamespace(perf_counter=lambda: shown.host))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return shown


def seconds(**spent: float) -> dict[str, float]:
    return {name: spent.get(name, 0.0) for name in SECTIONS}


def test_sections_add_up_within_a_lap(now):
    """A section's time is the sum of its blocks; time outside all sections counts for the lap only."""
    clock = Clock(torch.device("cpu"))
    for name, part in (("data", 1.0), ("attack", 8.0), ("outer", 2.0), ("attack", 16.0), ("data", 0.5)):
        with clock.section(name):
            now.host += part
        now.host += 0.25
    assert clock.lap() == (28.75, seconds(data=1.5, attack=24.0, outer=2.0))


def test_a_lap_starts_from_zero(now):
    """A new lap leaves the result of the lap before unchanged."""
    clock = Clock(torch.device("cpu"))
    with clock.section("outer"):
        now.host += 3.0
    first = clock.lap()
    assert clock.lap() == (0.0, seconds())
    now.host += 1.0
    with clock.section("logging"):
        now.host += 2.0
    assert clock.lap() == (3.0, seconds(logging=2.0))
    assert first == (3.0, seconds(outer=3.0))


def test_a_section_that_ends_by_an_error_counts(now):
    """A section that raises is timed, and the error propagates."""
    clock = Clock(torch.device("cpu"))

    def interrupted() -> None:
        with clock.section("attack"):
            now.host += 4.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert clock.lap() == (4.0, seconds(attack=4.0))


@pytest.mark.parametrize("name", ["evaluation", "forward", "Data"])
def test_unknown_names_are_a_bug(now, name):
    """An unknown section raises: no report would show its time."""
    clock = Clock(torch.device("cpu"))
    with pytest.raises(AssertionError, match=name), clock.section(name):
        now.host += 1.0
    assert clock.lap() == (0.0, seconds())


def test_every_section_is_reported():
    """A lap lists all sections in the order of a step, also if nothing was measured."""
    assert SECTIONS == ("data", "attack", "outer", "optimizer", "logging")
    total, by_section = Clock(torch.device("cpu")).lap()
    assert total >= 0 and by_section == seconds()


def test_a_gpu_is_timed_by_events_and_waited_for_at_the_lap_only(now):
    """Loading and logging are timed on the host. Nothing waits before the lap, and events do not pile up over laps."""
    clock = Clock(torch.device("cuda"))
    for lap in (1, 2):
        for name in SECTIONS:
            with clock.section(name):
                now.host += 1.0
                now.device += 10.0
        with clock.section("attack"):
            now.device += 2.0
        assert now.waited == 4 * (lap - 1)
        assert clock.lap() == (5.0, seconds(data=1.0, attack=12.0, outer=10.0, optimizer=10.0, logging=1.0))
        assert now.waited == 4 * lap


def test_a_profiler_shows_the_sections():
    """A profiler's events have the names of the sections."""
    clock = Clock(torch.device("cpu"))
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        clock.section("optimizer"),
    ):
        torch.ones(2).add_(1)
    assert "optimizer" in {event.key for event in profile.key_averages()}


def test_the_profile_of_a_run(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--profile` writes a trace that names the sections, and prints where the time of a step goes."""
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.epochs=2"]), profile=3)
    out = capsys.readouterr().out
    assert "profile of steps 3 to 5" in out
    shares = {
        line.split()[0]: float(line.split()[-2])
        for line in out.splitlines()
        if line.endswith("%") and "ms a step" in line
    }
    assert set(shares) == {*SECTIONS, "other"}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    trace = json.loads((run / "profile" / "steps-3-5.json").read_text())
    assert {"attack", "outer"} <= {event.get("name") for event in trace["traceEvents"]}
