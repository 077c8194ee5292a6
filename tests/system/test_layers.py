"""Imports point down, importing the package is cheap, and no module can run code that a file contains."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nrat_scale"
TOOLS = ROOT / "tools"

# From the top. A row imports the rows below it, nothing of its own row; the modules of one package import each other.
ROWS = (
    ("tools",),
    ("reproduce", "audit"),
    ("train", "release"),
    ("report",),
    ("evaluate", "cost"),
    ("recipe", "prepare"),
    ("data", "loading", "added_losses", "overrides"),
    ("objectives", "labels", "models", "attacks", "weights", "optim", "collapse", "checkpoint", "remote", "tracking"),
    ("presets",),
    ("label_refinement", "label_files"),
    ("losses", "datasets", "publications", "threat", "transition"),
    ("_class_names",),
    ("core",),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted(TOOLS.rglob("*.py"))


def _unit(path: Path) -> str:
    """The entry of ROWS that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py") if path.is_relative_to(PACKAGE) else "tools"


def _imported(tree: ast.AST) -> set[str]:
    """The entries of ROWS that `tree` imports, also within functions; `__init__` is the package itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {(name[1:] or ["__init__"])[0] for name in parts if name[0] == "nrat_scale"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            path = (node.module or "").split(".")
            if path[0] == "nrat_scale":
                names = [path[1]] if len(path) > 1 else [alias.name for alias in node.names]
                found |= {name if name in LEVEL else "__init__" for name in names}
    return found


# ---- directions -----------------------------------------------------------------------------------------------------


def test_every_entry_has_a_row():
    """Every module and package of nrat_scale/ is in ROWS, and ROWS names no other."""
    assert {_unit(path) for path in SOURCES} - {"__init__", "__main__"} == set(LEVEL)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    """No module imports an entry of its own row or of a row above."""
    unit = _unit(path)
    if unit in ("__init__", "__main__"):
        return
    imported = _imported(ast.parse(path.read_text(encoding="utf-8"))) - {"__init__", unit}
    assert not {name for name in imported if LEVEL[name] <= LEVEL[unit]}


def test_the_check_sees_every_import():
    """Each form of an import statement is found."""
    text = """
import nrat_scale
import nrat_scale.train.step as t
from nrat_scale import labels as noise, __version__
from nrat_scale.data.batches import Batch
import torch
def late():
    from nrat_scale.report import draw
"""
    assert _imported(ast.parse(text)) == {"__init__", "train", "labels", "data", "report"}


def test_no_module_is_called_utils():
    """Module names say what a module does."""
    for path in SOURCES:
        words = set(path.stem.split("_")) | set(path.relative_to(ROOT).parts[:-1])
        assert not words & {"util", "utils", "helper", "helpers", "common", "misc"}, path.name


# ---- no code from files ---------------------------------------------------------------------------------------------

UNPICKLERS = {"_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "pd.read_pickle"),
}


def _dangers(tree: ast.AST) -> list[str]:
    """The expressions of `tree` that can run code from a file or a string."""
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_code_from_files(path):
    """No unpickling, eval, exec or shell, except the one guarded reader of CIFAR's published pickles."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    dangers = _dangers(tree)
    if path != PACKAGE / "prepare/readers/cifar.py":
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
def test_the_check_sees_every_danger(line):
    """Each way to run code from a file is found."""
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
    """No false alarms: `model.eval()` is not `eval`."""
    assert not _dangers(ast.parse(line))
