"""One training per run directory: the second start ends and names the first; whatever a dead one leaves is cleaned up."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train import ownership
from nrat_scale.train.loop import train
from nrat_scale.train.ownership import claim, read_owner
from tests.support.launched import TIMEOUT_SECONDS, Launched, launched
from tests.support.runs import digest

REFUSED = "is being trained by process {pid} on "

# A start on another node: its kernel has another boot id. `LOCKS` false: a file system that cannot lock.
ON_ANOTHER_NODE = """
import fcntl, os
from nrat_scale.core.errors import run_cli
from nrat_scale.train import ownership
from nrat_scale.train.__main__ import main
node, locks, lease = os.environ["NODE"], os.environ["LOCKS"], float(os.environ["LEASE"])
ownership.machine_id = lambda: node
ownership.socket.gethostname = lambda: node
ownership.LEASE_SECONDS = lease
def lockf(descriptor, operation):
    if locks == "unsupported":
        raise OSError(38, "Function not implemented")
if locks != "yes":
    ownership.fcntl.lockf = lockf
run_cli(main)
"""


def arguments(recipe_path: Path, run: Path, epochs: int = 40) -> list[str]:
    return [str(recipe_path), f"train.epochs={epochs}", f"run_dir={run}"]


def on_node(node: str, arguments: list[str], locks: str = "unsupported", lease: float = 4.0) -> Launched:
    """Training on another machine: `locks` is `unsupported`, or `alone` if each node locks by itself."""
    environment = {"NODE": node, "LOCKS": locks, "LEASE": str(lease)}
    return Launched(arguments, script=ON_ANOTHER_NODE, environment=environment)


def after_refusals(starts: list[Launched], number: int) -> list[Launched]:
    """Those that still run when `number` of the launches have ended."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while len(running := [start for start in starts if start.ranks[0].is_alive()]) > len(starts) - number:
        assert time.monotonic() < end, [start.text("err") for start in starts]
        time.sleep(0.02)
    return running


def wait_for(launch: Launched, ending: str, text: str) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while text not in launch.text(ending):
        assert time.monotonic() < end, launch.text("err")
        time.sleep(0.02)


