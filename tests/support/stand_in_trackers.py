"""Stand-ins for the packages wandb and trackio: what Accelerate's trackers and `nrat_scale.tracking` call of them."""

import sys
import threading
import types
from typing import Any

import pytest


class Package:
    """One package; it records what it is given.

    Attributes:
        fails: `init`, `log` or `finish`: the call that raises.
        hangs: `init` waits for it.
    """

    def __init__(self, name: str) -> None:
        self.name, self.fails = name, ""
        self.hangs: threading.Event | None = None
        self.inits: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, project: str, **options: Any) -> "Package":
        self._fail("init")
        if self.hangs is not None:
            self.hangs.wait()
        self.inits.append({"project": project, "id": options.get("id", options["name"]), **options})
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._fail("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._fail("finish")
        self.finished += 1

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.config.update(values)

    def _fail(self, call: str) -> None:
        if self.fails == call:
            raise RuntimeError(f"{self.name} cannot {call}\nmore lines")


def stand_in_trackers(monkeypatch: pytest.MonkeyPatch) -> tuple[Package, Package]:
    """Replace wandb and trackio by stand-ins, and return these."""
    packages = Package("wandb"), Package("trackio")
    for package in packages:
        module = types.ModuleType(package.name)
        module.init, module.config = package.init, types.SimpleNamespace(update=package.update)  # type: ignore[attr-defined]
        module.Image = lambda image: image  # type: ignore[attr-defined]
        module.Settings = lambda **settings: settings  # type: ignore[attr-defined]
        module.api = types.SimpleNamespace(api_key="key")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, package.name, module)
    return packages
