"""Running cells: each in its own process, claimed, resumed, never twice; failures, signals, a full disk; scripts."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.core.locks import try_lock
from nrat_scale.reproduce.cells import Place
from nrat_scale.reproduce.grid_files import read_grid
from nrat_scale.reproduce.jobs import run_local, write_script
from tests.support.small_grids import write_grid

# Stands in for the process of a cell: notes that it ran, then does what BEHAVIOUR says for this cell.
WORKER = """
import json, os, signal, sys, time
folder, key = sys.argv[1], sys.argv[-1]
with open(folder + "/ran.txt", "a") as file:
    file.write(key + "\\n")
facts = json.loads(open(folder + "/facts.json").read())[key]
behaviour = json.loads(open(folder + "/behaviour.json").read()).get(key, "finish")
if behaviour == "finish":
    open(facts["path"], "w").write(json.dumps(facts["finished"]))
elif behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif behaviour == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(60)
elif behaviour == "fails":
    open(facts["path"], "w").write(json.dumps({**facts["finished"], "status": "failed", "error": "Training has collapsed."}))
    sys.exit(2)
else:
    print("error: " + behaviour, file=sys.stderr)
    sys.exit(2)
"""


class Grid:
    """A tiny grid whose cells the stand-in runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.worker = folder, folder / "worker.py"
        path = write_grid(folder, shards=False)
        self.places = [Place(cell, folder / "out", None) for cell in read_grid(str(path)).cells("tiny")]
        self.worker.write_text(WORKER)
        facts = {
            place.key: {"path": str(place.result), "finished": {**place.facts(), "results": {}}}
            for place in self.places
        }
        (folder / "facts.json").write_text(json.dumps(facts))
        self.behave()

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(self.worker), str(self.folder), "--cell"]

    def behave(self, **by_number: str) -> None:
        """What the stand-in does for cell 0, 1, ... (`c0="killed"`); it finishes the others."""
        keys = {self.places[int(name[1:])].key: behaviour for name, behaviour in by_number.items()}
        (self.folder / "behaviour.json").write_text(json.dumps(keys))

    @property
    def ran(self) -> list[str]:
        """The keys of the cells in the order in which they were run."""
        path = self.folder / "ran.txt"
        return path.read_text().split() if path.exists() else []

    @property
    def keys(self) -> list[str]:
        return [place.key for place in self.places]


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path)


def test_missing_cells_run_in_order_and_finished_ones_never_again(grid):
    """Each once; a second invocation runs none."""
    outcome = run_local(grid.places, grid.command)
    assert (outcome.finished, outcome.failed, outcome.busy) == (grid.keys, {}, [])
    assert grid.ran == grid.keys
    assert run_local(grid.places, grid.command).finished == grid.keys
    assert grid.ran == grid.keys


def test_a_failed_cell_ends_no_other_and_is_tried_again(grid, capsys):
    """Failures of all kinds are said, the others run, and the next invocation runs the failed ones alone."""
    grid.behave(c0="fails", c1="killed", c3="data.batch_size is 7; it must be even.")
    outcome = run_local(grid.places, grid.command)
    failed = [grid.keys[0], grid.keys[1], grid.keys[3]]
    assert list(outcome.failed) == failed
    assert outcome.finished == [key for key in grid.keys if key not in failed]
    assert outcome.failed[failed[0]] == "Training has collapsed."
    assert "killed by SIGKILL" in outcome.failed[failed[1]] and "resumes" in outcome.failed[failed[1]]
    assert outcome.failed[failed[2]] == "data.batch_size is 7; it must be even."
    assert "3 cells failed" in outcome.text and "Training has collapsed." in outcome.text
    assert [place.state() for place in grid.places][:2] == ["failed", "missing"]
    grid.behave()
    assert run_local(grid.places, grid.command).finished == grid.keys
    assert grid.ran[len(grid.keys) :] == failed


