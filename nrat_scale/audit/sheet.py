"""A contact sheet of suspects to check by eye, and the share of them that a person finds wrong.

    python -m nrat_scale.audit.sheet AUDIT --out sheet.png           50 suspects, drawn at random, and sheet.csv beside it
    python -m nrat_scale.audit.sheet AUDIT --out worst.png --worst   the least credible ones instead
    python -m nrat_scale.audit.sheet --verdicts sheet.csv            after filling in its column `verdict`

A share is only that of all suspects if they were drawn at random. Verdicts: `wrong`, `right`, `unclear`.
"""

import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nrat_scale.audit.page import audited_shards, read_audit
from nrat_scale.core.errors import UserError, first_line, printable, quoted, run_cli
from nrat_scale.core.files import make_folder, write_atomically
from nrat_scale.core.seeds import derive, hash64
from nrat_scale.data.audit_scores import AuditScores, read_audit_scores
from nrat_scale.data.shards import ShardSet
from nrat_scale.evaluate.statistics import wilson

COUNT = 50
VERDICTS = ("wrong", "right", "unclear")
_HEAD = ("number", "id", "given", "suggested", "p_suggested", "quality", "drawn", "verdict")
_COLUMNS = 10  # images in a row
_SIDE, _GAP, _TEXT = 112, 14, 62  # pixels: the side of an image, between images, for number and labels


@dataclass(frozen=True)
class Sheet:
    """What `contact_sheet` has written."""

    picture: Path
    table: Path  # CSV with a column for verdicts
    count: int  # suspects on the sheet
    num_suspects: int  # of the audit

    def __str__(self) -> str:
        more = f"fill in its column verdict ({', '.join(VERDICTS)}), then --verdicts {self.table}"
        return f"{self.picture}: {self.count} of {self.num_suspects} suspects\n{self.table}: {more}"


def contact_sheet(
    audit: Path,
    out: Path,
    count: int = COUNT,
    *,
    worst: bool = False,
    seed: int = 0,
    shards: str | Path | None = None,
) -> Sheet:
    """Draw suspects of an audit as one PNG, numbered, with given and suggested label, and write the table of them.

    Args:
        audit: folder that `python -m nrat_scale.audit` wrote.
        out: the PNG; the CSV has the same name. An existing table is kept, since it may hold verdicts.
        count: number of suspects; all of them if there are fewer.
        worst: the least credible ones; by default a random sample, every one with the same probability.
        seed: of the sample; a larger `count` contains a smaller one.
        shards: the audited shards, if they have moved.

    Raises:
        UserError: there is no such audit, no suspect, or the table exists already.
    """
    table = out.with_suffix(".csv")
    if out.suffix.lower() != ".png":
        raise UserError(f"The contact sheet {out} must be a .png file. Choose another name with --out.")
    if count < 1:
        raise UserError(f"--count is {count}; it must be at least 1.")
    if table.exists():
        raise UserError(f"{table} exists already and may hold verdicts. Choose another --out, or remove it.")
    content = read_audit(audit)
    scores, data = read_audit_scores(audit, "AUDIT"), audited_shards(content, shards)
    scores.check_fits(data, scores.given)
    suspects = np.flatnonzero(scores.suspect)
    if not len(suspects):
        raise UserError(f"The audit {audit} has no suspect, so that there is nothing to check.")
    order = np.lexsort((scores.ids[suspects], scores.p_given[suspects], scores.quality[suspects]))
    if not worst:
        order = np.argsort(hash64(derive(seed, "contact sheet"), scores.ids[suspects]), kind="stable")
    chosen = suspects[order[:count]]
    names = [str(name) for name in data.class_names]
    picture = _draw(data, scores, chosen, names)
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(_HEAD)
    drawn = "worst" if worst else f"random, seed {seed}"
    for number, at in enumerate(chosen.tolist(), start=1):
        labels = names[scores.given[at]], names[scores.suggested[at]]
        values = f"{scores.p_suggested[at]:.4f}", f"{scores.quality[at]:.4f}"
        writer.writerow([number, int(scores.ids[at]), *labels, *values, drawn, ""])
    make_folder(out.parent)
    write_atomically(out, picture)
    write_atomically(table, rows.getvalue())
    return Sheet(out, table, len(chosen), len(suspects))


