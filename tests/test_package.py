"""The package itself: importing it is cheap, and its public names are imported when they are used."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

import nrat_scale
from nrat_scale import __main__ as commands
from nrat_scale.core.errors import UserError

CHEAP = """
import sys
import nrat_scale
assert not {"torch", "timm", "numpy", "omegaconf"} & set(sys.modules)
assert {"load", "register_robustbench", "models", "recipe", "__version__"} <= set(dir(nrat_scale))
assert not {"torch", "timm"} & set(sys.modules)
"""

REGISTRY = """
import timm
import nrat_scale
assert not timm.is_model("cnn4")
import nrat_scale.models
assert timm.is_model("cnn4") and timm.is_model("wrn28_10_silu")
"""

LOADING_REGISTERS = """
import nrat_scale
nrat_scale.load
import timm
assert timm.is_model("cnn4")
"""


@pytest.mark.parametrize("script", [CHEAP, REGISTRY, LOADING_REGISTERS], ids=["cheap", "registry", "loading"])
@pytest.mark.medium
def test_import_in_a_new_process(script):
    """`import nrat_scale` imports no torch; `import nrat_scale.models`, or the use of `nrat_scale.load`, fills timm's registry."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve():
    """Every listed name exists; an unknown one is an AttributeError as for any module."""
    for name in dir(nrat_scale):
        assert getattr(nrat_scale, name) is not None or name.startswith("__")
    assert nrat_scale.objectives.OBJECTIVES["nrat"].loss == "nce_rce"
    assert callable(nrat_scale.load) and callable(nrat_scale.register_robustbench)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        nrat_scale.lod  # noqa: B018


def test_the_package_itself_names_its_commands(capsys):
    """`python -m nrat_scale` lists them, each of which exists; a command as an argument gets the right spelling."""
    commands.main([])
    listed = re.findall(r"^  nrat_scale\.(\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(commands.COMMANDS) and all(find_spec(f"nrat_scale.{name}.__main__") for name in listed)
    with pytest.raises(UserError, match=r"The command is python -m nrat_scale\.train mine\.yaml seed=1"):
        commands.main(["train", "mine.yaml", "seed=1"])
    with pytest.raises(UserError, match="Did you mean 'evaluate'"):
        commands.main(["evalute"])
