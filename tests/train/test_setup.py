"""Starting a run: settings that do not fit the launch are refused before anything is written."""

import os
import shlex
from pathlib import Path

import pytest
import torch

from nrat_scale.core.distributed import use_all_cores
from nrat_scale.core.errors import UserError
from nrat_scale.data.training_data import TrainingData
from nrat_scale.recipe import load_recipe
from nrat_scale.train import validate
from nrat_scale.train.loop import train
from nrat_scale.train.signals import resume_command
from tests.support.launched import launched


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.bn=groups"], "go together"),
        (["model.bn_group_size=4"], "go together"),
        (["model.bn=groups", "model.bn_group_size=3"], "divide the 16 images"),
        (["model.bn=groups", "model.bn_group_size=8", "train.accumulate=4"], "divide the 4 images"),
        (["model.bn=sync"], "needs GPUs"),
        (["model.bn=grups"], "Did you mean 'groups'"),
        (["precision=fp16"], "GPU"),
    ],
)
def test_wrong_settings_are_refused(wide_path: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    """Settings that do not fit end in an error before anything is written."""
    with pytest.raises(UserError, match=message):
        train(load_recipe(wide_path, [*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("environment", "key", "threads"),
    [
        ({"OMP_NUM_THREADS": "1"}, None, 1),
        ({"OMP_NUM_THREADS": "3"}, None, 3),
        ({"OMP_NUM_THREADS": "3,2"}, None, 3),
        ({"OMP_NUM_THREADS": "many"}, None, CORES),
        ({"OMP_NUM_THREADS": "0"}, None, CORES),
        ({}, None, CORES),
        ({"OMP_NUM_THREADS": "1"}, 5, 5),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}, None, 1),  # torchrun sets it for several processes only
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(CORES)}, None, 1),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, None, 3),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None, CORES),  # accelerate launch
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, None, 3),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, 1, 1),
    ],
)
def test_the_number_of_threads_is_printed(
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    key: int | None,
    threads: int,
) -> None:
    """`train.threads`, else the user's OMP_NUM_THREADS, else the cores; a launcher's OMP_NUM_THREADS=1 is not the user's."""
    monkeypatch.setattr("nrat_scale.train.setup.use_all_cores", use_all_cores)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = [f"train.threads={key}"] if key else []
    try:
        train(load_recipe(recipe_path, [*given, f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert f" {threads} CPU thread(s) each, " in capsys.readouterr().out


def test_threads_are_no_part_of_a_recipe(recipe_path: Path, tmp_path: Path) -> None:
    """A run resumes with another number."""
    for step in (1, 2):
        given = [f"run_dir={tmp_path / 'run'}", f"train.threads={step}", f"train.max_steps={step}"]
        train(load_recipe(recipe_path, given))
    with pytest.raises(UserError, match=r"train\.threads is 0; it must be at least 1"):
        load_recipe(recipe_path, ["train.threads=0"])


def test_printed_commands_are_quoted(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path with spaces or quotes is one word of the commands after training and after a signal."""
    run = tmp_path / "my run's $1"
    train(load_recipe(recipe_path, [f"run_dir={run}"]))
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "nrat_scale.evaluate" in line]
    assert shlex.split(command)[:4] == ["python", "-m", "nrat_scale.evaluate", str(run)]
    monkeypatch.setattr("sys.argv", ["train", "my recipe.yaml", f"run_dir={run}", "resume=never"])
    assert shlex.split(resume_command())[-2:] == ["my recipe.yaml", f"run_dir={run}"]


# ---- memory ---------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = """
import os, torch
from nrat_scale.core.errors import run_cli
from nrat_scale.train import {module}
from nrat_scale.train.__main__ import main
real = {module}.{name}
def short(*arguments, **options):
    if os.environ.get("RANK", "0") == os.environ["FAILING"]:
        raise {error}
    return real(*arguments, **options)
{module}.{name} = short
run_cli(main)
"""
CUDA = (
    "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which "
    "1.06 GiB is free. Process 7 has 78 GiB memory in use. Of the allocated memory')"
)
CPU = 'RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can\'t allocate memory: you tried")'


@pytest.mark.medium
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("module", "name", "error"),
    [("loop", "train_step", CUDA), ("validate", "correct_under", CUDA), ("loop", "train_step", CPU),
     ("setup", "build_optimizer", CUDA), ("validate", "correct_under", "MemoryError()")],
)  # fmt: skip
def test_out_of_memory_ends_in_a_sentence(
    recipe_path: Path, tmp_path: Path, module: str, name: str, error: str, processes: int
) -> None:
    """In a step, a validation or the start, on the first rank or another: status 2, the way out, and all ranks end."""
    script = OUT_OF_MEMORY.format(module=module, name=name, error=error)
    given, failing = [str(recipe_path), f"run_dir={tmp_path / 'run'}"], processes - 1
    with launched(given, processes, script, {"FAILING": str(failing)}) as launch:
        statuses, text = launch.wait(), launch.text("err", failing)
    assert statuses == [2] if processes == 1 else [1, 2], text
    assert "error: " in text and "Out of memory (" in text and "Traceback" not in text
    assert "train.accumulate=2, which needs less" in text and f"computes {16 // processes} images at once" in text
    assert "Process 7" not in text
    if processes == 2:
        assert "error: rank 1: " in text


def test_validation_uses_smaller_blocks_if_memory_does_not_suffice(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracies are those of one block; the noise belongs to the image."""
    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}"]))
    real = validate.correct_under

    def short(*arguments: object, batch_size: int, **options: object) -> object:
        if batch_size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*arguments, batch_size=batch_size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(validate, "correct_under", short)
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert "validating with fewer" in capsys.readouterr().err


def test_a_batch_above_the_data_is_refused(recipe_path: Path, tmp_path: Path) -> None:
    """It would repeat images: the message has both numbers and the largest batch; a run that has begun goes on."""
    run = f"run_dir={tmp_path / 'run'}"
    alone = ["data.generated.shards=null", "train.max_steps=1", run]
    one = r"data\.batch_size 512 every batch has 512 real .* only 100 to train on besides the 20 .* data\.batch_size=100 or less"
    with pytest.raises(UserError, match=one):
        train(load_recipe(recipe_path, [*alone, "data.batch_size=512"]))
    shares = ["data.generated.fraction=0.5", "data.validation.source=generated", "data.validation.size=10", run]
    with pytest.raises(UserError, match=r"data\.batch_size=16[01] or less"):
        train(load_recipe(recipe_path, [*shares, "data.batch_size=300"]))
    assert not (tmp_path / "run").exists()
    train(load_recipe(recipe_path, [*alone, "data.batch_size=100"]))


def test_a_begun_run_with_a_large_batch_goes_on(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions began such runs."""
    overrides = ["data.generated.shards=null", "data.batch_size=200", f"run_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as older:
        older.setattr(TrainingData, "check_batch_size", lambda data: None)
        train(load_recipe(recipe_path, [*overrides, "train.max_steps=1"]))
    train(load_recipe(recipe_path, [*overrides, "train.max_steps=2"]))
