"""The report: what the page, the tables and the error messages say, on synthetic run directories."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from nrat_scale.core.errors import UserError
from nrat_scale.report.__main__ import main
from nrat_scale.report.curves import draw_curves
from nrat_scale.report.page import write_report
from nrat_scale.report.run import read_run, read_runs, summary_table
from nrat_scale.report.tables import markdown_table

RECIPE: dict[str, Any] = {
    "seed": 3,
    "precision": "fp32",
    "objective": {"name": "nrat", "lam": 6.0, "inner": "kl", "smoothing": 0.0, "smoothing_mode": "off"},
    "threat": {"eps": 8 / 255, "step": 2 / 255, "num_steps": 10, "space": "pixel"},
    "model": {"name": "cnn4"},
    "train": {"epochs": 5, "validation_attack": "pgd10"},
    "optim": {"lr": 0.1},
    "ema": {"decay": 0.99},
    "awp": {"gamma": 0.0},
    "data": {
        "batch_size": 128,
        "epoch_samples": 2560,
        "real": {"shards": "somewhere/digits/train", "noise": {"kind": "symmetric", "rate": 0.4, "seed": 0}},
        "generated": {"shards": "somewhere/digits_generated", "fraction": 0.7},
        "validation": {"source": "real", "size": 200, "take": "stratified", "labels": "given"},
    },
}
# Validation natural and robust accuracy by epoch; epoch 3 is the best.
CURVE = ((0.30, 0.10), (0.80, 0.40), (0.90, 0.62), (0.92, 0.55), (0.93, 0.50))


class Page(HTMLParser):
    """The parts of a page that the tests look at: all text, tags with their attributes, tables as rows of cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text, self.tags, self.tables = "", [], []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data + " "

    def rows(self, table: int) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]


def score(correct: int, n: int, low: float, high: float) -> dict[str, Any]:
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high, "seed": 0, "seconds": 1.0}


def results(**changes: Any) -> dict[str, Any]:
    """best at step 60 and last at step 100, of 500 test images, AutoAttack on 200."""
    best = {
        "natural": score(487, 500, 0.956, 0.985),
        "pgd20": score(310, 500, 0.577, 0.661),
        "cw20": score(305, 500, 0.567, 0.652),
        "aa": score(118, 200, 0.521, 0.656),
    }
    last = {**best, "natural": score(492, 500, 0.969, 0.992), "pgd20": score(275, 500, 0.506, 0.593)}
    return {
        "format": "nrat_scale.results",
        "version": 1,
        "data": {"folder": "test", "fingerprint": "0123456789abcdef" * 4, "dataset": "digits", "num_images": 500},
        "threat": {"norm": "linf", "eps": 8 / 255, "step": 2 / 255, "space": "pixel"},
        "versions": {"torch": "2.6.0"},
        "checkpoints": {
            "best": {"step": 60, "epoch": 3, "weights": "ema", "sha256": "aa", "attacks": best},
            "last": {"step": 100, "epoch": 5, "weights": "ema", "sha256": "bb", "attacks": last},
        },
        **changes,
    }


def metrics_lines() -> list[str]:
    rows: list[dict[str, Any]] = []
    for epoch, (natural, robust) in enumerate(CURVE, start=1):
        where = {"epoch": epoch, "step": 20 * epoch}
        rows.append(
            {"kind": "train", **where, "loss": 1.0, "natural_accuracy": None, "robust_accuracy": 0.5, "lr": 0.1}
        )
        values = {"natural": natural, "robust": robust, "natural_clean": natural, "robust_clean": robust}
        records = {key: {"correct": round(200 * v), "n": 200, "accuracy": v} for key, v in values.items()}
        rows.append({"kind": "validation", **where, "attack": "pgd10", "labels": "given", **records})
    return [json.dumps(row) + "\n" for row in rows]


