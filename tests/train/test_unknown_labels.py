"""Labels that nobody has checked: what a run records of them, and that no command claims that they are clean."""

import json
from pathlib import Path

import pytest
import yaml

from nrat_scale.core.errors import UserError
from nrat_scale.core.run_folder import RunFolder
from nrat_scale.evaluate import __main__ as evaluate_cli
from nrat_scale.recipe import load_recipe
from nrat_scale.release import __main__ as release_cli
from nrat_scale.report import __main__ as report_cli
from nrat_scale.train import __main__ as train_cli
from nrat_scale.train.loop import train
from tests.support.runs import RECIPE, digest, make_shards

ALONE = ["data.generated.shards=null", "train.epochs=2", "data.epoch_samples=32"]
UNSET = "noise: {kind: symmetric, rate: 0.4}, "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own images whose labels are partly wrong, a known data set, and their recipes without a kind of noise."""
    folder = tmp_path_factory.mktemp("unknown")
    generated = make_shards(folder / "generated", 90, 1)
    for name, dataset in (("own", "custom"), ("known", "mnist"), ("pets", "cifar10-like")):
        real = make_shards(folder / f"{name}-shards", 120, 0, dataset=dataset, shift=3)
        text = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)).replace(UNSET, "")
        (folder / f"{name}.yaml").write_text(text)
    make_shards(folder / "test", 40, 5)
    return folder


def kinds(run: Path) -> tuple[str, str]:
    """The recorded kinds of noise of real and generated labels."""
    data = yaml.safe_load((run / "recipe.yaml").read_text())["data"]
    return data["real"]["noise"]["kind"], data["generated"]["noise"]["kind"]


@pytest.mark.parametrize(("name", "kind"), [("own", "unknown"), ("pets", "unknown"), ("known", "none")])
def test_an_unset_kind_is_settled_by_the_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    """Only the labels of known data sets are clean; the run records the kind, and says nothing of clean labels else."""
    run = tmp_path / "run"
    train_cli.main([str(folder / f"{name}.yaml"), f"run_dir={run}", *ALONE])
    out = capsys.readouterr().out
    assert kinds(run) == (kind, "none")
    rows = RunFolder(run).read_metrics()
    claims = kind == "none"
    assert ("clean" in out) == claims, out
    assert ("labels of the real images: as they came, nobody has checked them" in out) != claims
    assert [(row["clean_accuracy"] is not None) for row in rows if row["kind"] == "train"] == [claims] * 2
    assert [(row["natural_clean"] is not None) for row in rows if row["kind"] == "validation"] == [claims] * 2
    assert (run / "label_noise.json").exists() == claims


def test_a_kind_that_is_set_is_kept(folder: Path, tmp_path: Path) -> None:
    """Who knows that own labels are right says `none`; a known data set with other labels is `unknown`."""
    for name, kind in (("own", "none"), ("known", "unknown")):
        run = train(
            load_recipe(folder / f"{name}.yaml", [f"run_dir={tmp_path / name}", *ALONE, f"data.real.noise.kind={kind}"])
        )
        assert kinds(run)[0] == kind
        assert (RunFolder(run).read_metrics()[0]["clean_accuracy"] is None) == (kind == "unknown")
    with pytest.raises(UserError, match=r"noise\.rate is 0\.2 but .*kind is 'unknown'. Name a kind"):
        load_recipe(folder / "own.yaml", ["data.real.noise={kind: unknown, rate: 0.2}"])
    clean = [f"run_dir={tmp_path / 'clean'}", *ALONE, "data.validation.labels=clean"]
    with pytest.raises(UserError, match=r"no clean labels of the real images are known.*data\.validation\.shards"):
        train(load_recipe(folder / "own.yaml", clean))


def test_generated_labels_are_unknown(folder: Path, tmp_path: Path) -> None:
    """Even of a known data set: nobody has looked at generated images."""
    run = train(load_recipe(folder / "known.yaml", [f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]))
    assert kinds(run) == ("none", "unknown")


def test_a_stored_run_keeps_what_it_says(folder: Path, tmp_path: Path) -> None:
    """A run that began with kind none, as all did before `unknown`, is resumed by an unset kind, with the same bits."""
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    train(load_recipe(folder / "own.yaml", [f"run_dir={whole}", *ALONE, "data.real.noise.kind=none"]))
    train(
        load_recipe(folder / "own.yaml", [f"run_dir={parts}", *ALONE, "data.real.noise.kind=none", "train.max_steps=2"])
    )
    stored = yaml.safe_load((parts / "recipe.yaml").read_text())
    del stored["data"]["generated"]["noise"], stored["data"]["validation"]["shards"]
    (parts / "recipe.yaml").write_text(yaml.safe_dump(stored))
    identity = json.loads(next(parts.glob("checkpoints/step-*/state.json")).read_text())["identity"]
    assert load_recipe(parts / "recipe.yaml").identity == identity
    train(load_recipe(folder / "own.yaml", [f"run_dir={parts}", *ALONE]))
    assert digest(parts) == digest(whole)
    with pytest.raises(UserError, match=r"data\.real\.noise\.kind is none there and unknown here"):
        train(load_recipe(folder / "own.yaml", [f"run_dir={whole}", *ALONE, "data.real.noise.kind=unknown"]))


@pytest.mark.parametrize("injected", [False, True])
def test_no_command_claims_clean_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], injected: bool
) -> None:
    """Training, evaluation, report, card and RobustBench's footnote of unchecked labels, with noise on top and without."""
    run, released = tmp_path / "run", tmp_path / "release"
    noise = ["data.real.noise={kind: symmetric, rate: 0.5}"] if injected else []
    train_cli.main([str(folder / "own.yaml"), f"run_dir={run}", *ALONE, *noise])
    evaluate_cli.main([str(run), "--data", str(folder / "test"), "--attacks", "natural,pgd2", "--images", "20"])
    report_cli.main([str(run)])
    release_cli.main([str(run), "--to", str(released)])
    printed = capsys.readouterr().out
    report, card = (run / "report.html").read_text(), (released / "README.md").read_text()
    footnote = json.loads((released / "robustbench" / "model_info.json").read_text())["footnote"]
    for text in (printed, report, card, footnote):
        assert "clean label" not in text and "labels are wrong" not in text and "clean class" not in text
    assert "Nobody has checked its real training labels." in footnote
    assert "Some of the real training labels may be wrong: nobody has checked them." in card
    if injected:
        assert "whether the labels before injection were right is unknown" in printed
        assert "injected labels memorised" in printed
        assert "class before injection" in report and "natural, labels before injection" in report
        assert "were changed; whether the labels before injection were right is unknown" in card
        assert "were changed; whether the labels before injection were right is unknown" in footnote
    else:
        assert "unknown: nobody has checked the real labels" in report
        assert "given labels, which nobody has checked" in report
        assert "label noise: unknown" in card
