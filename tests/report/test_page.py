"""The HTML page: its numbers, its warnings, and that no file of a run can change its structure."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nrat_scale.attacks import RELEASED_CODE_WARNING
from nrat_scale.core.errors import UserError
from nrat_scale.report.__main__ import main
from nrat_scale.report.curves import draw_curves
from nrat_scale.report.page import render_page, write_report
from nrat_scale.report.run import read_run, read_runs
from tests.support.evaluated_runs import RECIPE, changed, make_run, metrics_lines, results, score

GOLDEN = Path(__file__).parents[1] / "golden" / "abbf399"


class Page(HTMLParser):
    """All text of a page, its tags with their attributes, its tables as rows of cells."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.text, self.tags, self.tables = "", [], []
        self.open: list[str] = []
        self.feed(source)
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
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data + " "

    def rows(self, table: int) -> list[list[str]]:
        """The cells of a table, each with single spaces."""
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]


def page_of(*runs: Path) -> Page:
    """The page of these runs without its figures, which take most of the time."""
    return Page(render_page([read_run(run, run.name) for run in runs], [b""] * len(runs)))


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_page_of_one_run(tmp_path: Path) -> None:
    """The results table, the facts of training and the notes on method hold the numbers of the files."""
    run = make_run(tmp_path / "nrat")
    out = write_report(read_runs([run]))
    page = Page(out.read_text(encoding="utf-8"))
    assert out == run / "report.html"
    header, best, last = page.rows(0)
    assert header == ["Checkpoint", "natural", "PGD-20", "CW-20", "AutoAttack"]
    assert best[0] == "best epoch 3, EMA weights" and last[0] == "last epoch 5, EMA weights"
    assert best[1] == "97.4 [95.6, 98.5] n = 500"
    assert best[2] == "62.0 [57.7, 66.1] n = 500"
    assert best[4] == "59.0 [52.1, 65.6] n = 200"
    assert last[2] == "55.0 [50.6, 59.3] n = 500"
    for text in (
        "l_inf, eps = 8/255, trained with 10 steps of 2/255",
        "λ = 6",
        "cnn4",
        "5 epochs",
        "EMA 0.99",
        "30 % real (digits/train)",
        "70 % generated",
    ):
        assert text in page.text
    assert "AWP" not in page.text and "label smoothing" not in page.text, "what is off is omitted"
    assert "highest PGD-10 accuracy on 200 held-out real images" in page.text
    assert "digits (folder test, 500 images, fingerprint 0123456789abcdef)" in page.text
    assert "fewer than 1000 images" in page.text and "Wilson" in page.text
    assert 'role="note"' not in page.source


def test_the_norm_is_the_recipes(tmp_path: Path) -> None:
    """A run trained and evaluated in l_2 is described as such."""
    recipe, evaluated = (changed(changed(tree, "threat.norm", "l2"), "threat.eps", 0.5) for tree in (RECIPE, results()))
    page = page_of(make_run(tmp_path / "run", recipe=recipe, results=evaluated))
    assert page.text.count("l_2, eps = 0.5") == 2 and "inf" not in page.text


def test_gaps_and_noise(tmp_path: Path) -> None:
    """Best minus last in test and validation, and the transition matrix with class names."""
    page = page_of(make_run(tmp_path / "run"))
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


def test_noise_of_both_sources_and_its_effective_rate(tmp_path: Path) -> None:
    """40 % of 39 of 128 real images and 25 % of 89 of 128 generated ones: 29.6 % of a batch's labels."""
    page = page_of(make_run(tmp_path / "real"))
    assert "The effective rate is 12.2 % of the labels of a batch." in page.text
    assert "symmetric, rate 0.4, 12.2 % of a batch's labels" in page.text and "generated labels" not in page.text
    recipe = changed(
        RECIPE, "data.generated", {**RECIPE["data"]["generated"], "noise": {"kind": "symmetric", "rate": 0.25}}
    )
    noise = {"kind": "symmetric", "rate": 0.25, "seed": 1, "num_labels": 8, "num_noisy": 2, "realised_rate": 0.25}
    noise["transition_matrix"] = [[6, 2], [0, 0]]
    page = page_of(make_run(tmp_path / "both", recipe=recipe, label_noise_generated=noise))
    assert "Label noise of the generated images" in page.text and "2 of 8 generated labels are wrong" in page.text
    assert "The effective rate is 17.4 % of the labels of a batch." in page.text
    assert "generated labels: symmetric, rate 0.25, 29.6 % of a batch's labels" in page.text
    assert page.rows(3)[1] == ["0", "6", "2"]