def make_run(folder: Path, **files: Any) -> Path:
    """A run directory with all files; keyword `results=None` and the like leave one out, a value replaces it."""
    (folder / "checkpoints").mkdir(parents=True)
    noise = {"kind": "symmetric", "rate": 0.4, "seed": 0, "num_labels": 30, "num_noisy": 12, "realised_rate": 0.4}
    noise["transition_matrix"] = [[6, 4, 0], [0, 7, 3], [5, 0, 5]]
    content = {
        "recipe": RECIPE,
        "metrics": "".join(metrics_lines()),
        "best": {"step": 60, "epoch": 3, "folder": "step-60"},
        "last": {"step": 100, "epoch": 5, "folder": "step-100"},
        "label_noise": noise,
        "model": {"class_names": ["truck", "automobile", "ship"]},
        "results": results(),
        **files,
    }
    names = {"recipe": "recipe.yaml", "metrics": "metrics.jsonl", "best": "checkpoints/best.json"}
    for key, value in content.items():
        path = folder / names.get(key, "checkpoints/last.json" if key == "last" else f"{key}.json")
        if value is not None:
            text = value if isinstance(value, str) else (yaml.safe_dump if key == "recipe" else json.dumps)(value)
            path.write_text(text, encoding="utf-8")
    return folder


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` with one dotted key set."""
    key, _, rest = path.partition(".")
    return {**tree, key: changed(tree[key], rest, value) if rest else value}


# ---- the page -------------------------------------------------------------------------------------------------------


def test_page_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "nrat")
    out = write_report([run])
    page = Page(out)
    assert out == run / "report.html"
    header, best, last = page.rows(0)
    assert header == ["Run", "Checkpoint", "natural", "PGD-20", "CW-20", "AutoAttack"]
    assert best[0] == "nrat" and best[1] == "best epoch 3, EMA weights" and last[0] == "last epoch 5, EMA weights"
    assert best[2] == "97.4 [95.6, 98.5] n = 500"
    assert best[3] == "62.0 [57.7, 66.1] n = 500"
    assert best[5] == "59.0 [52.1, 65.6] n = 200"
    assert last[2] == "55.0 [50.6, 59.3] n = 500"
    for said in (
        "8/255 (0.0314)",
        "λ = 6",
        "cnn4",
        "5 epochs",
        "EMA 0.99",
        "30 % real (digits/train)",
        "70 % generated",
    ):
        assert said in page.text
    assert "AWP" not in page.text and "label smoothing" not in page.text, "what is off is not mentioned"
    assert "highest PGD-10 accuracy on 200 held-out real images" in page.text
    assert "digits (folder test, 500 images, fingerprint 0123456789abcdef)" in page.text
    assert "fewer than 1000 images" in page.text and "Wilson" in page.text
    assert 'role="note"' not in page.source


def test_gaps_and_noise(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")]))
    gaps = {row[0]: row[1:] for row in page.rows(1)[1:]}
    assert gaps["test, natural"] == ["97.4", "98.4", "−1.0"]
    assert gaps["test, PGD-20"] == ["62.0", "55.0", "+7.0"]
    assert gaps["test, CW-20"] == ["61.0", "61.0", "0.0"]
    assert gaps["validation, natural"] == ["90.0", "93.0", "−3.0"]
    assert gaps["validation, PGD-10"] == ["62.0", "50.0", "+12.0"]
    assert gaps["validation, PGD-10, clean labels"] == ["62.0", "50.0", "+12.0"]
    assert "12 of 30 real labels are wrong, a realised rate of 40.0 %" in page.text
    assert page.rows(2)[1] == ["0 truck", "6", "4", "0"]
    assert page.rows(2)[3] == ["2 ship", "5", "0", "5"]


def test_gap_needs_the_same_images(tmp_path: Path) -> None:
    other = changed(results(), "checkpoints.last.attacks.aa", score(50, 100, 0.4, 0.6))
    page = Page(write_report([make_run(tmp_path / "run", results=other)]))
    assert "test, AutoAttack" not in [row[0] for row in page.rows(1)]
    assert "test, CW-20" in [row[0] for row in page.rows(1)]


def test_two_runs_share_the_table(tmp_path: Path) -> None:
    plain = changed(results(), "checkpoints.best.attacks.natural", score(495, 500, 0.977, 0.996))
    runs = [make_run(tmp_path / "nrat"), make_run(tmp_path / "plain", results=plain)]
    page = Page(write_report(runs, tmp_path / "new" / "both.html", title="NRAT and plain"))
    assert [row[0].split()[0] for row in page.rows(0)[1:]] == ["nrat", "last", "plain", "last"]
    assert page.rows(0)[3][2] == "99.0 [97.7, 99.6] n = 500"
    assert "<h1>NRAT and plain</h1>" in page.source
    assert (tmp_path / "new" / "curves.png").is_file()
    assert not (runs[0] / "report.html").exists()
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert "nrat, plain: tested on" in page.text, "what holds for both is said once"


def test_unlike_evaluations_are_flagged(tmp_path: Path) -> None:
    other = changed(results(), "threat.eps", 4 / 255)
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", results=other)]
    page = Page(write_report(runs))
    assert "not evaluated alike" in page.text and "4/255" in page.text


def test_results_of_an_older_best_are_flagged(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", best={"step": 80, "epoch": 4, "folder": "step-80"})]))
    assert "the results are of step 60, but the best checkpoint is now that of step 80" in page.text


def test_plain_training_makes_no_attack(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", recipe=changed(RECIPE, "objective.name", "natural"))]))
    assert "inner loss" not in page.text and "trained with" not in page.text


def test_best_is_last(tmp_path: Path) -> None:
    same = changed(results(), "checkpoints.last", results()["checkpoints"]["best"])
    pointer = {"step": 60, "epoch": 3, "folder": "step-60"}
    page = Page(write_report([make_run(tmp_path / "run", results=same, last=pointer)]))
    assert len(page.rows(0)) == 2
    assert page.rows(0)[1][1].startswith("best = last")
    assert "The best checkpoint is the last one" in page.text


def test_not_evaluated_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", results=None)
    page = Page(write_report([run]))
    command = f"python -m nrat_scale.evaluate '{run}' --data SHARDS --attacks natural,pgd20,cw20,aa"
    assert f"a run: not evaluated yet: {command}" in page.text
    assert "Checkpoint" not in page.text, "there is no empty table"
    page = Page(write_report([run, make_run(tmp_path / "other")]))
    assert page.rows(0)[1] == ["a run", f"not evaluated yet: {command}"]
    assert page.rows(0)[2][0] == "other"


def test_partly_evaluated(tmp_path: Path) -> None:
    partial = results()
    del partial["checkpoints"]["last"], partial["checkpoints"]["best"]["attacks"]["aa"]
    partial["checkpoints"]["best"]["attacks"]["pgd50"] = score(300, 500, 0.55, 0.65)
    page = Page(write_report([make_run(tmp_path / "run", results=partial)]))
    assert page.rows(0)[0][-2:] == ["AutoAttack", "PGD-50"], "an attack of one's own gets its column"
    assert page.rows(0)[1][-2:] == ["-", "60.0 [55.0, 65.0] n = 500"]


@pytest.mark.parametrize("where", ["recipe", "results"])
def test_released_code_is_stamped(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    trees: dict[str, Any] = {"recipe": RECIPE, "results": results()}
    run = make_run(tmp_path / "run", **{where: changed(trees[where], "threat.space", "released_code")})
    main([str(run)])
    page = Page(run / "report.html")
    assert ("p", {"class": "banner", "role": "note"}) in page.tags
    for text in (page.text, capsys.readouterr().out):
        assert "not comparable with RobustBench" in text and "released_code" in text


def test_escaping(tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script>'
    recipe = changed(changed(RECIPE, "objective.name", hostile), "model.name", hostile)
    recipe = changed(changed(recipe, "data.real.shards", hostile), "data.validation.source", hostile)
    evaluated = changed(changed(results(), "data.dataset", hostile), "versions", {hostile: hostile})
    evaluated = changed(evaluated, "checkpoints.best.weights", hostile)
    evaluated = changed(evaluated, "checkpoints.best.attacks.natural.n", hostile)
    evaluated["checkpoints"]["best"]["attacks"][hostile] = score(1, 2, 0.1, 0.9)
    evaluated["checkpoints"][hostile] = evaluated["checkpoints"]["last"]
    noise = {"kind": hostile, "rate": hostile, "realised_rate": 0.5, "transition_matrix": [[1, hostile], [0, 1]]}
    noise["transition_matrix"] = [[1, 1], [0, 1]]
    run = make_run(
        tmp_path / "<script>&$x$\udcff\u4e2d",
        recipe=changed(recipe, "threat.space", hostile),
        results=evaluated,
        label_noise=noise,
        model={"class_names": [hostile, hostile]},
        metrics="".join(metrics_lines()).replace("pgd10", "<script>$\\\\frac$"),
    )
    page = Page(write_report([run], title=hostile))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not re.search("<script", page.source, re.IGNORECASE)
    assert hostile in page.text, "it is still readable"
    assert "<script>&$x$" in page.text
    assert "<script" not in markdown_table(evaluated)


def test_page_is_one_accessible_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = Page(write_report([run]))
    assert not page.open, "every tag is closed"
    assert "http://" not in page.source and "https://" not in page.source
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or tag != "img"
        assert not {"onload", "onerror", "onclick", "href"} & set(attributes)
        assert tag != "th" or attributes.get("scope") in ("col", "row", "rowgroup")
        assert tag != "img" or "Best: epoch 3, natural 90.0 %, PGD-10 62.0 %" in (attributes["alt"] or "")
    assert ("html", {"lang": "en"}) in page.tags
    assert len([tag for tag, _ in page.tags if tag == "caption"]) == len(page.tables) == 3
    first = page.source
    assert Page(write_report([run])).source == first, "the same run gives the same page"


def test_curves_png(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report([run])
    with Image.open(run / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and image.width >= 1200
    assert (run / "curves.png").read_bytes() == draw_curves(read_run(run, "run"))
    assert draw_curves(read_run(make_run(tmp_path / "other", metrics=metrics_lines()[1]), "other"))


def test_best_epoch_without_pointer(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", best=None), "run")
    assert run.best_row["epoch"] == 3


# ---- files that are absent, null or cut off -------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["recipe", "metrics"])
def test_bare_runs(tmp_path: Path, kept: str) -> None:
    absent = ("recipe", "metrics", "best", "last", "label_noise", "model", "results")
    page = Page(write_report([make_run(tmp_path / "run", **dict.fromkeys(set(absent) - {kept}))]))
    assert "not evaluated yet" in page.text and "nan" not in page.text.lower() and "None" not in page.text


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all keys, inner ones too."""
    paths = []
    for key, value in tree.items():
        paths += [f"{prefix}{key}", *(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return paths


@pytest.mark.parametrize("path", leaves(RECIPE))
def test_no_recipe_key_is_needed(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nrat_scale.report.curves.draw_curves", lambda run: b"")
    page = Page(write_report([make_run(tmp_path / "run", recipe=changed(RECIPE, path, None))]))
    assert "None" not in page.text and "nan" not in page.text.lower()


def test_no_value_of_the_other_files_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nrat_scale.report.curves.draw_curves", lambda run: b"")
    run = make_run(tmp_path / "run")
    for name in ("results.json", "label_noise.json", "checkpoints/best.json", "checkpoints/last.json"):
        whole = json.loads((run / name).read_text())
        for path in leaves(whole):
            if path not in ("format", "version", "versions.torch"):
                (run / name).write_text(json.dumps(changed(whole, path, None)))
                page = Page(write_report([run]))
                assert "None" not in page.text and "nan" not in page.text, f"{name}: {path}"
        (run / name).write_text(json.dumps(whole))


def test_null_metrics_are_not_drawn(tmp_path: Path) -> None:
    row = {"kind": "validation", "epoch": 1, "step": 1, "attack": "pgd10", "natural": None, "robust": None}
    rows = [{**row, "natural_clean": None}, {**row, "epoch": 2, "robust": {"accuracy": float("nan"), "n": 1}}]
    run = make_run(tmp_path / "run", metrics="".join(json.dumps(r) + "\n" for r in rows), best=None)
    page = Page(write_report([run]))
    assert "nan" not in page.text.lower() and "not measured" in page.text


def test_incomplete_last_line_is_passed_over(tmp_path: Path) -> None:
    *whole, last = metrics_lines()
    run = make_run(tmp_path / "run", metrics="".join(whole) + last[:40])
    assert len(read_run(run, "run").validation) == len(CURVE) - 1
    whole_without_newline = make_run(tmp_path / "other", metrics="".join(metrics_lines()).rstrip("\n"))
    assert len(read_run(whole_without_newline, "run").validation) == len(CURVE)


@pytest.mark.parametrize("damage", ["{", "3", "\x00\x00", "[" * 100_000])
def test_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    lines = metrics_lines()
    run = make_run(tmp_path / "run", metrics="".join([*lines[:3], damage + "\n", *lines[3:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 4 .* Remove that line"):
        write_report([run])
    assert not (run / "report.html").exists() and not (run / "curves.png").exists()


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("results", "{", r"results\.json is damaged.*evaluate again"),
        ("results", '{"format": "other"}', r"results\.json is no nrat_scale\.results of version 1\. Delete it"),
        ("best", "[1]", r"best\.json is damaged.*Delete it"),
        ("label_noise", "?", r"label_noise\.json is damaged.*Delete it"),
        ("recipe", "a: [", r"recipe\.yaml cannot be read .*Restore it"),
        ("recipe", "- 1", r"recipe\.yaml is damaged.*Restore it"),
        ("recipe", "a: ${b", r"recipe\.yaml cannot be read .*Restore it"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, key: str, content: str, message: str) -> None:
    run = make_run(tmp_path / "run", **{key: content})
    with pytest.raises(UserError, match=message) as raised:
        write_report([run])
    assert str(run) in str(raised.value) and "\n" not in str(raised.value)
    assert not (run / "report.html").exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no run directory .*nothing"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"is not a run: it has neither recipe\.yaml nor metrics\.jsonl"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="No run was given"):
        write_report([])
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"must be an \.html file"):
        write_report([run], tmp_path)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "folder.html")
    assert not (tmp_path / "curves.png").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([one, two, one])] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([one])] == ["run"]


# ---- tables in text -------------------------------------------------------------------------------------------------


def test_markdown_table() -> None:
    assert markdown_table(results()).splitlines()[:3] == [
        "| checkpoint | natural | PGD-20 | CW-20 | AutoAttack |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| best (epoch 3) | 97.4 % [95.6, 98.5], n = 500 | 62.0 % [57.7, 66.1], n = 500 | 61.0 % [56.7, 65.2], n = 500 "
        "| 59.0 % [52.1, 65.6], n = 200 |",
    ]
    stamped = markdown_table(changed(results(), "threat.space", "released_code"))
    assert stamped.endswith("not comparable with RobustBench.**\n")
    assert markdown_table({}).count("\n") == 2


def test_summary_table() -> None:
    assert [row.checkpoint for row in summary_table(results())] == ["best", "last"]
    assert summary_table(results())[0].score("aa")["n"] == 200
    assert summary_table(results())[0].score("fgsm") == {}
    release = {"checkpoints": {"release": {"attacks": {}}}}
    assert [row.checkpoint for row in summary_table(release)] == ["release"]
    assert summary_table({}) == []


def test_text_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "nrat"), make_run(tmp_path / "plain", results=None)]
    main([*map(str, runs), "--out", str(tmp_path / "r.html")])
    assert capsys.readouterr().out.splitlines() == [
        "run   checkpoint  natural (n=500)    PGD-20 (n=500)     CW-20 (n=500)      AA (n=200)",
        "nrat  best        97.4 [95.6, 98.5]  62.0 [57.7, 66.1]  61.0 [56.7, 65.2]  59.0 [52.1, 65.6]",
        "nrat  last        98.4 [96.9, 99.2]  55.0 [50.6, 59.3]  61.0 [56.7, 65.2]  59.0 [52.1, 65.6]",
        f"plain: not evaluated yet: python -m nrat_scale.evaluate {runs[1]} --data SHARDS --attacks natural,pgd20,cw20,aa",
        str(tmp_path / "r.html"),
    ]
    shutil.rmtree(runs[1])
    other = changed(results(), "checkpoints.best.attacks.aa", score(50, 100, 0.4, 0.6))
    main([str(runs[0]), str(make_run(tmp_path / "plain", results=other))])
    assert "50.0 [40.0, 60.0] n=100" in capsys.readouterr().out


def test_exit_status_of_a_bad_run(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "nrat_scale.report", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
