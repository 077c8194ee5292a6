"""An audit in words, for the terminal and for audit.json."""

from typing import Any

from nrat_scale.core.errors import printable


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _with_interval(record: dict[str, Any]) -> str:
    """The rate with the interval as estimated: a bound below 0 says how far the estimate scatters."""
    low, high = record.get("unclipped_interval", record["interval"])
    return f"{_percent(record['rate'])}  [{100 * low:.2f}, {100 * high:.2f}]"


def audit_text(content: dict[str, Any]) -> str:
    """The summary that the command prints."""
    data, corrected, suspects = content["data"], content["corrected"], content["suspects"]
    lines = [f"{data['shards']}: {data['num_images']} images of {len(data['class_names'])} classes"]
    if content["injected"] is not None:
        noise = content["noise"]
        lines.append(
            f"  injected noise      {_percent(content['injected']['rate'])}  ({noise['kind']}, seed {noise['seed']})"
        )
    if corrected is not None and corrected["identified"]:
        lines.append(f"  wrong labels        {_with_interval(corrected)}  corrected for the classifier's errors")
    lines.append(f"  confident learning  {_with_interval(content['plain'])}  includes the classifier's errors")
    lines.append(f"  suspects            {suspects['count']}")
    if (truth := content["measured_truth"]) is not None and truth["wrong"] and truth["suspects"]:
        lines.append(f"  of the suspects     precision {truth['precision']:.3f}, recall {truth['recall']:.3f}")
    for pair in content["overlapping"][:3]:
        one, other = (printable(data["class_names"][label]) for label in pair["classes"])
        lines.append(f"  overlapping         {one} and {other}: {_percent(pair['share'])} of all images")
    return "\n".join([*lines, *(f"  note: {note}" for note in content["notes"])])


def notes(content: dict[str, Any]) -> list[str]:
    """What must be said beside the numbers."""
    found, corrected, shift = [], content["corrected"], content["shift"]
    if corrected is None:
        found.append(
            "Without --clean-holdout the estimate includes the classifier's own errors; clean labels get one above 0, too."
        )
    elif not corrected["identified"]:
        found.append(
            f"The correction is not identified: {corrected['reason']}. The estimate includes the classifier's errors."
        )
    else:
        if (bounds := corrected.get("unclipped_interval")) is not None and bounds[1] < 0:
            found.append(
                f"The corrected estimate is {_percent(corrected['unclipped'])}, below 0 beyond chance: the classifier errs more often on "
                "the hold-out than on these images, so the hold-out is not of the same kind, and a small rate cannot be seen."
            )
        found.append("The correction assumes that which labels are wrong depends on the class, not on the image.")
    if shift is not None and shift["beyond_chance"]:
        found.append(
            f"The images differ from the hold-out beyond chance (distance {shift['distance']:.3f}, by chance up to "
            f"{shift['by_chance']:.3f}; mean confidence {100 * shift['confidence_difference']:+.2f} points): the corrected rate may "
            "be off by about as many points."
        )
    return found
