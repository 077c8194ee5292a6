"""Checkpoints of a run: written beside training, resumed bit for bit, refused with a sentence if they do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nrat_scale.checkpoint.folder import named_checkpoint
from nrat_scale.core.errors import UserError
from nrat_scale.core.files import manifest_entry, write_json
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.prepare import __main__ as prepare
from nrat_scale.recipe import load_recipe
from nrat_scale.train.loop import train
from nrat_scale.train.recovery import save
from nrat_scale.train.setup import start
from nrat_scale.train.step import train_step
from tests.support.runs import ROOT, digest

GOLDEN = ROOT / "tests" / "golden" / "abbf399"


# ---- saving ---------------------------------------------------------------------------------------------------------


def test_saving_does_not_change_what_follows(recipe_path: Path, tmp_path: Path) -> None:
    """A checkpoint that is written while training continues holds the state of its own step."""
    state = start(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    for batch in state.data.batches(0, 3):
        train_step(state, batch)
        state.step += 1
        if state.step == 2:
            expected = {name: value.clone() for name, value in state.base.state_dict().items()}
            save(state, is_best=True)
    assert state.saver is not None
    state.saver.wait(final=True)
    saved = named_checkpoint(tmp_path / "run", "best").tensors("model")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_a_full_disk_costs_checkpoints_not_the_run(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A save that finds no room is skipped with a warning; the last one must succeed."""
    real, calls = shutil.disk_usage, []

    def full(path: object) -> Any:
        calls.append(path)
        return real(path)._replace(free=0) if len(calls) < 3 else real(path)

    monkeypatch.setattr("nrat_scale.checkpoint.format.shutil.disk_usage", full)
    run = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'run'}"]))
    assert len(calls) >= 3 and capsys.readouterr().err.count("without the checkpoint") == 2
    assert named_checkpoint(run, "last").step == 12


@pytest.mark.medium
def test_epochs_are_queued_for_a_release(recipe_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The evaluated weights at the end of every epoch that the recipe names, once, also after an interruption. If they
    cannot be copied, the run prints a warning and continues."""
    aside = ["release.every_epochs=1", "train.keep=1"]
    whole = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'whole'}", *aside]))
    epochs = load_recipe(whole / "recipe.yaml").train.epochs
    for stop in (["train.max_steps=2"], []):
        parts = train(load_recipe(recipe_path, [f"run_dir={tmp_path / 'parts'}", *aside, *stop]))
    folders = [sorted((run / "releases").iterdir()) for run in (whole, parts)]
    assert [path.name for path in folders[0]] == [path.name for path in folders[1]]
    assert [path.name for path in folders[0]] == [f"epoch-{epoch:04d}" for epoch in range(1, epochs + 1)]
    for first, second in zip(*folders, strict=True):
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    last = named_checkpoint(whole, "last")
    kept = (folders[0][-1] / "model.safetensors").read_bytes()
    assert kept == (last.folder / f"{last.evaluated}.safetensors").read_bytes()
    blocked = tmp_path / "blocked"
    train(load_recipe(recipe_path, [f"run_dir={blocked}", "train.keep=1", "train.max_steps=2"]))
    (blocked / "releases").write_text("in the way")
    train(load_recipe(recipe_path, [f"run_dir={blocked}", *aside]))
    assert digest(blocked) == digest(whole)
    assert "not queued for a release" in "".join(capfd.readouterr())


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that abbf399 stopped after 12 of 24 steps, and the shards that its recipe names."""
    folder = tmp_path_factory.mktemp("abbf399")
    prepare.main(["digits", "--out", str(folder / "digits")])
    shutil.copytree(GOLDEN / "run", folder / "run")
    return folder


def test_a_run_of_abbf399_resumes(old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint has unnamed sums, its recipe `compile: false` and `workers: 2`; it ends with abbf399's own metrics."""
    monkeypatch.chdir(old_run)
    run = Path(shutil.copytree("run", tmp_path / "run"))
    train(load_recipe(run / "recipe.yaml", [f"run_dir={run}", "train.max_steps=null"]))
    ended = RunFolder(run).read_metrics()
    wanted = [json.loads(line) for line in (GOLDEN / "metrics_of_the_whole_run.jsonl").read_text().splitlines()]
    assert [list(row) for row in ended] == [list(row) for row in wanted]
    for ours, theirs in zip(ended, wanted, strict=True):
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(sum_names=["loss", "images"]), "it has sums of"),
        (lambda state: state.update(sum_names=7), "it has sums of '7'"),
        (lambda state: state["sums"][0].pop(), "'sums' in state.json does not have 11 numbers per process"),
        (lambda state: state["guard_sums"][0].append(0), "'guard_sums' in state.json does not have 14 numbers"),
        (lambda state: state["guard"].update(spec="x"), "the state of the collapse guard is"),
        (lambda state: state["guard"].pop("warned"), "the state of the collapse guard is"),
        (lambda state: state["guard"].update(rewinds=[1]), "the state of the collapse guard is"),
        (lambda state: state["guard"].update(lr_scale=-1.0), "the collapse guard has counts below 0 or a factor"),
        (lambda state: state["guard"].update(bad_windows=-5), "the collapse guard has counts below 0 or a factor"),
    ],
)
def test_a_checkpoint_of_another_version_ends_in_a_sentence(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    """Sums of other metrics, or an unknown state of the guard: the message names the checkpoint and the way out."""
    monkeypatch.chdir(old_run)
    run = Path(shutil.copytree("run", tmp_path / "run"))
    folder = run / "checkpoints" / "step-00000012"
    state = json.loads((folder / "state.json").read_text())
    change(state)
    write_json(folder / "state.json", state)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**manifest, "state.json": manifest_entry(folder / "state.json")})
    with pytest.raises(UserError, match=rf"step-00000012 was written by another version \({message}.*run_dir=PATH"):
        train(load_recipe(run / "recipe.yaml", [f"run_dir={run}", "train.max_steps=null"]))