def _draw(shards: ShardSet, scores: AuditScores, chosen: np.ndarray, names: Sequence[str]) -> bytes:
    """PNG: a grid of images, enlarged by a whole number, under their numbers and above both labels."""
    height, width = shards.image_shape[:2]
    scale = max(1, _SIDE // max(height, width))
    cell = max(_SIDE, scale * width) + _GAP, scale * height + _TEXT
    columns = min(_COLUMNS, len(chosen))
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, -(-len(chosen) // columns) * cell[1] + _GAP), "white")
    draw, fonts = ImageDraw.Draw(sheet), Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    bold, plain = (ImageFont.truetype(str(fonts / f"{name}.ttf"), 13) for name in ("DejaVuSans-Bold", "DejaVuSans"))
    for number, (at, pixels) in enumerate(zip(chosen.tolist(), shards.images(chosen), strict=True)):
        row, column = divmod(number, columns)
        x, y = _GAP + column * cell[0], _GAP + row * cell[1]
        given, suggested = (
            _fitting(names[label], plain, cell[0] - _GAP) for label in (scores.given[at], scores.suggested[at])
        )
        draw.text((x, y), str(number + 1), "black", bold)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]).convert("RGB")
        sheet.paste(image.resize((scale * width, scale * height), Image.Resampling.NEAREST), (x, y + 18))
        draw.text((x, y + 20 + scale * height), given, "#b03a00", plain)
        draw.text((x, y + 37 + scale * height), suggested, "#00684a", plain)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _fitting(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A name without control characters, cut to `width` pixels."""
    text = printable(name)
    while font.getlength(text) > width:
        text = f"{text[:-2]}\u2026" if len(text) > 2 else text[:-1]
    return text


def verdicts(table: Path) -> str:
    """The share of checked suspects that are wrong, with its 95 % Wilson interval, from a table with verdicts.

    `unclear` is counted apart: the share is of the suspects with a clear verdict, and with all unclear ones as right.

    Raises:
        UserError: the table cannot be read, or a verdict is missing or unknown.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(
            f"There is no table {table}. Make one with: python -m nrat_scale.audit.sheet AUDIT --out sheet.png"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"The table {table} cannot be read ({first_line(error)}).") from error
    found = [str(row.get("verdict") or "").strip().lower() for row in rows]
    if not rows or "verdict" not in rows[0]:
        raise UserError(
            f"{table} has no column `verdict`, or no rows. Give the table that python -m nrat_scale.audit.sheet wrote."
        )
    for number, verdict in enumerate(found, start=1):
        if verdict not in VERDICTS:
            what = f"the verdict {quoted(verdict)}" if verdict else "no verdict"
            raise UserError(f"Row {number} of {table} has {what}; expected {', '.join(VERDICTS)}.")
    wrong, right, unclear = (found.count(verdict) for verdict in VERDICTS)
    lines = [f"{len(found)} suspects checked: {wrong} wrong, {right} right, {unclear} unclear"]
    if wrong + right:
        lines.append(f"really wrong: {_share(wrong, wrong + right)} of those with a clear verdict")
    if unclear:
        lines.append(f"really wrong: {_share(wrong, len(found))} of all, the unclear ones as right")
    if any(row.get("drawn") == "worst" for row in rows):
        lines.append("These were the worst suspects, not a random sample: the share is not that of all suspects.")
    return "\n".join(lines)


def _share(count: int, n: int) -> str:
    low, high = wilson(count, n)
    return f"{100 * count / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n = {n})"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.audit.sheet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("audit", type=Path, nargs="?", metavar="AUDIT", help="folder that python -m nrat_scale.audit wrote")
    add("--out", type=Path, metavar="FILE.png", help="new picture; the table FILE.csv is written beside it")
    add("--count", type=int, default=COUNT, metavar="N", help="suspects (default: %(default)s)")
    add("--worst", action="store_true", help="the least credible suspects, instead of a random sample")
    add("--seed", type=int, default=0, metavar="N", help="of the sample (default: %(default)s)")
    add("--shards", metavar="SHARDS", help="the audited shards, if they have moved")
    add("--verdicts", type=Path, metavar="FILE.csv", help="print the share that is wrong, of a table with verdicts")
    given = parser.parse_args(argv)
    if given.verdicts is not None:
        if given.audit is not None or given.out is not None:
            raise UserError("--verdicts reads a table alone. Omit AUDIT and --out.")
        print(verdicts(given.verdicts))
        return
    if given.audit is None or given.out is None:
        raise UserError("Give the folder of an audit and --out FILE.png, or --verdicts FILE.csv.")
    options = {"worst": given.worst, "seed": given.seed, "shards": given.shards}
    print(contact_sheet(given.audit, given.out, given.count, **options))


if __name__ == "__main__":
    run_cli(main)
