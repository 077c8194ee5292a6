"""Made-up cell.json files, for what reads finished cells. Their numbers exist in tests only."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

MEASURES = ("natural", "pgd20", "cw20", "aa")


def record(right: np.ndarray) -> dict[str, Any]:
    """One attack's entry of a cell.json."""
    n, correct = len(right), int(right.sum())
    outcomes = base64.b64encode(np.packbits(right)).decode()
    return {"correct": correct, "n": n, "accuracy": correct / n, "low": 0.0, "high": 1.0, "outcomes": outcomes}


def outcomes_of(accuracy: float, n: int = 200, seed: int = 0) -> np.ndarray:
    """Outcomes bool [n] of about an accuracy; those of two accuracies overlap as much as possible, but for some images."""
    right = np.arange(n) < round(accuracy * n)
    changed = np.random.default_rng(seed).choice(n, max(1, n // 100), replace=False)
    right[changed] = ~right[changed]
    return np.random.default_rng(99).permutation(right)


def cell(
    method: str = "nrat",
    noise: str = "symmetric",
    rate: float = 0.4,
    seed: int = 0,
    *,
    accuracy: float | dict[str, float] = 0.6,
    last: float | dict[str, float] | None = None,
    n: int = 200,
    **changes: Any,
) -> dict[str, Any]:
    """A finished cell; `accuracy` and `last` are those of the best and the last checkpoint, of all attacks or by attack."""
    results = {}
    for checkpoint, value in (("best", accuracy), ("last", accuracy if last is None else last)):
        each = value if isinstance(value, dict) else {measure: value - 0.05 * i for i, measure in enumerate(MEASURES)}
        results[checkpoint] = {key: record(outcomes_of(each[key], n, seed)) for key in each}
    curve = [
        {
            "epoch": e,
            "step": 10 * e,
            "natural": 0.3 + 0.1 * e,
            "pgd10": 0.2 + 0.05 * e * (5 - e),
            "n": 100,
            "split": "held-out",
        }
        for e in range(1, 5)
    ]
    return {
        "version": 1,
        "edition": "fashion",
        "method": method,
        "noise": noise,
        "rate": rate,
        "seed": seed,
        "space": "pixel",
        "status": "finished",
        "error": None,
        "recipe": {"objective.name": method, "data.batch_size": 128},
        "recipe_hash": f"{method}-{noise}-{rate}-{seed}",
        "evaluation": {
            "attacks": list(MEASURES),
            "images": n,
            "data": "f" * 16,
            "threat": "l_inf, eps = 0.1",
            "keys": {},
        },
        "results": results,
        "curve": curve,
        "memorisation": [{"epoch": 4, "noisy_fitted": 0.25, "clean_fitted": 0.75}],
        "noise_realised": {"rate": rate, "effective_rate": rate},
        "cost": {
            "train_seconds": 60.0,
            "evaluate_seconds": 30.0,
            "forward_equivalents": 21.0,
            "steps": 1000,
            "images": 128,
            "hardware": "one core",
        },
        "best_epoch": 3,
        "flags": {"best": [], "last": []},
        "versions": {"nrat_scale": "0", "torch": "2"},
        "date": "2026-11-26",
        **changes,
    }


def write_cell(folder: Path, content: dict[str, Any]) -> Path:
    """Write a cell where committed ones lie and return its path."""
    place = folder / content["edition"] / content["method"] / f"{content['noise']}-{content['rate']:g}"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"seed-{content['seed']}.json"
    path.write_text(json.dumps(content))
    return path
