"""The audit as one HTML file: audit.json and images of the shards -> values for the template -> `templates/page.html`.

    python -m nrat_scale.audit.page AUDIT [--shards SHARDS] [--out FILE.html]

makes it again; the audit itself writes it as audit.html. It has no script, loads nothing and contains its figures.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jinja2 import UndefinedError
from PIL import Image

from nrat_scale.audit.figures import draw_class_rates, draw_reliability
from nrat_scale.core.errors import UserError, first_line, quoted, run_cli, warn
from nrat_scale.core.files import make_folder, read_json, write_atomically
from nrat_scale.core.pages import Figure, check_page_name, environment
from nrat_scale.data.shards import ShardSet, open_shards

AUDIT, PAGE = "audit.json", "audit.html"  # in the folder of an audit
FORMAT, VERSION = "nrat_scale.audit", 1
MOST_CLASSES = 20  # of a matrix; more are a table of the most frequent confusions
_MOST_CONFUSIONS = 30
_MOST_PAIRS = 10
_MOST_PICTURES = 240
_MOST_FETCHED = 32  # remote shards that the gallery reads

_TEMPLATES = environment("nrat_scale.audit", autoescape=True)


@dataclass(frozen=True)
class Suspect:
    """One image of the gallery."""

    png: bytes
    number: int  # source id
    given: str
    suggested: str
    confidence: float  # out-of-sample probability of the suggested class
    quality: float  # estimated probability that the given label is right


def read_audit(folder: Path) -> dict[str, Any]:
    """The content of audit.json in `folder`.

    Raises:
        UserError: there is none, or it is of another format or version.
    """
    path = folder / AUDIT
    if folder.is_dir() and not path.is_file():
        raise UserError(
            f"{folder} has no {AUDIT}: the audit there is not complete. Run python -m nrat_scale.audit again."
        )
    content = read_json(path, "audit")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        what = f"format {quoted(content.get('format'))}, version {quoted(content.get('version'))}"
        raise UserError(f"{path} is not an audit that this program reads ({what}). Audit again.")
    return content


def audited_shards(content: dict[str, Any], where: str | Path | None = None) -> ShardSet:
    """The shards of an audit, at `where` if they have moved; raises `UserError` if they are gone or others."""
    data = content.get("data")
    if not isinstance(data, dict) or not {"shards", "fingerprint"} <= data.keys():
        raise UserError(f"{AUDIT} is damaged: it does not name its shards. Audit again.")
    shards = open_shards(str(where or data["shards"]), "the audited data (--shards)")
    if shards.fingerprint != data["fingerprint"]:
        raise UserError(f"{shards.folder} holds other shards than the audit was of. Give those with --shards.")
    return shards


def write_page(folder: Path, content: dict[str, Any], shards: ShardSet, out: Path | None = None) -> Path:
    """Write the page of an audit and return its path.

    Args:
        folder: of the audit.
        content: of audit.json.
        shards: the audited ones, for the gallery.
        out: the HTML file, by default audit.html in `folder`.

    Raises:
        UserError: `out` is not an .html file or cannot be written, or `content` is damaged.
    """
    out = out or folder / PAGE
    check_page_name(out, "page")
    try:
        page = render_page(content, shards)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError, UndefinedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / AUDIT} is damaged ({first_line(error)}). Audit again.") from error
    make_folder(out.parent)
    write_atomically(out, page)
    return out


def render_page(content: dict[str, Any], shards: ShardSet) -> str:
    """The HTML of an audit."""
    names = [str(name) for name in content["data"]["class_names"]]
    best, is_corrected = best_estimate(content)
    gallery, left_out = _gallery(content, shards, names)
    confidence = "mean confidence of a bin against the share of its images whose given label is predicted"
    hold_out = content["calibration"]["holdout_bins"]
    more = ", and for the clean hold-out the share that is predicted right" if hold_out else ""
    shown = len(best["per_class"]) if len(names) <= 40 else 40
    return _TEMPLATES.get_template("page.html").render(
        title=f"Label audit: {'/'.join(PurePath(str(content['data']['shards'])).parts[-2:])}",
        content=content,
        names=names,
        best=best,
        is_corrected=is_corrected,
        facts=_facts(content),
        matrix=_rows(best["transition"]) if len(names) <= MOST_CLASSES else None,
        injected=_rows(_injected(content)) if len(names) <= MOST_CLASSES and content["injected"] else None,
        confusions=_confusions(best["joint"], names),
        pairs=[
            (*(names[label] for label in pair["classes"]), pair["share"])
            for pair in content["overlapping"][:_MOST_PAIRS]
        ],
        reliability=Figure(draw_reliability(content["calibration"]), f"Calibration: {confidence}{more}."),
        rates=Figure(
            draw_class_rates(best["per_class"], content["plain"]["per_class"] if is_corrected else None, names),
            f"Share of wrong labels by given label{'' if shown == len(names) else ', the 40 highest'}, with 95 % intervals.",
        ),
        gallery=gallery,
        left_out=left_out,
        versions=sorted(f"{name} {version}" for name, version in content["versions"].items()),
    )


def best_estimate(content: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the corrected estimate, True), or (the plain one, False) if the correction is missing or not identified."""
    corrected = content["corrected"]
    if corrected is not None and corrected["identified"]:
        return corrected, True
    return content["plain"], False