def change_tensors(run: Path, name: str, change: Any) -> None:
    """Edit a tensor file of the newest checkpoint of `old_run`, with its entry of the manifest."""
    folder = run / "checkpoints" / "step-00000012"
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(
        folder / "manifest.json", {**manifest, f"{name}.safetensors": manifest_entry(folder / f"{name}.safetensors")}
    )


def first_of(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if tensors[name].ndim > 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model", lambda tensors: tensors.pop(first_of(tensors)), "fit this version's model for the recipe: it has no '"),
        ("ema", lambda tensors: tensors.pop(first_of(tensors)), "fit this version's ema for the recipe: it has no '"),
        ("model", lambda tensors: tensors.update(extra=torch.zeros(1)), "it has 'extra', which the model does not have"),
        ("model", lambda tensors: tensors.update({first_of(tensors): torch.zeros(2, 3)}), r"has the shape \[2, 3\], expected"),
        ("ema", lambda tensors: tensors.update({first_of(tensors): tensors[first_of(tensors)].int()}), "is torch.int32, expected"),
        ("optimizer", lambda tensors: tensors.update({f"{first_of(tensors).rpartition('/')[0]}/hooks": torch.zeros(())}),
         "optimizer state '.*/hooks' does not fit"),
    ],
)  # fmt: skip
def test_tensors_of_another_version_end_in_a_sentence(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Any, message: str
) -> None:
    """Names, shapes or kinds that differ: the message says which and the way out, in one line."""
    monkeypatch.chdir(old_run)
    run = Path(shutil.copytree("run", tmp_path / "run"))
    change_tensors(run, name, change)
    with pytest.raises(UserError, match=message) as caught:
        train(load_recipe(run / "recipe.yaml", [f"run_dir={run}", "train.max_steps=null"]))
    assert "\n" not in str(caught.value) and "Resume with" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 3}, "its seed is 3 and the recipe's is 0"), ({"epoch": 9}, "it counts step 12 as epoch 9")],
)
def test_a_checkpoint_of_another_run_is_refused(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    """A copied folder, or other data under the same recipe."""
    monkeypatch.chdir(old_run)
    run = Path(shutil.copytree("run", tmp_path / "run"))
    folder = run / "checkpoints" / "step-00000012"
    write_json(folder / "state.json", json.loads((folder / "state.json").read_text()) | change)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", {**manifest, "state.json": manifest_entry(folder / "state.json")})
    pointer = json.loads((run / "checkpoints/last.json").read_text())
    write_json(run / "checkpoints/last.json", pointer | {"epoch": change.get("epoch", pointer["epoch"])})
    with pytest.raises(UserError, match=f"is not of this run: {message}"):
        train(load_recipe(run / "recipe.yaml", [f"run_dir={run}", "train.max_steps=null"]))
