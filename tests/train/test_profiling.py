"""Time by section of a training step, measured against a clock that the tests set."""

from types import SimpleNamespace

import pytest
import torch

from nrat_scale.train.profiling import SECTIONS, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`now.host` is what the host's clock shows; `now.device` what an event of a GPU records, `now.waited` how many of
    them were waited for."""
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
    """Every section's time is the sum of its parts, and what is in none counts for the lap alone."""
    clock = Clock(torch.device("cpu"))
    for name, part in (("data", 1.0), ("attack", 8.0), ("outer", 2.0), ("attack", 16.0), ("data", 0.5)):
        with clock.section(name):
            now.host += part
        now.host += 0.25
    assert clock.lap() == (28.75, seconds(data=1.5, attack=24.0, outer=2.0))


def test_a_lap_starts_anew(now):
    """With nothing of the last one, whose result stays as it was."""
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


def test_time_counts_where_a_section_ends_by_an_error(now):
    """And the error gets through."""
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
    """A section that no report shows would be lost."""
    clock = Clock(torch.device("cpu"))
    with pytest.raises(AssertionError, match=name), clock.section(name):
        now.host += 1.0
    assert clock.lap() == (0.0, seconds())


def test_every_section_is_reported():
    """Those of a step, in the order in which they come, also where nothing was measured."""
    assert SECTIONS == ("data", "attack", "outer", "optimizer", "logging")
    total, by_section = Clock(torch.device("cpu")).lap()
    assert total >= 0 and by_section == seconds()


def test_a_gpu_is_asked_by_events_and_only_at_the_lap(now):
    """Its work is timed on the device, the loader and the log by the host; nothing waits before the lap is over, and
    events do not pile up from lap to lap."""
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
    """Under their names, for `train.profile`."""
    clock = Clock(torch.device("cpu"))
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        clock.section("optimizer"),
    ):
        torch.ones(2).add_(1)
    assert "optimizer" in {event.key for event in profile.key_averages()}
