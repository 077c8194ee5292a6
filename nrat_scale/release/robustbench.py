"""Texts for a submission to RobustBench: its `model_info` JSON and the text of its new-model issue."""

from typing import Any

from nrat_scale.attacks import AUTOATTACK_NORMS, fraction_text
from nrat_scale.evaluate.results import left_out_notes
from nrat_scale.release.card import TEMPLATES
from nrat_scale.release.contents import Contents

TO_FILL_IN = "TO FILL IN"  # what only the authors know


def robustbench_info(contents: Contents) -> dict[str, Any]:
    """The JSON that RobustBench keeps of a model (`model_info/<dataset>/<threat model>/<name>.json`).

    `autoattack_acc` is given only for standard AutoAttack on all test images.
    """
    results = contents.results
    total = None if results is None else results["data"]["num_images"]
    accuracies = {
        name: f"{100 * entry['accuracy']:.2f}" for name, entry in contents.attacks.items() if entry["n"] == total
    }
    return {
        "link": TO_FILL_IN,
        "name": TO_FILL_IN,
        "authors": TO_FILL_IN,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": str(contents.description["dataset"]),
        "venue": TO_FILL_IN,
        "architecture": str(contents.description["architecture"]),
        "eps": None if results is None else fraction_text(results["threat"]["eps"]),
        "clean_acc": accuracies.get("natural"),
        "reported": accuracies.get("aa"),
        "autoattack_acc": accuracies.get("aa"),
        "footnote": " ".join(_notes(contents, total)) or None,
        "unreliable": bool(contents.flags),
    }


def new_model_issue(contents: Contents, info: dict[str, Any]) -> str:
    """The text of RobustBench's new-model issue, as far as the run's files answer it; `info` is `robustbench_info`."""
    template = TEMPLATES.get_template("new_model_issue.md")
    return template.render(contents=contents, info=info, norms=AUTOATTACK_NORMS, to_fill_in=TO_FILL_IN)


def _notes(contents: Contents, total: int | None) -> list[str]:
    notes = []
    if contents.recipe.data.generated.shards:
        notes.append("It uses generated images in training.")
    for source, noise in contents.noise.items():
        notes.append(f"{contents.noise_effect(source)} ({noise['kind']} label noise).")
    if contents.has_unchecked_labels:
        notes.append("Nobody has checked its real training labels.")
    measured = contents.attacks.get("aa", {"n": 0})["n"]
    if measured != total:
        problem = f"run on {measured} of {total} images only" if measured else "not run"
        notes.append(f"No AutoAttack accuracy is claimed: AutoAttack was {problem}.")
    return notes + left_out_notes(contents.attacks) + contents.flags
