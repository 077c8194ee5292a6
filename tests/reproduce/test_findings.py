"""Claims are decided by the stated rule, and the page says what the paper prints, what was measured and over what."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.reproduce.__main__ import main
from nrat_scale.reproduce.claims import claims
from nrat_scale.reproduce.contrasts import Estimate
from nrat_scale.reproduce.decision import FAILS, HOLDS, RULE, UNDECIDED, Claim, Effect, Term, decide
from nrat_scale.reproduce.findings import findings_page, verdict_lines, write_findings
from nrat_scale.reproduce.grid_files import read_grid
from nrat_scale.reproduce.measured import Measured, Setting, read_cells
from tests.support.synthetic_cells import MEASURES, cell, record, write_cell

NRAT, TRADES = Setting("nrat", "symmetric", 0.4), Setting("trades", "symmetric", 0.4)
MINUS = (Term(1, NRAT, "best", "aa"), Term(-1, TRADES, "best", "aa"))
CLAIM = Claim("NRAT is better", "It is.", (Effect("NRAT − TRADES", MINUS),))
DENIED = Claim("APL does not help", "It does not.", (Effect("NRAT − TRADES", MINUS, no_gain=True),))


def measured(low: float, high: float, seeds: int = 3) -> Estimate:
    """An interval."""
    return Estimate((low + high) / 2, low, high, 1000, tuple(range(seeds)), 1.0)


def cells_of(
    folder: Path, nrat: float, trades: float, seeds: int = 3, spread: float = 0.001, **changes: Any
) -> list[Measured]:
    """Cells of two methods with these accuracies on 1,000 images, which differ from seed to seed by `spread`."""
    for method, accuracy in (("nrat", nrat), ("trades", trades)):
        for seed in range(seeds):
            shift = seed * spread if method == "nrat" or spread < 0.01 else 0
            right = np.arange(1000) < round(1000 * (accuracy + shift))
            results = {name: {measure: record(right) for measure in MEASURES} for name in ("best", "last")}
            write_cell(folder, cell(method, seed=seed, **{"results": results, **changes}))
    return read_cells(folder)


@pytest.mark.parametrize(
    ("nrat", "trades", "seeds", "spread", "verdict", "denied"),
    [
        (0.60, 0.50, 3, 0.001, HOLDS, FAILS),
        (0.50, 0.60, 3, 0.001, FAILS, HOLDS),
        (0.55, 0.55, 3, 0.001, FAILS, HOLDS),  # a tie
        (0.55, 0.55, 3, 0.05, UNDECIDED, UNDECIDED),  # 0, 5 and 10 points
        (0.60, 0.50, 2, 0.001, UNDECIDED, UNDECIDED),  # too few seeds, however clear
        (0.60, 0.50, 1, 0.001, UNDECIDED, UNDECIDED),
    ],
)
def test_verdicts(
    tmp_path: Path, nrat: float, trades: float, seeds: int, spread: float, verdict: str, denied: str
) -> None:
    """A claim holds, does not hold, or is not decided; a claim that nothing is gained is decided the other way round."""
    cells = cells_of(tmp_path, nrat, trades, seeds, spread)
    assert decide(CLAIM, cells, "fashion").verdict == verdict
    assert decide(DENIED, cells, "fashion").verdict == denied
    assert decide(CLAIM, cells, "mnist").verdict == UNDECIDED
    assert decide(CLAIM, cells, "mnist").effects[0][1] == "not run"


@pytest.mark.parametrize(
    ("low", "high", "verdict", "denied"),
    [
        (0.1, 5.0, HOLDS, FAILS),
        (0.1, 0.5, HOLDS, FAILS),
        (0.0, 2.0, UNDECIDED, UNDECIDED),
        (-0.9, 0.9, FAILS, HOLDS),
        (-1.1, 0.9, UNDECIDED, HOLDS),
        (-0.9, 1.1, UNDECIDED, UNDECIDED),
        (-3.0, -0.1, FAILS, HOLDS),
    ],
)
def test_the_rule(low: float, high: float, verdict: str, denied: str) -> None:
    """Interval against zero, and a tie within one point, as the page states."""
    assert CLAIM.effects[0].verdict(measured(low, high)) == verdict
    assert DENIED.effects[0].verdict(measured(low, high)) == denied
    assert "within ±1 point (a tie)" in RULE and "fewer than 3 seeds" in RULE


def test_a_claim_of_several_effects(tmp_path: Path) -> None:
    """It holds if all effects that it rests on do; one that does not hold refutes it; others are only shown."""
    better = CLAIM.effects[0]
    worse = Effect("TRADES − NRAT", tuple(Term(-t.coefficient, t.setting, t.checkpoint, t.measure) for t in MINUS))
    absent = Effect("MART", (Term(1, Setting("mart", "symmetric", 0.4), "best", "aa"),))
    shown = Effect("TRADES − NRAT", worse.terms, decides=False)
    cells = cells_of(tmp_path, 0.6, 0.5)
    verdicts = [
        decide(Claim("", "", effects), cells, "fashion").verdict
        for effects in ((better, better), (better, worse), (better, absent), (worse, absent), (better, shown), (shown,))
    ]
    assert verdicts == [HOLDS, FAILS, UNDECIDED, FAILS, HOLDS, UNDECIDED]


def test_paper_numbers_of_effects() -> None:
    """An effect's printed value is the same contrast of the paper's accuracies; the claims quote them."""
    assert CLAIM.effects[0].printed == pytest.approx(49.00 - 45.68)
    by_name = {claim.name: claim for claim in claims()}
    gap = by_name["Double overfitting"].effects[2]
    assert gap.text == "TRADES, best − last, natural, symmetric 0.4" and gap.printed == pytest.approx(75.80 - 60.23)
    below = next(effect for effect in by_name["AWP narrows best minus last"].effects if effect.constant)
    assert below.printed == pytest.approx(5 - (61.77 - 57.96))
    inner = by_name["The proposed loss as inner loss is better"]
    assert "52.92 against 49.00" in inner.says
    assert all(len(claim.effects) and any(effect.decides for effect in claim.effects) for claim in claims())


def test_every_claim_of_the_issue_is_there() -> None:
    """By its words."""
    text = " ".join(f"{claim.name} {claim.says} {claim.remark}" for claim in claims())
    for words in (
        *(
            "hurts",
            "Double overfitting",
            "APL helps under symmetric noise",
            "symKL is more robust than KL",
            "Proposition 1",
        ),
        *("PGD-AT-APL collapses", "AWP narrows", "inner loss", "PGD-20 to AutoAttack", "most robust under noise"),
        *("most robust without noise", "released code's threat space"),
    ):
        assert words in text


def test_the_commands_run_what_the_claims_need() -> None:
    """Each accuracy of each claim is that of a cell of the grid that its command names."""
    grids = {name: read_grid(name).cells("fashion") for name in {claim.grid for claim in claims()}}
    for claim in claims():
        cells = grids[claim.grid]
        known = {Setting(cell.method, cell.noise.kind, cell.noise.rate) for cell in cells}
        assert {term.setting for effect in claim.effects for term in effect.terms} <= known


def test_page(tmp_path: Path) -> None:
    """Verdict, the paper's numbers, effect with interval, n and seeds, the command, and links to the files."""
    cells = cells_of(tmp_path / "docs/reproduction", 0.6, 0.5)
    out = tmp_path / "docs/findings.md"
    found = write_findings(cells, out)
    page = out.read_text(encoding="utf-8")
    assert RULE in page and "from 6 finished cells" in page
    rows = [line for line in page.splitlines() if line.startswith("| NRAT − TRADES, AutoAttack, best, symmetric 0.4 |")]
    assert len(rows) == 1
    assert re.search(r"\| \+3\.3 \| \+10\.0 \[\+8\.\d, \+11\.\d\] \| n = 1000, 3 seeds \| yes \| holds \|", rows[0])
    effects = [line for line in page.splitlines() if " | yes | " in line or " | no | " in line]
    assert effects and all(re.search(r"\[.+, .+\] \| n = 1000, 3 seeds", line) for line in effects)
    assert "Not run: " in page and UNDECIDED in page
    assert "python -m nrat_scale.reproduce noise-benchmark --only mart,mart_apl,nrat" in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) == 6 and all((out.parent / link).is_file() for link in links)
    assert len(verdict_lines(found)) == len(claims())
    assert "effects with at least 3 seeds are on this page; the intervals of " in page
    assert write_findings(cells, out) == found and out.read_text(encoding="utf-8") == page