@pytest.mark.parametrize(("source", "wrong"), [("real", True), ("generated", False)])
def test_selection_by_wrong_labels_is_said_of_its_source(tmp_path: Path, source: str, wrong: bool) -> None:
    """Wrong real labels do not make the generated images of a validation wrong."""
    page = page_of(make_run(tmp_path / "run", recipe=changed(RECIPE, "data.validation.source", source)))
    assert ("including the wrong ones" in page.text) == wrong


def test_a_large_transition_matrix_is_not_a_table(tmp_path: Path) -> None:
    """With 100 classes the page names the file instead."""
    noise = {"kind": "symmetric", "rate": 0.4, "realised_rate": 0.4, "transition_matrix": [[1] * 100] * 100}
    page = page_of(make_run(tmp_path / "run", label_noise=noise))
    assert len(page.tables) == 2 and "transition matrix of the 100 classes is in label_noise.json" in page.text


def test_gap_needs_the_same_images(tmp_path: Path) -> None:
    """Accuracies on different numbers of images are not subtracted."""
    other = changed(results(), "checkpoints.last.attacks.aa", score(50, 100, 0.4, 0.6))
    labels = [row[0] for row in page_of(make_run(tmp_path / "run", results=other)).rows(1)]
    assert "test, AutoAttack" not in labels and "test, CW-20" in labels


def test_runs_are_columns(tmp_path: Path) -> None:
    """Several runs are compared first; then each run has its own part. The page and curves.png go where `out` says."""
    plain = changed(results(), "checkpoints.best.attacks.natural", score(495, 500, 0.977, 0.996))
    recipe = changed(RECIPE, "objective.name", "trades")
    runs = [make_run(tmp_path / "nrat"), make_run(tmp_path / "plain", results=plain, recipe=recipe)]
    out = write_report(read_runs(runs), tmp_path / "new" / "both.html", title="NRAT and plain")
    page = Page(out.read_text(encoding="utf-8"))
    assert page.rows(0) == [
        ["setting", "nrat", "plain"],
        ["Objective", "nrat, λ = 6, inner loss kl", "trades, λ = 6, inner loss kl"],
    ]
    assert page.rows(1)[0] == ["checkpoint", "attack", "nrat", "plain"]
    assert page.rows(1)[1] == ["best", "natural n = 500", "97.4 [95.6, 98.5]", "99.0 [97.7, 99.6]"]
    assert page.rows(1)[4] == ["AutoAttack n = 200", "59.0 [52.1, 65.6]", "59.0 [52.1, 65.6]"]
    assert page.rows(1)[5][0] == "last"
    assert "<h1>NRAT and plain</h1>" in page.source
    assert (tmp_path / "new" / "curves.png").is_file()
    assert not (runs[0] / "report.html").exists()
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2 + 2, "two joint figures, one of each run"
    assert "nrat, plain: tested on" in page.text, "a setting of both runs is printed once"
    assert page.text.count("l_inf, eps = 8/255, trained with 10 steps") == 1, "so is a setting of the trainings"


def test_equal_labels_are_shown_once(tmp_path: Path) -> None:
    """A second run with the same noisy labels refers to the first; one with other labels has a matrix of its own."""
    first, same = make_run(tmp_path / "first"), make_run(tmp_path / "same")
    page = page_of(first, same)
    assert page.text.count("(row) by their given label") == 1 and "The labels are those of first, above." in page.text
    noise = {"kind": "symmetric", "rate": 0.4, "realised_rate": 0.4, "transition_matrix": [[5, 1], [1, 5]]}
    page = page_of(first, make_run(tmp_path / "other", label_noise=noise))
    assert page.text.count("(row) by their given label") == 2 and "The labels are those of" not in page.text


def test_joint_curves_say_which_labels_they_count(tmp_path: Path) -> None:
    """60 % with given labels stands beside a test accuracy of 97 %."""
    runs = [make_run(tmp_path / name) for name in ("first", "second")]
    assert page_of(*runs).text.count("by epoch, with the labels that selection uses. A star") == 2
    clean = [
        {key: value for key, value in row.items() if "clean" not in key} for row in map(json.loads, metrics_lines())
    ]
    for run in runs:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean))
    assert page_of(*runs).text.count("by epoch. A star") == 2


