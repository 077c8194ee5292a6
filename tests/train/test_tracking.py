"""Trackers: whatever fails there is one warning, and the run ends with the same bits."""

import errno
import os
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nrat_scale import tracking
from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from tests.support.accelerate import new_process
from tests.support.runs import digest, make_shards
from tests.support.stand_in_trackers import stand_in_trackers


@pytest.fixture(scope="module")
def untroubled(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose events are written."""
    with new_process():
        run = train(load_recipe(recipe_path, [f"run_dir={tmp_path_factory.mktemp('tracked') / 'run'}"]))
    assert list((run / "tensorboard").glob("events.*"))
    return run


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def a_file(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """`tensorboard` in the run is a file."""
    train_one_step(run)
    for path in (run / "tensorboard").iterdir():
        path.unlink()
    (run / "tensorboard").rmdir()
    (run / "tensorboard").write_text("mine")


def dangling(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """A link to a disk that is gone."""
    a_file(monkeypatch, run)
    (run / "tensorboard").unlink()
    (run / "tensorboard").symlink_to("/proc/no/such/disk")


def not_installed(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def broken_import(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """Such as protobuf of another version: any exception."""

    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torch.utils.tensorboard":
            raise TypeError("Descriptors cannot be created directly.\nIf this call came from ...")

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(sys, "meta_path", [type("Broken", (), {"find_spec": staticmethod(find_spec)}), *sys.meta_path])


def full_in_the_thread(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """TensorBoard writes in a thread of its own: the disk fills after some events."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    real, written = RecordWriter.write, []

    def write(self: Any, data: bytes) -> None:
        written.append(data)
        (full if len(written) > 5 else real)(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)


def full_at_the_flush(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.flush", full)


def full_at_the_end(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)


def read_only(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def makedirs(path: object, *_: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tensorboard.compat.tf.io.gfile.makedirs", makedirs)


RECIPES: dict[Path, Path] = {}


def train_one_step(run: Path) -> None:
    with new_process():
        train(load_recipe(RECIPES[run], [f"run_dir={run}", "train.max_steps=1"]))


@pytest.mark.parametrize(
    "trouble",
    [a_file, dangling, not_installed, broken_import, full_in_the_thread, full_at_the_flush, full_at_the_end, read_only],
    ids=lambda trouble: trouble.__name__,
)
def test_no_tracker_ends_or_changes_a_run(
    recipe_path: Path,
    untroubled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    """One warning with the reason, no traceback, and the bits of the run without trouble."""
    RECIPES[tmp_path / "run"] = recipe_path
    trouble(monkeypatch, tmp_path / "run")
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.log_every=1"]))
    assert digest(run) == digest(untroubled)
    printed = capsys.readouterr().err
    assert printed.count("warning: No more TensorBoard events: ") == 1, printed
    assert "Traceback" not in printed and "Exception in thread" not in printed


def test_a_profile_that_cannot_be_written_is_a_warning(
    recipe_path: Path, untroubled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`profile` is a file: the run goes on."""
    run = tmp_path / "run"
    RECIPES[run] = recipe_path
    train_one_step(run)
    (run / "profile").write_text("mine")
    train(load_recipe(recipe_path, [f"run_dir={run}"]), profile=2)
    assert digest(run) == digest(untroubled)
    assert "warning: The profile is not written" in capsys.readouterr().err


# ---- other trackers -------------------------------------------------------------------------------------------------


def test_every_tracker_gets_recipe_metrics_images_and_results(
    recipe_path: Path,
    untroubled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """W&B and trackio, by the interfaces that Accelerate uses, and TensorBoard's files; the run has the bits of one without."""
    packages = stand_in_trackers(monkeypatch)
    run = tmp_path / "run"
    train(load_recipe(recipe_path, [f"run_dir={run}", "train.trackers=[tensorboard,wandb,trackio]"]))
    assert digest(run) == digest(untroubled)
    evaluate_cli.main([str(run), "--data", str(make_shards(tmp_path / "test", 20, 5)), "--attacks", "natural"])
    assert "No more" not in capsys.readouterr().err
    for package in packages:
        assert {call["id"] for call in package.inits} == {package.inits[0]["id"]}, "the evaluation continues the run"
        assert package.config["objective.name"] == "nrat" and package.config["threat.eps"] == 0.1
        logged = {name for values in package.logged for name in values}
        assert {"train/loss", "validation/robust", "test/best/natural", "test/last/natural"} <= logged
        assert any(name.startswith("validation/natural_and_adversarial") for name in logged)
        assert package.finished == 2
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "test/best/natural"} <= set(tags["scalars"])
    assert "validation/natural_and_adversarial" in tags["images"] and {
        "recipe/text_summary",
        "results/text_summary",
    } <= set(tags["tensors"])
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_trackers_that_start_at_once_share_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one draws the id of a new run, another one asks for it."""
    run, others = RunFolder(tmp_path), []
    draw = secrets.token_hex

    def interrupted(size: int) -> str:
        if not others:
            asking = threading.Thread(target=lambda: others.append(tracking.tracking_id(run)))
            others.append(asking)
            asking.start()
            asking.join(0.5)  # without a lock it has its own id by now; with one it waits for ours
        return draw(size)

    monkeypatch.setattr(secrets, "token_hex", interrupted)
    ours = tracking.tracking_id(run)
    others[0].join()
    assert others[1:] == [ours]


@pytest.mark.parametrize("when", ["init", "log", "finish", "import"])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_failing_tracker_is_one_warning(
    recipe_path: Path,
    untroubled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    when: str,
) -> None:
    """Whatever call fails: the run ends with the same bits, and TensorBoard still has its events."""
    packages = {package.name: package for package in stand_in_trackers(monkeypatch)}
    packages[name].fails = when
    if when == "import":
        monkeypatch.setitem(sys.modules, name, None)
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", f"train.trackers=[{name},tensorboard]"]))
    assert digest(run) == digest(untroubled)
    printed = capsys.readouterr().err
    assert printed.count("warning: No more ") == 1 and "Traceback" not in printed, printed
    assert (f"Install it with: pip install {name}" in printed) is (when == "import")
    assert list((run / "tensorboard").glob("events.*"))


def test_a_tracker_that_hangs_does_not_hold_up_the_run(
    recipe_path: Path,
    untroubled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server that never answers costs the wait at the end, and one warning."""
    wandb, _ = stand_in_trackers(monkeypatch)
    wandb.hangs = threading.Event()
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.2)
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}", "train.trackers=[wandb]"]))
    wandb.hangs.set()
    assert digest(run) == digest(untroubled)
    assert "No more W&B data: no answer within 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[tensorbord]", "Did you mean 'tensorboard'"),
        ("[wandb,wandb]", "different names"),
        ("mlflow", "train.trackers"),
    ],
)
def test_unknown_trackers_are_refused(recipe_path: Path, value: str, message: str) -> None:
    """Before anything is trained."""
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_path, [f"train.trackers={value}"])


def test_no_password_reaches_a_tracker(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User, password and query of an address stay here."""
    packages = stand_in_trackers(monkeypatch)
    PartialState(cpu=True)  # Accelerate's trackers log through it
    trackers = tracking.Trackers(RunFolder(tmp_path), ["wandb", "trackio"])
    trackers.describe({"data.real.shards": "https://me:secret@host/path?token=secret", "train.max_steps": None}, "")
    trackers.close()
    for package in packages:
        assert package.config == {"data.real.shards": "https://host/path", "train.max_steps": "None"}


def test_trackers_are_not_part_of_the_identity(recipe_path: Path) -> None:
    """A run can be resumed with other trackers, or with none."""
    identities = {load_recipe(recipe_path, [f"train.trackers={value}"]).identity for value in ("[]", "[wandb]")}
    assert identities == {load_recipe(recipe_path).identity}