def test_cells_of_another_space_decide_nothing_but_their_own_claim(tmp_path: Path) -> None:
    """The released code's space is compared with pixels on the same images, and with nothing else."""
    released = {**cell()["evaluation"], "threat": "l_inf, eps = 0.1 in released_code space"}
    cells_of(tmp_path / "a", 0.5, 0.4)
    cells_of(tmp_path / "b", 0.7, 0.6, space="released_code", evaluation=released)
    cells = read_cells(tmp_path / "a", tmp_path / "b")
    assert decide(CLAIM, read_cells(tmp_path / "b"), "fashion").effects[0][1] == "not run"
    (claim,) = [one for one in claims() if "threat space" in one.name]
    values = {effect.text[:4]: value for effect, value, _ in decide(claim, cells, "fashion").effects}
    found = values["NRAT"]
    assert isinstance(found, Estimate) and found.points == pytest.approx(20) and found.low > 0
    page = tmp_path / "findings.md"
    write_findings(cells, page)
    assert "--space released_code" in page.read_text() and "a different threat model" in page.read_text()


def test_parts_of_autoattack_stand_for_it_by_their_name(tmp_path: Path) -> None:
    """An edition without full AutoAttack decides the claims by its parts, and says so."""
    for method, correct in (("nrat", 600), ("trades", 500)):
        for seed in range(3):
            results = {"best": {"aa:apgd-ce+apgd-t": record(np.arange(1000) < correct + seed)}}
            write_cell(tmp_path, cell(method, seed=seed, results=results))
    cells = read_cells(tmp_path)
    (claim,) = [one for one in claims() if one.name == "NRAT is the most robust under noise"]
    texts = {effect.text: verdict for effect, _, verdict in decide(claim, cells, "fashion").effects}
    assert texts["NRAT − TRADES, aa:apgd-ce+apgd-t, best, symmetric 0.4"] == HOLDS
    write_findings(cells, tmp_path / "findings.md")
    page = (tmp_path / "findings.md").read_text()
    assert "| NRAT − TRADES, aa:apgd-ce+apgd-t, best, symmetric 0.4 | +3.3 |" in page
    assert "aa:apgd-ce+apgd-t runs parts of AutoAttack and stands for it" in page


