"""Reading cells: where they lie, what is damaged, what cannot be averaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.statistics import wilson
from nrat_scale.reproduce.measured import Setting, by_setting, read_cell, read_cells, summarise
from tests.support.synthetic_cells import cell, outcomes_of, record, write_cell


def test_cells_of_a_run_and_committed_ones(tmp_path: Path) -> None:
    """Both layouts are found; a finished cell replaces a failed one, and the first folder wins."""
    committed, own = tmp_path / "docs", tmp_path / "out"
    write_cell(committed, cell(seed=0))
    write_cell(committed, cell(seed=1))
    place = own / "fashion/cells/nrat/symmetric-0.4/seed-1"
    place.mkdir(parents=True)
    (place / "cell.json").write_text(json.dumps(cell(seed=1, status="failed", error="no memory", results={})))
    assert [(one.seed, one.finished) for one in read_cells(own)] == [(1, False)]
    found = read_cells(own, committed)
    assert [(one.seed, one.finished) for one in found] == [(0, True), (1, True)]
    assert found[0].setting == Setting("nrat", "symmetric", 0.4) and found[0].setting.folder == "nrat/symmetric-0.4"
    np.testing.assert_array_equal(found[0].outcomes["best", "natural"], outcomes_of(0.6, 200, 0))


def test_one_cell_with_two_recipes(tmp_path: Path) -> None:
    """It is refused: one of them is of an older recipe."""
    write_cell(tmp_path / "a", cell())
    write_cell(tmp_path / "b", cell(recipe_hash="other"))
    with pytest.raises(UserError, match=r"different recipes .*'nrat-symmetric-0.4-0' and 'other'.* Remove one"):
        read_cells(tmp_path / "a", tmp_path / "b")


def test_no_folder(tmp_path: Path) -> None:
    """A missing folder is named."""
    with pytest.raises(UserError, match=r"There is no folder .*none with results"):
        read_cells(tmp_path / "none")


def test_damaged_files(tmp_path: Path) -> None:
    """Whatever does not fit is one sentence with the file's name."""
    right = record(outcomes_of(0.5))
    damaged = [
        (cell(version=2), "version '2'; expected 1"),
        (cell(seed=None), "seed"),
        (cell(rate="much"), "rate"),
        (cell(method=3), "method"),
        (cell(results={}), "no results"),
        (cell(results={"best": {"aa": {**right, "outcomes": "~"}}}), "'aa' cannot be read"),
        (cell(results={"best": {"aa": {**right, "outcomes": None}}}), "'aa'"),
        (cell(results={"best": {"aa": {**right, "n": 100}}}), "'aa' do not match"),
        (cell(results={"best": {"aa": {**right, "n": "many"}}}), "'aa' are of 'many' images"),
        (cell(results={"best": {"aa": {**right, "n": 10**12}}}), "'aa' are of '1000000000000' images"),
        (cell(evaluation={"attacks": [3]}), "evaluation.attacks has entries"),
        (cell(results={"best": {"aa": {**right, "correct": 1}}}), "'aa' do not match"),
        (cell(results={"best": {"aa": 3}}), "'aa'"),
        (cell(results={"best": []}), "results.best is"),
        (cell(rate=float("nan")), "rate"),
        (cell(flags=["doubt"]), "flags is"),
        (cell(versions="2"), "versions is '2'"),
        (cell(curve=3), "curve is '3'"),
        (cell(curve=[3]), "curve has rows"),
        (cell(memorisation={"epoch": 1}), "memorisation is"),
        (cell(evaluation={"attacks": "aa"}), "evaluation.attacks is 'aa'"),
    ]
    path = tmp_path / "cell.json"
    for content, words in damaged:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words) as error:
            read_cell(path)
        assert str(path) in str(error.value)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_cell(path)


def test_summary_by_hand(tmp_path: Path) -> None:
    """Mean and deviation over seeds; the Wilson interval is that of n images at the mean, not of seeds times n."""
    for seed, correct in enumerate((100, 110, 120)):
        right = np.arange(200) < correct
        write_cell(tmp_path, cell(seed=seed, results={"best": {"aa": record(right)}}))
    found = summarise(read_cells(tmp_path), "best", "aa", 49.0)
    assert found is not None
    assert (found.mean, found.deviation, found.n, found.seeds) == (pytest.approx(55), pytest.approx(5), 200, (0, 1, 2))
    assert (found.low, found.high) == pytest.approx([100 * bound for bound in wilson(110, 200)])
    assert (found.text, found.interval) == ("55.0 ± 5.0", "[48.1, 61.7]")
    one = summarise(read_cells(tmp_path)[:1], "best", "aa")
    assert one is not None and one.text == "50.0" and one.deviation is None
    assert summarise(read_cells(tmp_path), "last", "aa") is None and summarise([], "best", "aa") is None


@pytest.mark.parametrize("change", [{"data": "other"}, {"threat": "l_2"}])
def test_seeds_evaluated_differently(tmp_path: Path, change: dict[str, object]) -> None:
    """They are not averaged."""
    write_cell(tmp_path, cell(seed=0))
    write_cell(tmp_path, cell(seed=1, evaluation={**cell()["evaluation"], **change}))
    with pytest.raises(UserError, match=r"seed-0\.json and .*seed-1\.json .* evaluated differently"):
        summarise(read_cells(tmp_path), "best", "aa")


def test_spaces_and_curves_are_apart(tmp_path: Path) -> None:
    """Cells of the released code's threat space and those with curves on test images are other groups, and carry stamps."""
    for i, changes in enumerate(
        ({}, {"space": "released_code"}, {"curve": [{"epoch": 1, "natural": 0.5, "split": "test"}]})
    ):
        write_cell(tmp_path / str(i), cell(**changes))
    cells = read_cells(*(tmp_path / str(i) for i in range(3)))
    assert len(cells) == 3
    assert sorted(len(one.stamps) for one in cells) == [0, 1, 1]
    assert [len(found) for found in by_setting(cells, "fashion").values()] == [1]
    assert by_setting(cells, "fashion", "released_code") and by_setting(cells, "fashion", split="test")
    assert not by_setting(cells, "mnist")
