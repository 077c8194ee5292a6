"""`nrat_scale.train.train`: a function for notebooks that returns results and leaves the process as it was."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.recipe import load_recipe
from nrat_scale.train import loop, train
from tests.support.runs import ROOT, digest


def test_it_returns_what_the_command_line_prints(recipe_path, tmp_path):
    """Run directory, steps, best validation and rows; the bytes are those of the command line."""
    done = train(recipe_path, {"run_dir": tmp_path / "run", "train.epochs": 2})
    assert (done.run, done.step, done.complete) == (tmp_path / "run", 8, True)
    assert done.best in [row for row in done.metrics if row["kind"] == "validation"]
    command = [
        sys.executable,
        "-m",
        "nrat_scale.train",
        str(recipe_path),
        f"run_dir={tmp_path / 'cli'}",
        "train.epochs=2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT)
    assert digest(done.run) == digest(tmp_path / "cli")


def test_a_list_of_overrides_and_a_recipe(recipe_path, tmp_path):
    """Overrides may be a list; a recipe that was read already needs none; an unfinished run says so."""
    part = train(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.max_steps=2"])
    assert (part.step, part.complete, part.best) == (2, False, None)
    whole = train(load_recipe(recipe_path, {"run_dir": str(tmp_path / "run")}))
    assert (whole.step, whole.complete) == (12, True)


def test_two_precisions_in_one_process(recipe_path, tmp_path):
    """Each training has its own precision, and an Accelerator of the caller keeps its own."""
    mine = Accelerator(mixed_precision="no", cpu=True)
    runs = [
        train(recipe_path, {"run_dir": tmp_path / name, "precision": name, "train.max_steps": 2}).run
        for name in ("fp32", "bf16", "fp64", "bf16-again")
        if name != "bf16-again"
    ]
    runs.append(train(recipe_path, {"run_dir": tmp_path / "again", "precision": "bf16", "train.max_steps": 2}).run)
    found = [digest(run) for run in runs]
    assert found[1] == found[3]
    assert len({one["metrics"] for one in found}) == 3
    assert mine.mixed_precision == "no"
    assert mine.prepare(torch.nn.Linear(2, 2))(torch.ones(1, 2)).dtype == torch.float32


def test_the_process_stays_as_it_was(recipe_path, tmp_path):
    """Signal handlers, threads, denormal numbers, random numbers and output streams are the caller's again."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    torch.set_num_threads(2)
    torch.manual_seed(5)
    state, streams, tiny = torch.get_rng_state(), (sys.stdout, sys.stderr), torch.tensor(1e-39)
    train(recipe_path, {"run_dir": tmp_path / "run", "train.max_steps": 1})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert float(tiny * 1.0) != 0
    assert (sys.stdout, sys.stderr) == streams
    torch.set_num_threads(1)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_of_a_notebook(recipe_path, tmp_path, monkeypatch, capsys, times):
    """The first saves and raises KeyboardInterrupt; a second one raises it at once; neither ends the process."""
    step = loop.train_step
    monkeypatch.setattr("nrat_scale.train.signals._REPEATED_SECONDS", 0.0)

    def interrupted(state, batch):
        step(state, batch)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe_path, {"run_dir": tmp_path / "run"})
    saved = RunFolder(tmp_path / "run").pointer("last").is_file()
    assert saved == (times == 1)
    assert ("The same call resumes it." in capsys.readouterr().out) == saved
    monkeypatch.setattr(loop, "train_step", step)
    assert train(recipe_path, {"run_dir": tmp_path / "run"}).complete


def test_a_mistake_is_one_line_in_a_notebook(recipe_path):
    """IPython asks the exception for its traceback."""
    with pytest.raises(UserError) as caught:
        train(recipe_path, {"objective": "trades"})
    (line,) = caught.value._render_traceback_()
    assert line.startswith("error: ") and "Did you mean objective.name=trades?" in line