def test_tables_that_a_telephone_cuts_have_a_hint(tmp_path: Path) -> None:
    """Four columns with intervals do; four of short numbers do not."""
    page = page_of(make_run(tmp_path / "one"), make_run(tmp_path / "two"))
    captions = re.findall(r"<caption>(.*?)</caption>", page.source)
    hinted = {caption.split(".")[0].split(",")[0]: "Scrolls sideways." in caption for caption in captions}
    assert (
        hinted["Test accuracy in %"]
        and not hinted["Best minus last checkpoint; a positive gap is accuracy lost to overfitting"]
    )


def test_plain_training_makes_no_attack(tmp_path: Path) -> None:
    """Without an adversarial objective the attack settings of the recipe are omitted."""
    page = page_of(make_run(tmp_path / "run", recipe=changed(RECIPE, "objective.name", "natural")))
    assert "inner loss" not in page.text and "trained with" not in page.text


@pytest.mark.parametrize(("name", "stamped"), [("nrat", True), ("trades", False)])
def test_a_warm_start_is_stamped(tmp_path: Path, name: str, stamped: bool) -> None:
    """It belongs to the description of the objective, unless it has no effect."""
    recipe = changed(changed(RECIPE, "objective.name", name), "objective.warm_start", 0.3)
    page = page_of(make_run(tmp_path / "run", recipe=recipe))
    assert ("warm start over 30 % of training" in page.text) == stamped
    assert "warm start" not in page_of(make_run(tmp_path / "usual")).text


def test_best_is_last(tmp_path: Path) -> None:
    """A best checkpoint that is also the last one has one row."""
    same = changed(results(), "checkpoints.last", results()["checkpoints"]["best"])
    page = page_of(make_run(tmp_path / "run", results=same, last={"step": 60, "epoch": 3, "folder": "step-60"}))
    assert len(page.rows(0)) == 2
    assert page.rows(0)[1][0].startswith("best = last")
    assert "The best checkpoint is the last one" in page.text


def test_not_evaluated_yet(tmp_path: Path) -> None:
    """A run without results shows the command that evaluates it, alone or beside an evaluated run."""
    run = make_run(tmp_path / "a run", results=None)
    page = page_of(run)
    command = f"python -m nrat_scale.evaluate '{run}' --data SHARDS --attacks natural,pgd20,cw20,aa"
    assert f"a run: not evaluated yet: {command}" in page.text
    assert "Checkpoint" not in page.text, "there is no empty table"
    page = page_of(run, make_run(tmp_path / "other"))
    assert page.rows(0)[0] == ["checkpoint", "attack", "other"]
    assert page.text.count(f"a run: not evaluated yet: {command}") == 1


def test_partly_evaluated(tmp_path: Path) -> None:
    """A missing attack is a dash; an attack outside the standard four gets a column."""
    partial = results()
    del partial["checkpoints"]["last"], partial["checkpoints"]["best"]["attacks"]["aa"]
    partial["checkpoints"]["best"]["attacks"]["pgd50"] = score(300, 500, 0.55, 0.65)
    page = page_of(make_run(tmp_path / "run", results=partial))
    assert page.rows(0)[0][-2:] == ["AutoAttack", "PGD-50"]
    assert page.rows(0)[1][-2:] == ["-", "60.0 [55.0, 65.0] n = 500"]


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    """A run that an older version trained and evaluated has a report."""
    run = shutil.copytree(GOLDEN / "run", tmp_path / "run")
    page = Page(write_report(read_runs([run])).read_text(encoding="utf-8"))
    assert page.rows(0)[0][-2:] == ["PGD-5", "worst case"]
    assert page.rows(0)[1][1] == "11.0 [6.3, 18.6] n = 100"
    assert "l_inf, eps = 0.1" in page.text and "515 of 1297 real labels are wrong" in page.text


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_unlike_evaluations_are_flagged(tmp_path: Path) -> None:
    """Runs evaluated with different radii carry a warning that names both settings."""
    other = changed(results(), "threat.eps", 4 / 255)
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", results=other))
    assert "different settings; do not compare their numbers" in page.text and "eps = 4/255" in page.text


def test_results_of_an_older_best_are_flagged(tmp_path: Path) -> None:
    """Training went on after the evaluation: the results are no longer those of the best checkpoint."""
    page = page_of(make_run(tmp_path / "run", best={"step": 80, "epoch": 4, "folder": "step-80"}))
    assert "The results are of step 60, but the best checkpoint is now step 80" in page.text