@pytest.mark.medium
def test_the_second_training_ends_and_the_first_goes_on(recipe_path: Path, tmp_path: Path) -> None:
    """It names the process; the first ends with the bits of a run that was alone, and the third start finds it complete."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    given = arguments(recipe_path, run, epochs=12)
    with launched(given) as first:
        first.wait_for_rows(run, 2)
        os.kill(first.pid(), signal.SIGSTOP)  # it holds the lock while frozen
        with launched(given) as second:
            assert second.wait() == [2]
            error = second.text("err")
        os.kill(first.pid(), signal.SIGCONT)
        assert error.startswith(f"error: {run} {REFUSED.format(pid=first.pid())}")
        assert "run_dir=PATH" in error and "Traceback" not in error
        first.succeed()
    train(load_recipe(recipe_path, ["train.epochs=12", f"run_dir={alone}"]))
    assert digest(run) == digest(alone)
    assert not RunFolder(run).owner.exists(), "an owner that ends by itself leaves no record"
    with launched(given) as third:
        assert "is complete" in third.succeed()


@pytest.mark.medium
def test_simultaneous_starts(recipe_path: Path, tmp_path: Path) -> None:
    """Of starts in one new folder exactly one trains; the others name it, also two ranks that share an owner."""
    for trial, processes in enumerate((1, 1, 2)):
        run = tmp_path / str(trial)
        starts = [Launched(arguments(recipe_path, run, epochs=4000), processes) for _ in range(3)]
        try:
            (winner,) = after_refusals(starts, 2)
            for loser in starts:
                if loser is not winner:
                    assert loser.wait() == [2] * processes
                    assert REFUSED.format(pid=winner.pid()) in loser.text("err")
            winner.wait_for_rows(run, 1)
        finally:
            for start in starts:
                start.kill()


@pytest.mark.medium
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_owner_never_needs_a_person(recipe_path: Path, tmp_path: Path, processes: int) -> None:
    """After SIGKILL the next start resumes at once: the kernel has freed the lock."""
    run = tmp_path / "run"
    with launched(arguments(recipe_path, run), processes) as first:
        first.wait_for_rows(run, 4)
        for rank in range(processes):
            os.kill(first.pid(rank), signal.SIGKILL)
        first.wait()
    assert read_owner(RunFolder(run)) is not None, "the record of the dead owner is still there"
    step = named_checkpoint(run, "last").step
    began = time.monotonic()
    with launched([*arguments(recipe_path, run), f"train.max_steps={step + 1}"], processes) as second:
        assert f"from step {step}" in second.succeed()
    assert time.monotonic() - began < ownership.LEASE_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["unsupported", "alone"])
def test_owners_on_other_nodes(recipe_path: Path, tmp_path: Path, locks: str) -> None:
    """Without a common lock the record decides: a live owner is named; a dead one is replaced after its lease."""
    run = tmp_path / "run"
    first = on_node("node-a", arguments(recipe_path, run, epochs=4000), locks)
    try:
        first.wait_for_rows(run, 4)
        second = on_node("node-b", arguments(recipe_path, run, epochs=4000), locks)
        assert second.wait() == [2]
        assert f"is being trained by process {first.pid()} on node-a" in second.text("err")
    finally:
        first.kill()  # SIGKILL: nothing is released
    third = on_node("node-b", [*arguments(recipe_path, run, epochs=4000), "train.max_steps=20"], locks)
    assert third.wait() == [0], third.text("err")
    assert "resuming" in third.text("out")


@pytest.mark.slow
def test_a_frozen_owner_that_was_replaced_writes_nothing_more(recipe_path: Path, tmp_path: Path) -> None:
    """It was frozen for longer than its lease: it finds out, names its successor and ends with status 2."""
    run = tmp_path / "run"
    first = on_node("node-a", arguments(recipe_path, run, epochs=4000))
    second: Launched | None = None
    try:
        first.wait_for_rows(run, 4)
        os.kill(first.pid(), signal.SIGSTOP)
        second = on_node("node-b", arguments(recipe_path, run, epochs=4000))
        wait_for(second, "out", "resuming")
        os.kill(first.pid(), signal.SIGCONT)
        assert first.wait() == [2]
        assert f"is now trained by process {second.pid()} on node-b" in first.text("err")
        assert "Traceback" not in first.text("err")
    finally:
        first.kill()
        if second is not None:
            second.kill()


@pytest.mark.medium
def test_two_takeovers_at_once(recipe_path: Path, tmp_path: Path) -> None:
    """Two nodes find the record of a dead third one: one trains."""
    run = tmp_path / "run"
    train(load_recipe(recipe_path, [f"run_dir={run}", "train.epochs=4000", "train.max_steps=4"]))
    run_folder = RunFolder(run)
    old = {"host": "gone", "machine": "gone", "pid": 7, "started": "2026-01-01 00:00:00", "token": "0"}
    run_folder.owner.write_text(json.dumps(old))
    os.utime(run_folder.owner, (0, 0))
    starts = [on_node(node, arguments(recipe_path, run, epochs=4000)) for node in ("node-a", "node-b")]
    try:
        (winner,) = after_refusals(starts, 1)
        wait_for(winner, "out", "resuming")
        assert sorted(start.ranks[0].exitcode or 0 for start in starts) == [0, 2], [
            start.text("err") for start in starts
        ]
    finally:
        for start in starts:
            start.kill()


# ---- leftovers ------------------------------------------------------------------------------------------------------

HEX = "0123456789ab"
OWNER = json.dumps({"host": "h", "machine": "", "pid": 1, "started": "", "token": "t"})


@pytest.mark.parametrize(
    "leftovers",
    [
        {f".recipe.yaml.{HEX}.tmp": "half"},
        {".alive/lock": ""},
        {".alive/lock": "", ".alive/owner.json": ""},
        {".alive/rank-0": "", ".alive/now-01234567": "", f".recipe.yaml.{HEX}.tmp": ""},
        {f".alive/.owner.json.{HEX}.tmp": "", ".alive/rank-13": ""},
    ],
    ids=lambda leftovers: " ".join(leftovers),
)
def test_leftovers_of_a_killed_start_are_cleaned(recipe_path: Path, tmp_path: Path, leftovers: dict[str, str]) -> None:
    """A start killed before it wrote recipe.yaml leaves a folder that the next one takes, also with resume=never."""
    for name, text in leftovers.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.max_steps=1", "resume=never"]))
    assert not list(run.rglob("*.tmp"))
    assert {path.name for path in (run / ".alive").iterdir()} == {"lock"}


@pytest.mark.parametrize(
    "foreign", ["notes.txt", ".alive/notes.txt", f".notes.txt.{HEX}.tmp", ".recipe.yaml.tmp", "checkpoints/x", ".alive"]
)
def test_a_foreign_file_is_refused(recipe_path: Path, tmp_path: Path, foreign: str) -> None:
    """Whatever is not ours stays untouched, beside our own leftovers, too."""
    run = tmp_path / "run"
    (run / foreign).parent.mkdir(parents=True, exist_ok=True)
    (run / foreign).write_text("mine")
    (run / f".recipe.yaml.{HEX}.tmp").write_text("half")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match="holds something that is not a run; nothing in it was touched"):
        train(load_recipe(recipe_path, [f"run_dir={run}"]))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_leftovers_in_a_run_are_removed(recipe_path: Path, tmp_path: Path) -> None:
    """Temporary files of every kind that training writes; those of a running evaluation stay; damaged noise is rewritten."""
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.max_steps=2"]))
    noise = (run / "label_noise.npz").read_bytes()
    (run / "label_noise.npz").write_bytes(noise[: len(noise) // 2])
    ours = ["metrics.jsonl", "model.json", "data.json", "label_noise.npz", "skipped_shards.json",
            "bad-step-00000002-rank0.safetensors"]  # fmt: skip
    for name in (*ours, "results.json"):
        (run / f".{name}.{HEX}.tmp").write_text("half")
    (run / "releases" / f".epoch-0001.{HEX}.tmp").mkdir(parents=True)
    (run / "releases" / f".epoch-0001.{HEX}.tmp" / "model.safetensors").write_text("half")
    train(load_recipe(recipe_path, [f"run_dir={run}", "train.max_steps=4"]))
    assert [path.name for path in run.rglob("*.tmp")] == [f".results.json.{HEX}.tmp"]
    assert (run / "label_noise.npz").read_bytes() == noise


# Ends itself by SIGKILL before its Nth change of a file in the run folder.
KILLED_AT = """
import os, signal, sys
from nrat_scale.core.errors import run_cli
from nrat_scale.train.__main__ import main
left, run = int(os.environ["OPERATION"]), next(word for word in sys.argv if word.startswith("run_dir=")).removeprefix("run_dir=")
def hook(event, arguments):
    global left
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.utime", "os.rmdir") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if changes and str(arguments[0]).startswith(run):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
run_cli(main)
"""


@pytest.mark.slow
def test_killed_before_every_change_of_a_start(recipe_path: Path, tmp_path: Path) -> None:
    """The next start trains, whichever file of the run folder was the last that a killed start changed."""
    alone = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'alone'}", "train.max_steps=1"]))
    for operation in range(1, 100):
        run = tmp_path / str(operation)
        given = [*arguments(recipe_path, run, epochs=3), "train.max_steps=1"]
        with launched(given, script=KILLED_AT, environment={"OPERATION": str(operation)}) as killed:
            (status,) = killed.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, killed.text("err")
        train(load_recipe(recipe_path, [f"run_dir={run}", "train.max_steps=1"]))
        assert digest(run) == digest(alone), operation
        assert not list(run.rglob("*.tmp")), operation
    assert operation > 12


def test_a_claim_of_the_same_process_is_renewed(tmp_path: Path) -> None:
    """A notebook whose training failed may start it again; the older claim does not undo the newer one."""
    run = RunFolder(tmp_path)
    first = claim(run)
    second = claim(run)
    first.release()
    owner = read_owner(run)
    assert owner == second.me
    second.release()
    assert read_owner(run) is None


def test_a_replaced_owner_names_its_successor_whatever_fails_first(tmp_path: Path) -> None:
    """The successor removes the other's temporary file as a leftover; its absence is no fault of the disk."""
    run = RunFolder(tmp_path)
    first, second = claim(run), claim(run)
    with pytest.raises(UserError, match="is now trained by"), first:
        raise UserError("last.json cannot be written (No such file or directory).")
    assert read_owner(run) == second.me
    with pytest.raises(UserError, match="The disk is full"), second:
        raise UserError("The disk is full.")
    assert read_owner(run) is None


def test_the_lease_outlasts_many_touches() -> None:
    """The timeout that the docs state, far above the period of the touches."""
    page = (Path(__file__).parents[2] / "docs/reliability.md").read_text()
    assert re.search(rf"{ownership.LEASE_SECONDS:.0f} seconds", page)