def test_each_effect_has_the_attack_that_its_cells_share(tmp_path: Path) -> None:
    """One cell with all of AutoAttack does not take the parts of it, which all have, from the other effects."""
    parts, whole = "aa:apgd-ce+apgd-t", np.arange(1000) < 400
    for method, correct in (("nrat", 600), ("trades", 500), ("pgd_at", 550)):
        for seed in range(3):
            results = {"best": {parts: record(np.arange(1000) < correct + seed)}}
            if method != "pgd_at" or not seed:
                results["best"]["aa"] = record(whole)
            write_cell(tmp_path, cell(method, seed=seed, results=results))
    (claim,) = [one for one in claims() if one.name == "NRAT is the most robust under noise"]
    found = {effect.text: value for effect, value, _ in decide(claim, read_cells(tmp_path), "fashion").effects}
    for name, points in (("NRAT − TRADES, AutoAttack", 0.0), (f"NRAT − PGD-AT, {parts}", 5.0)):
        value = found[f"{name}, best, symmetric 0.4"]
        assert isinstance(value, Estimate) and value.points == pytest.approx(points) and value.seeds == (0, 1, 2)


def test_parts_of_autoattack_do_not_decide_about_masked_gradients(tmp_path: Path) -> None:
    """The gap between PGD and AutoAttack is decided with Square only."""
    (claim,) = [one for one in claims() if one.whole_attack]
    for attack, verdict in (("aa:apgd-ce+apgd-t", UNDECIDED), ("aa", HOLDS)):
        folder = tmp_path / attack.replace(":", "-")
        for method, correct in (("nrat", 500), ("trades", 590)):
            for seed in range(3):
                right = {"pgd20": np.arange(1000) < 600, attack: np.arange(1000) < correct + seed}
                results = {"best": {name: record(outcomes) for name, outcomes in right.items()}}
                write_cell(folder, cell(method, "none", 0.0, seed, results=results))
        assert decide(claim, read_cells(folder), "fashion").verdict == verdict


def test_warnings_of_the_evaluation_are_counted(tmp_path: Path) -> None:
    """An effect says how many of its cells the evaluation warns of."""
    flags = {"best": ["The gradient is zero."], "last": []}
    for method, correct in (("nrat", 600), ("trades", 500)):
        for seed in range(3):
            results = {"best": {"aa": record(np.arange(1000) < correct + seed)}}
            changes = {"flags": flags} if method == "trades" and seed else {}
            write_cell(tmp_path, cell(method, seed=seed, results=results, **changes))
    write_findings(read_cells(tmp_path), tmp_path / "findings.md")
    (row,) = [
        line
        for line in (tmp_path / "findings.md").read_text().splitlines()
        if line.startswith("| NRAT − TRADES, AutoAttack")
    ]
    assert "| n = 1000, 3 seeds; 2 cells flagged |" in row


def test_failed_cells_are_listed(tmp_path: Path) -> None:
    """With the reason, which cannot change the page."""
    write_cell(tmp_path, cell(status="failed", error="<b> | disk", results={}))
    cells = read_cells(tmp_path)
    write_findings(cells, tmp_path / "findings.md")
    assert "* Failed: nrat/symmetric-0.4, seed 0: &lt;b> \\| disk" in (tmp_path / "findings.md").read_text()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_claims_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m nrat_scale.reproduce claims` writes the page and prints the verdicts."""
    cells_of(tmp_path / "cells", 0.6, 0.5)
    out = tmp_path / "docs/findings.md"
    main(["claims", "--cells", str(tmp_path / "cells"), "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"fashion: NRAT is the most robust under noise: {UNDECIDED} (1 of 26 effects decided)" in printed
    assert printed.endswith(f"{out}\n") and out.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "absent"], "There is no folder absent with results"),
        (["--out", "findings.html"], "must be a Markdown file"),
        (["--cells", "empty"], "no finished cells"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    """One sentence, and no page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        main(["claims", *words])
    assert not (tmp_path / "docs").exists()


def test_the_committed_page_is_current() -> None:
    """docs/findings.md is what the command writes from the committed cells."""
    root = Path(__file__).parents[2]
    page = root / "docs/findings.md"
    if not page.is_file():
        pytest.skip("no findings are committed yet")
    cells = read_cells(root / "docs/reproduction")
    found = [decide(claim, cells, edition) for claim in claims() for edition in sorted({one.edition for one in cells})]
    assert page.read_text(encoding="utf-8") == findings_page(found, cells, page.parent), (
        "run: python -m nrat_scale.reproduce claims"
    )
