"""`docs/findings.md`: every claim of the paper, what was measured, and whether it holds; written from finished cells."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nrat_scale.core.errors import UserError
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.evaluate.attacks import attack_title
from nrat_scale.report.run import signed, value_at
from nrat_scale.reproduce.cells import STORED
from nrat_scale.reproduce.claims import claims
from nrat_scale.reproduce.decision import FEWEST_SEEDS, RULE, Claim, Effect, Finding, cells_of, decide
from nrat_scale.reproduce.measured import RELEASED, Measured, Setting, read_cells, strongest_attack
from nrat_scale.reproduce.page import protocol, relative_link
from nrat_scale.reproduce.paper import PAPER
from nrat_scale.reproduce.table import flags_of
from nrat_scale.reproduce.table_text import counted, markdown_lines, markdown_text, shown_path

COMMAND = "python -m nrat_scale.reproduce claims"


def main(argv: Sequence[str]) -> None:
    """The command line `python -m nrat_scale.reproduce claims`; see `--help`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Decide the paper's claims by finished cells; writes a page in Markdown."
    )
    folder = "folder of finished cells; may be repeated, the first one comes first (default: %(default)s)"
    parser.add_argument(
        "--cells",
        type=Path,
        action="append",
        metavar="DIR",
        help=folder.replace("%(default)s", str(shown_path(STORED))),
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/findings.md"), metavar="FILE.md", help="(default: %(default)s)"
    )
    given = parser.parse_args(argv)
    if given.out.suffix != ".md":
        raise UserError(f"The page {given.out} must be a Markdown file (.md). Choose another name with --out.")
    folders = given.cells or [STORED]
    cells = read_cells(*folders)
    if not any(cell.finished for cell in cells):
        raise UserError(
            f"There are no finished cells in {', '.join(map(str, folders))}. Run a grid first: python -m nrat_scale.reproduce."
        )
    found = write_findings(cells, given.out)
    print("\n".join(verdict_lines(found)))
    print(given.out)


def write_findings(cells: Sequence[Measured], out: Path) -> list[Finding]:
    """Write the page and return what it says.

    Args:
        cells: finished ones decide, failed ones are listed.
        out: the Markdown file; links to the cells' files are relative to it.

    Raises:
        UserError: the file cannot be written.
    """
    editions = sorted({cell.edition for cell in cells})
    found = [decide(claim, cells, edition) for claim in claims() for edition in editions]
    make_folder(out.parent)
    write_atomically(out, findings_page(found, cells, out.parent))
    return found


def findings_page(found: Sequence[Finding], cells: Sequence[Measured], folder: Path) -> str:
    """The page in Markdown."""
    editions = list(dict.fromkeys(finding.edition for finding in found))
    lines = ["# Which of the paper's claims hold?", ""]
    lines += [
        f"Written by `{COMMAND}` from {counted(sum(cell.finished for cell in cells), 'finished cell')}; do not edit it.",
        "",
    ]
    lines += [f"The paper: {PAPER}. Its numbers are of CIFAR-10 and one run each; ours are of the editions below.", ""]
    lines += ["## What are the verdicts?", "", *_verdicts(found, editions), ""]
    lines += ["## When does a claim hold?", "", RULE, "", _chance(found), ""]
    for claim in dict.fromkeys(finding.claim for finding in found):
        lines += _section(claim, [finding for finding in found if finding.claim == claim], cells)
    lines += ["## What was run?", ""]
    for edition in editions:
        lines += _runs(edition, [cell for cell in cells if cell.edition == edition], folder)
    return "\n".join(lines).rstrip() + "\n"


def verdict_lines(found: Sequence[Finding]) -> list[str]:
    """The verdicts for a terminal."""
    return [f"{finding.edition}: {finding.claim.name}: {finding.verdict} ({_share(finding)})" for finding in found]


def _share(finding: Finding) -> str:
    return f"{finding.decided} of {counted(len(finding.effects), 'effect')} decided"


def _verdicts(found: Sequence[Finding], editions: Sequence[str]) -> list[str]:
    rows = []
    for claim in dict.fromkeys(finding.claim for finding in found):
        verdicts = {
            finding.edition: f"{finding.verdict} ({_share(finding)})" for finding in found if finding.claim == claim
        }
        rows.append([claim.name, *(verdicts[edition] for edition in editions)])
    return markdown_lines(["claim", *editions], rows)


