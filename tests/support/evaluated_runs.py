"""Run directories with made-up metrics and results, for what reads them without loading weights."""

import json
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "seed": 3,
    "precision": "fp32",
    "objective": {"name": "nrat", "lam": 6.0, "inner": "kl", "smoothing": 0.0, "smoothing_mode": "off"},
    "threat": {"eps": 8 / 255, "step": 2 / 255, "num_steps": 10, "space": "pixel", "norm": "linf"},
    "model": {"name": "cnn4"},
    "train": {"epochs": 5, "validation_attack": "pgd10"},
    "optim": {"lr": 0.1},
    "ema": {"decay": 0.99},
    "awp": {"gamma": 0.0},
    "data": {
        "batch_size": 128,
        "epoch_samples": 2560,
        "real": {"shards": "somewhere/digits/train", "noise": {"kind": "symmetric", "rate": 0.4, "seed": 0}},
        "generated": {"shards": "somewhere/digits_generated", "fraction": 0.7},
        "validation": {"source": "real", "size": 200, "take": "stratified", "labels": "given"},
    },
}
# Validation natural and robust accuracy by epoch; epoch 3 is the best.
CURVE = ((0.30, 0.10), (0.80, 0.40), (0.90, 0.62), (0.92, 0.55), (0.93, 0.50))
_PATHS = {
    "recipe": "recipe.yaml",
    "metrics": "metrics.jsonl",
    "best": "checkpoints/best.json",
    "last": "checkpoints/last.json",
}


def score(correct: int, n: int, low: float, high: float) -> dict[str, Any]:
    """An attack's entry in results.json."""
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high, "seed": 0, "seconds": 1.0}


def results() -> dict[str, Any]:
    """results.json: best at step 60 and last at step 100, on 500 test images, AutoAttack on 200."""
    best = {
        "natural": score(487, 500, 0.956, 0.985),
        "pgd20": score(310, 500, 0.577, 0.661),
        "cw20": score(305, 500, 0.567, 0.652),
        "aa": score(118, 200, 0.521, 0.656),
    }
    last = {**best, "natural": score(492, 500, 0.969, 0.992), "pgd20": score(275, 500, 0.506, 0.593)}
    return {
        "format": "nrat_scale.results",
        "version": 1,
        "data": {"folder": "test", "fingerprint": "0123456789abcdef" * 4, "dataset": "digits", "num_images": 500},
        "threat": {"norm": "linf", "eps": 8 / 255, "step": 2 / 255, "space": "pixel"},
        "versions": {"torch": "2.6.0"},
        "checkpoints": {
            "best": {"step": 60, "epoch": 3, "weights": "ema", "sha256": "aa", "attacks": best},
            "last": {"step": 100, "epoch": 5, "weights": "ema", "sha256": "bb", "attacks": last},
        },
    }


def metrics_lines() -> list[str]:
    """metrics.jsonl: a training row and a validation row per epoch."""
    rows: list[dict[str, Any]] = []
    for epoch, (natural, robust) in enumerate(CURVE, start=1):
        step = {"epoch": epoch, "step": 20 * epoch}
        rows.append({"kind": "train", **step, "loss": 1.0, "natural_accuracy": None, "robust_accuracy": 0.5, "lr": 0.1})
        values = {"natural": natural, "robust": robust, "natural_clean": natural, "robust_clean": robust}
        records = {key: {"correct": round(200 * v), "n": 200, "accuracy": v} for key, v in values.items()}
        rows.append({"kind": "validation", **step, "attack": "pgd10", "labels": "given", **records})
    return [json.dumps(row) + "\n" for row in rows]


def make_run(folder: Path, **files: Any) -> Path:
    """A run directory with every file that a report reads.

    Args:
        files: replaces the content of a file, such as `results=...`; None omits the file.
    """
    (folder / "checkpoints").mkdir(parents=True)
    noise = {"kind": "symmetric", "rate": 0.4, "seed": 0, "num_labels": 30, "num_noisy": 12, "realised_rate": 0.4}
    content = {
        "recipe": RECIPE,
        "metrics": "".join(metrics_lines()),
        "best": {"step": 60, "epoch": 3, "folder": "step-60"},
        "last": {"step": 100, "epoch": 5, "folder": "step-100"},
        "label_noise": {**noise, "transition_matrix": [[6, 4, 0], [0, 7, 3], [5, 0, 5]]},
        "model": {"class_names": ["truck", "automobile", "ship"]},
        "results": results(),
        **files,
    }
    for key, value in content.items():
        if value is not None:
            text = value if isinstance(value, str) else (yaml.safe_dump if key == "recipe" else json.dumps)(value)
            (folder / _PATHS.get(key, f"{key}.json")).write_text(text, encoding="utf-8")
    return folder


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `tree` with one dotted key set."""
    key, _, rest = path.partition(".")
    return {**tree, key: changed(tree[key], rest, value) if rest else value}


def dotted_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all keys, those of inner mappings too."""
    paths = []
    for key, value in tree.items():
        paths += [f"{prefix}{key}", *(dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return paths
