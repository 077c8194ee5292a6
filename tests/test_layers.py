"""Imports point down only, every module has its layer, and nothing in the library can run what a file contains."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nrat_scale"
TOOLS = ROOT / "tools"

# Read from the top: a module may import those above it in its own list where the list is `ordered`, and all layers below.
# `audit` and `plan` are names kept for later.
GROUND = (
    "errors",
    "files",
    "push",
    "unfinished",
    "seeds",
    "fetch",
    "modes",
    "class_names",
    "datasets",
    "stops",
    "processes",
)  # ordered
L0 = (
    "labels", "shards", "sampling", "augment", "models", "attacks", "objectives", "weights", "optim", "guard", "twin",
    "batchnorm", "flags", "clock", "heartbeat", "export",
)  # fmt: skip
L1 = ("loading", "pack", "sources", "resident", "loader", "data")  # ordered
L2 = ("autoattack", "accuracy", "recipe", "checkpoint")  # ordered
L3 = (
    "subjects",
    "scrutiny",
    "outcomes",
    "evaluate",
    "step",
    "validation",
    "progress",
    "diagnosis",
    "recovery",
    "compiling",
    "train",
    "report",
    "card",
    "release",
    "audit",
    "plan",
)  # ordered
LATER = {"audit", "plan"}
ROOT_MAY_IMPORT = {"loading", "models", "recipe"}


def _allowed() -> dict[str, set[str]]:
    allowed: dict[str, set[str]] = {"__init__": set(ROOT_MAY_IMPORT)}
    below: set[str] = set()
    for layer, ordered in ((GROUND, True), (L0, False), (L1, True), (L2, True), (L3, True)):
        for position, module in enumerate(layer):
            allowed[module] = below | (set(layer[:position]) if ordered else set())
        below |= set(layer)
    for module in L3:
        allowed[module] |= {"__init__"}  # commands print the package's version
    return allowed


ALLOWED = _allowed()
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted(TOOLS.rglob("*.py"))


def _imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """The package's modules that `tree` imports, inside functions too; `__init__` is the package itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {(name[1:] or ["__init__"])[0] for name in parts if name[0] == "nrat_scale"}
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".")
            if node.level:
                path = ["nrat_scale", *filter(None, path)]
            if path[0] == "nrat_scale":
                names = [path[1]] if len(path) > 1 else [alias.name for alias in node.names]
                found |= {name if name in modules else "__init__" for name in names}
    return found


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_every_module_has_a_layer():
    """A new module is placed on purpose; and the package is flat."""
    assert all(path.parent == PACKAGE for path in MODULES)
    names = {path.stem for path in MODULES}
    assert names - set(ALLOWED) == set(), "give the new module its layer in tests/test_layers.py"
    assert set(ALLOWED) - names <= LATER, "a module is gone; remove it here"
    assert len(GROUND + L0 + L1 + L2 + L3) == len({*GROUND, *L0, *L1, *L2, *L3})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    """No module imports one of its own layer (but those before it in an ordered one) or of a layer above."""
    imported = _imported(ast.parse(path.read_text(encoding="utf-8")), set(ALLOWED))
    forbidden = imported - ALLOWED[path.stem] - {path.stem}
    assert not forbidden, f"{path.stem} must not import {sorted(forbidden)}"


def test_the_rules_themselves():
    """The table says what the design says, and every way to write an import is seen."""
    assert "attacks" not in ALLOWED["objectives"] and "data" not in ALLOWED["shards"]
    assert "recipe" not in ALLOWED["data"] and "checkpoint" not in ALLOWED["recipe"]
    assert "train" not in ALLOWED["evaluate"] and "evaluate" in ALLOWED["release"]
    assert ALLOWED["errors"] == set() and "__init__" not in ALLOWED["models"]
    text = """
import nrat_scale
import nrat_scale.train as t
from nrat_scale import labels as noise, __version__
from nrat_scale.data import Batch
from . import shards
from .seeds import derive
from .models.inner import x
import torch
def late():
    from nrat_scale.report import draw
"""
    found = _imported(ast.parse(text), set(ALLOWED))
    assert found == {"__init__", "train", "labels", "data", "shards", "seeds", "models", "report"}


def test_no_module_without_a_job():
    """Nothing is called utils or helpers, here or among the tools."""
    for path in SOURCES:
        words = set(path.stem.split("_")) | set(path.relative_to(ROOT).parts[:-1])
        assert not words & {"util", "utils", "helper", "helpers", "common", "misc"}, path.name


# ---- nothing is run that was read -----------------------------------------------------------------------------------

UNPICKLERS = {"_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "pd.read_pickle"),
}


def _dangers(tree: ast.AST) -> list[str]:
    """What in `tree` can run a program that a file or a string contains."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name.split(".")[0]
                if module in UNPICKLERS or (module == "pickle" and alias.asname):
                    found.append(f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            if module in UNPICKLERS or (module == "pickle" and {a.name for a in node.names} - {"UnpicklingError"}):
                found.append(f"from {node.module} import")
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            if node.attr not in ("UnpicklingError", "PickleError"):
                found.append(f"pickle.{node.attr}")
        elif isinstance(node, ast.Call):
            found += _dangerous_call(node)
    return found


def _dangerous_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}

    def constant(key: str, wanted: bool) -> bool:
        value = keywords.get(key)
        return isinstance(value, ast.Constant) and value.value is wanted

    found = [name] if name in BANNED_CALLS | {"eval", "exec", "builtins.eval", "builtins.exec"} else []
    found += [f"{key}=" for key in ("shell", "allow_pickle") if key in keywords and not constant(key, False)]
    if name == "torch.load" and not constant("weights_only", True):
        found.append("torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_nothing_read_is_run(path):
    """No unpickling, eval, exec or shell; but for the one guarded reader of CIFAR's published pickles."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    dangers = _dangers(tree)
    if path != TOOLS / "reader_cifar.py":
        assert not dangers
        return
    assert dangers == ["pickle.Unpickler"]
    (guarded,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and _is_unpickler(node)]
    (find_class,) = [node for node in guarded.body if isinstance(node, ast.FunctionDef) and node.name == "find_class"]
    assert any(isinstance(node, ast.Raise) for node in ast.walk(find_class))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    (reader,) = [f for f in functions if any(_calls(node, guarded.name) for node in ast.walk(f))]
    assert "version.md5[path.name]" in ast.unparse(reader), "only files of the published md5 may be unpickled"


def _is_unpickler(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) == "pickle.Unpickler" for base in node.bases)


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "pickle.loads(b)",
        "from pickle import loads",
        "import pickle as p",
        "import joblib",
        "from dill import load",
        "eval('1')",
        "exec(code)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "subprocess.run(c, shell=True)",
        "subprocess.Popen(c, shell=1)",
        "os.system('ls')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
    ],
)
def test_every_danger_is_seen(line):
    """The check above notices each way of doing it."""
    assert _dangers(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "np.load(f, allow_pickle=False)",
        "subprocess.run(c, shell=False)",
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(f)",
        "import pickle\nraise pickle.UnpicklingError('no')",
    ],
)
def test_harmless_lines_pass(line):
    """And it does not cry wolf: `model.eval()` is no eval."""
    assert not _dangers(ast.parse(line))