def _facts(content: dict[str, Any]) -> dict[str, str]:
    data, method, accuracy = content["data"], content["method"], content["accuracy"]
    noise, hold_out = content["noise"], method["holdout"]
    folds = f"{method['folds']} folds of {method['recipe']}" if method["folds"] else "a model that never saw the images"
    facts = {
        "Data": f"{data['shards']}: {data['num_images']} images of {len(data['class_names'])} classes, "
        f"fingerprint {str(data['fingerprint'])[:16]}",
        "Injected": ""
        if noise is None
        else ", ".join(f"{key} {value}" for key, value in noise.items() if key != "matrix"),
        "Predicted by": folds,
        "Hold-out": "none" if hold_out is None else f"{hold_out['shards']}: {hold_out['num_images']} images",
        "Agreement": f"{100 * accuracy['agreement']:.1f} % of the given labels are predicted",
        "Accuracy": "" if accuracy["holdout"] is None else f"{100 * accuracy['holdout']:.1f} % on the hold-out",
        "Intervals": f"95 %, {method['bootstrap']} bootstrap replicates, seed {method['seed']}",
        "Date": f"{content['date']}, audit {content['audit']}",
    }
    return {title: text for title, text in facts.items() if text}


def _rows(matrix: Any) -> list[list[float]]:
    """Rows in %, of a matrix of shares."""
    return (100 * np.asarray(matrix, np.float64)).tolist()


def _injected(content: dict[str, Any]) -> np.ndarray:
    """The transition matrix that was injected, rows that sum to 1."""
    counts = np.asarray(content["injected"]["counts"], np.float64)
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _confusions(joint: Any, names: Sequence[str]) -> list[tuple[str, str, float]]:
    """(true class, given label, % of all images) of the most frequent wrong labels."""
    shares = np.asarray(joint, np.float64) * (1 - np.eye(len(names)))
    order = np.argsort(-shares, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    rows, columns = np.unravel_index(order, shares.shape)
    found = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(names[i], names[j], 100 * float(shares[i, j])) for i, j in found if shares[i, j] > 0]


def _gallery(
    content: dict[str, Any], shards: ShardSet, names: Sequence[str]
) -> tuple[list[tuple[str, int, list[Suspect]]], int]:
    """((given label, number of its suspects, the worst of them) by class; number of listed suspects that are not shown)."""
    each = max(2, min(20, _MOST_PICTURES // max(len(names), 1)))
    worst = content["suspects"]["worst"]
    entries = [entry for label in range(len(names)) for entry in worst[str(label)][:each]][:_MOST_PICTURES]
    kept, listed = list(_readable(entries, shards)), sum(map(len, worst.values()))
    images: Any = shards.images(np.array([entry["position"] for entry in kept], np.int64)) if kept else ()
    found: dict[int, list[Suspect]] = {}
    for entry, pixels in zip(kept, images, strict=True):
        labels = names[entry["given"]], names[entry["suggested"]]
        numbers = float(entry["p_suggested"]), float(entry["quality"])
        suspect = Suspect(image_png(pixels), int(entry["id"]), *labels, *numbers)
        found.setdefault(entry["given"], []).append(suspect)
    counts = content["suspects"]["by_class"]
    return [(names[label], counts[label], found[label]) for label in sorted(found)], listed - len(kept)


def _readable(entries: Sequence[dict[str, Any]], shards: ShardSet) -> Iterator[dict[str, Any]]:
    """The entries whose shard can be read; of remote shards, those of the few with the most entries."""
    if not entries:
        return
    at = shards.shards_of(np.array([entry["position"] for entry in entries], np.int64))
    numbers, counts = np.unique(at, return_counts=True)
    usable = set(numbers[np.argsort(-counts, kind="stable")].tolist()[: _MOST_FETCHED if shards.is_remote else None])
    for number in sorted(usable):
        try:
            shards.open(number)
        except UserError as error:
            warn(f"The gallery lacks the images of a shard. {error}")
            usable.discard(number)
    yield from (entry for entry, number in zip(entries, at.tolist(), strict=True) if number in usable)


def image_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, C] as PNG, one channel in grey."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3]).save(buffer, format="PNG")
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m nrat_scale.audit.page", description="Write the page of an audit again."
    )
    parser.add_argument("audit", type=Path, metavar="AUDIT", help="folder that python -m nrat_scale.audit wrote")
    parser.add_argument("--shards", metavar="SHARDS", help="the audited shards, if they have moved")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=f"default: AUDIT/{PAGE}")
    given = parser.parse_args(argv)
    content = read_audit(given.audit)
    print(write_page(given.audit, content, audited_shards(content, given.shards), given.out))


if __name__ == "__main__":
    run_cli(main)
