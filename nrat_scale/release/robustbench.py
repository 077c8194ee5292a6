"""RobustBench's JSON and issue text for a release."""

import json
from typing import Any

from nrat_scale.release.card import NORM_TITLES, TO_FILL_IN, Contents, eps_text

# ---- RobustBench ----------------------------------------------------------------------------------------------------


def robustbench_info(contents: Contents) -> dict[str, Any]:
    """The JSON that RobustBench keeps of a model (`model_info/<dataset>/<threat model>/<name>.json`).

    What only the authors know is `TO_FILL_IN`. `autoattack_acc` is given only for AutoAttack standard on all test images.
    """
    attacks = contents.record.get("attacks", {})
    total = contents.results["data"]["num_images"] if contents.results is not None else None
    whole = {name: entry for name, entry in attacks.items() if entry["n"] == total}
    notes = []
    if contents.recipe.data.generated.shards:
        notes.append("It uses generated images in training.")
    if contents.noise is not None and contents.noise.get("num_noisy"):
        notes.append(f"{100 * contents.noise['realised_rate']:.1f} % of its real training labels are wrong on purpose.")
    if "aa" not in whole:
        seen = f"on {attacks['aa']['n']} of {total} images only" if "aa" in attacks else "not at all"
        notes.append(f"No AutoAttack accuracy is claimed: it was run {seen}.")
    notes += contents.flags
    return {
        "link": TO_FILL_IN,
        "name": TO_FILL_IN,
        "authors": TO_FILL_IN,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": str(contents.description["dataset"]),
        "venue": TO_FILL_IN,
        "architecture": str(contents.description["architecture"]),
        "eps": eps_text(contents.results["threat"]["eps"]) if contents.results is not None else None,
        "clean_acc": _percentage(whole.get("natural")),
        "reported": _percentage(whole.get("aa")),
        "autoattack_acc": _percentage(whole.get("aa")),
        "footnote": " ".join(notes) or None,
        "unreliable": bool(contents.flags),
    }


def robustbench_issue(contents: Contents) -> str:
    """The text of RobustBench's new-model issue, as far as a run knows it."""
    info = robustbench_info(contents)
    norm = contents.results["threat"]["norm"] if contents.results is not None else contents.recipe.threat.norm
    claimed = {
        key: info[key] if info[key] is not None else "not measured on all test images"
        for key in ("clean_acc", "autoattack_acc")
    }
    lines = [
        "# Paper Information",
        "",
        f"- **Paper Title**: {TO_FILL_IN}",
        f"- **Paper URL**: {TO_FILL_IN}",
        f"- **Paper authors**: {TO_FILL_IN}",
        "",
        "# Leaderboard Claim(s)",
        "",
        "## Model 1",
        "",
        f"- **Architecture**: {info['architecture']}",
        f"- **Dataset**: {info['dataset']}",
        f"- **Threat Model**: {NORM_TITLES[norm][1]}",
        f"- **eps**: {info['eps']}",
        f"- **Clean accuracy**: {claimed['clean_acc']}",
        f"- **Robust accuracy**: {claimed['autoattack_acc']}",
        "- **Additional data**: false",
        f"- **Evaluation method**: {_evaluation_method(contents)}",
        f"- **Checkpoint and code**: {TO_FILL_IN} (user/{contents.name} on the Hub; loads with nrat_scale, sha256 {contents.sha256})",
        "",
        "# Model Zoo:",
        "",
        "- [ ] I want to add my models to the Model Zoo (check if true)",
        f"- [ ] I use an architecture that is **not** included among those of the zoo (check if true; ours is "
        f"{info['architecture']})",
        "- [ ] I agree to release my model(s) under MIT license (check if true)",
    ]
    if info["footnote"]:
        lines += ["", f"Footnote: {info['footnote']}"]
    return "\n".join(lines) + "\n"


def _evaluation_method(contents: Contents) -> str:
    attacks = contents.record.get("attacks", {})
    if contents.results is None or "aa" not in attacks:
        return "not evaluated with AutoAttack"
    versions = ", ".join(f"{name} {version}" for name, version in contents.results["versions"].items())
    entry = attacks["aa"]
    return f"AutoAttack standard in blocks of {entry['batch_size']} images, seed {entry['seed']}, n = {entry['n']} ({versions})"


def _percentage(entry: dict[str, Any] | None) -> str | None:
    return None if entry is None else f"{100 * entry['accuracy']:.2f}"


def info_json(contents: Contents) -> str:
    """`robustbench_info` as text."""
    return json.dumps(robustbench_info(contents), indent=2, ensure_ascii=False) + "\n"