@pytest.mark.parametrize("file", ["recipe", "results"])
def test_released_code_is_stamped_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    """The warning about the threat space is printed once per run, even if the evaluation flagged it too."""
    trees: dict[str, Any] = {"recipe": RECIPE, "results": results()}
    trees["results"]["checkpoints"]["best"]["flags"] = [RELEASED_CODE_WARNING, "PGD found nothing."]
    trees[file] = changed(trees[file], "threat.space", "released_code")
    run = make_run(tmp_path / "run", **trees)
    main([str(run)])
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert ("p", {"class": "banner", "role": "note"}) in page.tags
    for text in (page.text, capsys.readouterr().out):
        assert text.count(RELEASED_CODE_WARNING) == 1 and "run, best: PGD found nothing." in text


# ---- one safe file --------------------------------------------------------------------------------------------------


def test_escaping(tmp_path: Path) -> None:
    """Text from the files of a run cannot add a tag; it stays readable."""
    hostile = '<script>alert("x")</script>'
    recipe = changed(changed(RECIPE, "objective.name", hostile), "model.name", hostile)
    recipe = changed(changed(recipe, "data.real.shards", hostile), "data.validation.source", hostile)
    evaluated = changed(changed(results(), "data.dataset", hostile), "versions", {hostile: hostile})
    evaluated = changed(changed(evaluated, "checkpoints.best.weights", hostile), "threat.space", hostile)
    evaluated = changed(evaluated, "checkpoints.best.flags", [hostile])
    evaluated = changed(evaluated, "checkpoints.best.attacks.natural.n", hostile)
    evaluated["checkpoints"]["best"]["attacks"][hostile] = score(1, 2, 0.1, 0.9)
    evaluated["checkpoints"][hostile] = evaluated["checkpoints"]["last"]
    run = make_run(
        tmp_path / "<script>&$x$\udcff\u4e2d",
        recipe=changed(changed(recipe, "threat.space", hostile), "threat.norm", hostile),
        results=evaluated,
        label_noise={"kind": hostile, "rate": hostile, "realised_rate": 0.5, "transition_matrix": [[1, 1], [0, 1]]},
        model={"class_names": [hostile, hostile]},
        metrics="".join(metrics_lines()).replace("pgd10", "<script>$\\\\frac$"),
    )
    page = Page(write_report(read_runs([run]), title=f"{hostile}\x1b[2J").read_text(encoding="utf-8"))
    assert not re.search("<script", page.source, re.IGNORECASE)
    assert hostile in page.text and "<script>&$x$?" in page.text
    assert "\x1b" not in page.source, "control characters are replaced"


def test_page_is_one_accessible_file(tmp_path: Path) -> None:
    """No script, no outside resource; a language, captions, scopes and alternative texts; equal runs give equal pages."""
    run = make_run(tmp_path / "run")
    page = Page(write_report(read_runs([run])).read_text(encoding="utf-8"))
    assert not page.open, "every tag is closed"
    assert "http://" not in page.source and "https://" not in page.source
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
        assert not {"onload", "onerror", "onclick", "href"} & set(attributes)
        assert tag != "th" or attributes.get("scope") in ("col", "row", "rowgroup")
        assert tag != "img" or "Best: epoch 3, natural 90.0 %, PGD-10 62.0 %" in (attributes["alt"] or "")
    assert ("html", {"lang": "en"}) in page.tags
    assert len([tag for tag, _ in page.tags if tag == "caption"]) == len(page.tables) == 3
    assert write_report(read_runs([run])).read_text(encoding="utf-8") == page.source


def test_curves_png(tmp_path: Path) -> None:
    """curves.png is a figure of high resolution; one epoch is enough to draw it."""
    run = make_run(tmp_path / "run")
    write_report(read_runs([run]))
    with Image.open(run / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and image.width >= 1200
    assert (run / "curves.png").read_bytes() == draw_curves(read_run(run, "run"))
    assert draw_curves(read_run(make_run(tmp_path / "other", metrics=metrics_lines()[1]), "other"))


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """A report that cannot be written ends in a sentence and leaves no file."""
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"must be an \.html file"):
        write_report(read_runs([run]), tmp_path)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(read_runs([run]), tmp_path / "folder.html")
    assert not (tmp_path / "curves.png").exists()
    assert not list(tmp_path.rglob("*.tmp"))