def _chance(found: Sequence[Finding]) -> str:
    """How many intervals leave out zero, and how many would by chance."""
    tested = {
        (finding.edition, effect.text): value.low > 0 or value.high < 0
        for finding in found
        for effect, value, _ in finding.effects
        if not isinstance(value, str) and len(value.seeds) >= FEWEST_SEEDS
    }
    return (
        f"{counted(len(tested), 'effect')} with at least {FEWEST_SEEDS} seeds {'is' if len(tested) == 1 else 'are'} on this page; the intervals "
        f"of {sum(tested.values())} leave out zero. If there were no effect at all, those of about {0.05 * len(tested):.0f} would by chance."
    )


def _flagged(effect: Effect, cells: Sequence[Measured], edition: str) -> str:
    """`; 3 cells flagged` if the evaluation warns of checkpoints that the effect uses; the table of the grid says why."""
    flagged = {cell.path for cell, checkpoint in cells_of(effect, cells, edition) if flags_of(cell, checkpoint)}
    return f"; {counted(len(flagged), 'cell')} flagged" if flagged else ""


def _section(claim: Claim, found: Sequence[Finding], cells: Sequence[Measured]) -> list[str]:
    lines = [f"## {claim.name}", "", f"The paper: {claim.says}", ""]
    lines += [claim.remark, ""] if claim.remark else []
    for finding in found:
        lines += [f"**{finding.edition}: {finding.verdict}.**", ""]
        rows, missing = [], []
        for effect, value, verdict in finding.effects:
            if isinstance(value, str):
                missing.append(effect.text if value == "not run" else f"{effect.text} ({value})")
                continue
            paper = "-" if effect.printed is None else signed(effect.printed)
            counts = f"n = {value.n}, {counted(len(value.seeds), 'seed')}{_flagged(effect, cells, finding.edition)}"
            rests = "yes" if effect.decides else "no"
            denied = " (no gain is the claim)" if effect.no_gain else ""
            rows.append([effect.text, paper, value.text, counts, rests, verdict + denied])
        if rows:
            head = ["effect, points", "paper", "measured", "over", "claim rests on it", "verdict"]
            lines += [*markdown_lines(head, rows), ""]
        if len(missing) == len(finding.effects) and all(value == "not run" for _, value, _ in finding.effects):
            lines += ["None of its effects was run.", ""]
        elif missing:
            lines += [f"Not run: {markdown_text('; '.join(missing))}.", ""]
    return [*lines, "```bash", *_commands(claim, found), "```", ""]


def _commands(claim: Claim, found: Sequence[Finding]) -> list[str]:
    released = any(term.space == RELEASED for effect in claim.effects for term in effect.terms)
    command = f"python -m nrat_scale.reproduce {claim.grid} --only {','.join(claim.methods)}"
    commands = [f"{command} --edition {finding.edition}" for finding in found]
    return commands + ([f"{one} --space {RELEASED}" for one in commands] if released else [])


def _runs(edition: str, cells: Sequence[Measured], folder: Path) -> list[str]:
    finished = [cell for cell in cells if cell.finished]
    facts = "; ".join(f"{name}: {text}" for name, text in protocol(finished).items())
    lines = [f"### {edition}", "", f"{markdown_text(facts)}.", ""]
    attack = strongest_attack(finished)
    if attack != "aa":
        part = f"{attack_title(attack)} runs parts of AutoAttack and stands for it in the claims about this edition"
        lines += [f"{markdown_text(part)}: its accuracies are upper bounds of AutoAttack's.", ""]
    rows: dict[tuple[str, Setting, str], list[Measured]] = {}
    for cell in finished:
        rows.setdefault((cell.space, cell.setting, cell.split), []).append(cell)
    head = ["method", "noise", "threat space", "attacks", "seeds and their results"]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (space, setting, split), seeds in rows.items():
        attacks = ", ".join(map(attack_title, value_at(seeds[0].facts, "evaluation.attacks", [])))
        words = map(
            markdown_text,
            (setting.method, setting.noise_text, space + (", test curves" if split == "test" else ""), attacks),
        )
        links = " ".join(f"[{cell.seed}]({relative_link(cell.path, folder)})" for cell in seeds)
        lines.append(f"| {' | '.join(words)} | {links} |")
    failed = [cell for cell in cells if not cell.finished]
    lines += ["", *(f"* Failed: {markdown_text(f'{c.setting.folder}, seed {c.seed}: {c.error}')}" for c in failed)]
    stamps = dict.fromkeys(stamp for cell in finished for stamp in cell.stamps)
    return [*lines, *(f"* {markdown_text(stamp)}" for stamp in stamps), ""]