def test_a_full_disk_stops_the_grid(grid):
    """Every other cell would fail, too: one sentence, and what is finished stays."""
    grid.behave(c2="out/cell.json cannot be written (No space left on device). Free space or choose another place.")
    with pytest.raises(UserError, match="The disk is full"):
        run_local(grid.places, grid.command)
    assert grid.ran == grid.keys[:3]
    assert [place.state() for place in grid.places[:3]] == ["finished", "finished", "missing"]


def test_a_claimed_cell_is_left_to_its_process(grid):
    """Another process has the second cell: the others run, and the outcome says so."""
    held = f"""
import sys, time
from pathlib import Path
from nrat_scale.core.locks import try_lock
with try_lock(Path({str(grid.places[1].result)!r})) as lock:
    print(lock is not None, flush=True)
    sys.stdin.read()
"""
    grid.places[1].folder.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline().strip() == "True"
        outcome = run_local(grid.places, grid.command)
        other.communicate("")
    assert outcome.busy == [grid.keys[1]]
    assert "left to another process" in outcome.text
    assert grid.ran == [key for key in grid.keys if key != grid.keys[1]]
    assert run_local(grid.places, grid.command).busy == []
    assert sorted(grid.ran) == sorted(grid.keys)


def test_a_child_keeps_the_claim_of_its_parent(tmp_path):
    """The descriptor is inherited: closing it here does not free the lock while the child lives."""
    path = tmp_path / "cell.json"
    with try_lock(path) as lock:
        assert lock is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with try_lock(path) as again:
        assert again is None
    child.communicate(b"\n")
    with try_lock(path) as again:
        assert again is not None


@pytest.mark.medium
def test_two_invocations_share_the_cells_without_doubling_one(grid):
    """Both end, each cell ran once, and each ran at least one of them or found them finished."""
    script = f"""
import sys
from pathlib import Path
from nrat_scale.reproduce.cells import Place
from nrat_scale.reproduce.grid_files import read_grid
from nrat_scale.reproduce.jobs import run_local
places = [Place(cell, Path({str(grid.folder / "out")!r}), None) for cell in read_grid({str(grid.folder / "tiny.yaml")!r}).cells("tiny")]
print("ready", flush=True)
sys.stdin.readline()
outcome = run_local(places, {grid.command!r})
assert not outcome.failed, outcome
"""
    with contextlib.ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        both = [stack.enter_context(subprocess.Popen([sys.executable, "-c", script], **pipes)) for _ in range(2)]
        for process in both:
            assert process.stdout.readline().strip() == "ready"
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in both:
            process.communicate()
            assert process.returncode == 0
    assert sorted(grid.ran) == sorted(grid.keys)


def test_a_signal_reaches_the_cell_and_ends_the_grid(grid, capsys):
    """SIGTERM to the invocation: the cell's process gets it, the exit status is 143, and the cell can go on."""
    grid.behave(c1="wait")
    log = grid.places[1].log

    def stop() -> None:
        while not (log.is_file() and "waiting" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        run_local(grid.places, grid.command)
    assert end.value.code == 143
    assert f"the same command resumes {grid.keys[1]}" in capsys.readouterr().out
    assert grid.ran == grid.keys[:2]
    grid.behave()
    assert run_local(grid.places, grid.command).finished == grid.keys


@pytest.mark.parametrize("kind", ["shell", "slurm"])
def test_scripts_run_every_cell(grid, kind):
    """A shell script runs one line per cell and fails if one does; an array has one task per cell and puts it back."""
    path = write_script(kind, grid.folder / "jobs" / "cells.sh", "A grid", grid.places, grid.command)
    text = path.read_text()
    assert all(key in text for key in grid.keys)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if kind == "slurm":
        assert f"--array=0-{len(grid.keys) - 1}" in text and "scontrol requeue" in text and "--requeue" in text
        return
    for place in grid.places:
        place.folder.mkdir(parents=True)
    grid.behave(c1="fails")
    assert subprocess.run(["bash", str(path)], check=False).returncode == 1
    assert grid.ran == grid.keys
    assert shlex.split(text.splitlines()[4])[-3] == grid.keys[0]
