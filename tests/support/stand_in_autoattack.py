"""A package with the interface of the official `autoattack` that perturbs chosen images and gives chosen warnings."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

_SOURCE = """
import logging
import warnings

import torch

BREAKS = {breaks!r}  # component -> images of each batch that it breaks, as long as the total lasts
HOW = {how!r}
MESSAGES = {messages!r}


class Logger:
    def log(self, text):
        print(text)


class AutoAttack:
    def __init__(self, model, norm="Linf", eps=.3, seed=None, verbose=True, attacks_to_run=[], version="standard",
                 is_tf_model=False, device="cuda", log_path=None):
        assert version == "standard" and norm in ("Linf", "L2") and not verbose
        self.model, self.norm, self.eps, self.seed, self.logger = model, norm, eps, seed, Logger()
        self.apgd = self.apgd_targeted = self.fab = self.square = type("Part", (), {{"n_target_classes": 9}})()
        self.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        for text in MESSAGES:
            if HOW == "printed":
                self.logger.log(f"Warning: {{text}}")
            elif HOW == "warned":
                warnings.warn(Warning(text))
            elif HOW == "logged":
                logging.getLogger("autoattack.checks").warning(text)
            else:
                logging.warning(text)
        x_adv, robust = x_orig.clone(), self.model(x_orig).max(1)[1] == y_orig
        shares = {{"clean": robust.float().mean().item()}}
        for name in self.attacks_to_run:
            rows = robust.nonzero().flatten()[: BREAKS.get(name, 0)]
            BREAKS["left of " + name] = BREAKS.get("left of " + name, BREAKS.get("total of " + name, 10**6)) - len(rows)
            if BREAKS["left of " + name] < 0:
                rows = rows[:0]
            x_adv[rows] = 1 - (1 - x_adv[rows] - self.eps / 10).clamp(0, 1)
            robust[rows] = False
            shares[name] = robust.float().mean().item()
        if "square" in shares and len(shares) > 2 and shares["square"] < min(shares[k] for k in shares if k != "square") - .002:
            self.logger.log("Warning: Square Attack has decreased the robust accuracy of 1.00%. This might indicate that ...")
        return x_adv
"""


def install(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    breaks: Mapping[str, int],
    messages: Sequence[str] = (),
    how: str = "printed",
) -> None:
    """Put the package `autoattack` on the path, in `folder`.

    Args:
        breaks: component -> images of each batch that it breaks; `total of NAME` limits them to that many batches' sum.
        messages: the warnings of its checks.
        how: `printed` as the official package does, `warned`, `logged`, or `root` for the root logger.
    """
    install_source(monkeypatch, folder, _SOURCE.format(breaks=dict(breaks), messages=list(messages), how=how))


def install_source(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Put a package `autoattack` with this source on the path, in `folder`."""
    (folder / "autoattack").mkdir(parents=True, exist_ok=True)
    (folder / "autoattack" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "autoattack", ModuleType("autoattack"))  # the end of the test removes it
    del sys.modules["autoattack"]
