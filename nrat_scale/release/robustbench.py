"""Texts for a submission to RobustBench: its `model_info` JSON and the text of its new-model issue."""

from typing import Any

from nrat_scale.attacks import AUTOATTACK_NORMS, fraction_text
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


def new_model_issue(contents: Contents) -> str:
    """The text of RobustBench's new-model issue, as far as the run's files answer it."""
    info = robustbench_info(contents)
    threat = contents.recipe.threat.norm if contents.results is None else contents.results["threat"]["norm"]
    return TEMPLATES.get_template("new_model_issue.md").render(
        contents=contents,
        info=info,
        accuracies={key: info[key] or "not measured on all test images" for key in ("clean_acc", "autoattack_acc")},
        threat_model=AUTOATTACK_NORMS[threat],
        method=_evaluation_method(contents),
        to_fill_in=TO_FILL_IN,
    )


def _notes(contents: Contents, total: int | None) -> list[str]:
    notes = []
    if contents.recipe.data.generated.shards:
        notes.append("It uses generated images in training.")
    if contents.noise is not None and contents.noise.get("num_noisy"):
        rate, kind = 100 * contents.noise["realised_rate"], contents.noise["kind"]
        notes.append(f"{rate:.1f} % of its real training labels are wrong ({kind} label noise).")
    autoattack = contents.attacks.get("aa")
    if autoattack is None:
        notes.append("No AutoAttack accuracy is claimed: AutoAttack was not run.")
    elif autoattack["n"] != total:
        images = f"{autoattack['n']} of {total} images"
        notes.append(f"No AutoAttack accuracy is claimed: AutoAttack was run on {images} only.")
    return notes + contents.flags


def _evaluation_method(contents: Contents) -> str:
    entry = contents.attacks.get("aa")
    if contents.results is None or entry is None:
        return "not evaluated with AutoAttack"
    versions = ", ".join(f"{name} {version}" for name, version in contents.results["versions"].items())
    return (
        f"standard AutoAttack in batches of {entry['batch_size']} images, seed {entry['seed']}, n = {entry['n']} "
        f"({versions})"
    )
