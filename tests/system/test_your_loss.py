"""docs/your_loss.md as it is: a user's loss, divergence and preset are trained, evaluated, reported and released."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nrat_scale.added_losses import check_added
from nrat_scale.core.errors import UserError
from nrat_scale.losses import LOSSES
from nrat_scale.objectives import ObjectiveSpec
from nrat_scale.recipe import load_recipe
from tests.support.runs import RECIPE, ROOT, make_shards

PAGE = (ROOT / "docs" / "your_loss.md").read_text()
QUICK = ROOT / "recipes" / "quickstart.yaml"


def _python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    """Its file and its commands, on a tiny recipe; later commands need no code of the user's."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    real, generated = make_shards(tmp_path / "real", 120, 0), make_shards(tmp_path / "generated", 90, 1)
    make_shards(tmp_path / "test", 40, 2)
    (tmp_path / "recipes").mkdir()
    recipe = RECIPE.replace("REAL", str(real)).replace("GENERATED", str(generated)).replace("epochs: 3", "epochs: 1")
    (tmp_path / "recipes" / "quickstart.yaml").write_text(recipe)
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for command in commands.splitlines():
        python, flag, *words = shlex.split(command)
        assert (python, flag) == ("python", "-m")
        done = _python(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    (tmp_path / "my_losses.py").rename(tmp_path / "away.txt")
    run, release = "runs/tanh_tv", "releases/tanh_tv"
    for words in (
        ("nrat_scale.evaluate", run, "--data", "test", "--attacks", "natural,pgd2"),
        ("nrat_scale.report", run),
        ("nrat_scale.release", run, "--to", release),
        ("nrat_scale.evaluate", release, "--data", "test", "--attacks", "natural"),
    ):
        done = _python(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    refused = _python(tmp_path, "nrat_scale.train", f"{release}/recipe.yaml", "run_dir=runs/again")
    assert refused.returncode == 2 and "is part of a release" in refused.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere", None, ["There is no module 'nowhere' (imports)", "working directory"]),
        (
            "broken_a",
            "import nothing_of_that_name",
            ["broken_a cannot be imported: No module named", "(broken_a.py, line 1)"],
        ),
        ("broken_b", "x = 1\n1 / 0", ["ZeroDivisionError: division by zero (broken_b.py, line 2)"]),
        ("broken_c", "def f(:", ["broken_c.py, line 1"]),
        ("a-b", None, ["imports has 'a-b'", "my_losses"]),
    ],
)
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, name, content, words) -> None:
    """Each is a sentence that names the key, and the line if there is one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if content is not None:
        (tmp_path / f"{name}.py").write_text(content)
    with pytest.raises(UserError) as caught:
        load_recipe(QUICK, [f"imports=[{name}]"])
    assert all(word in str(caught.value) for word in words), caught.value


def test_imports_keep_the_identity_of_recipes_without_them() -> None:
    """An empty list is the default; a module is part of the identity."""
    assert load_recipe(QUICK, ["imports=[]"]).identity == load_recipe(QUICK).identity
    assert load_recipe(QUICK, ["imports=json"]).imports == ["json"]
    assert load_recipe(QUICK, ["imports=json"]).identity != load_recipe(QUICK).identity


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, y: logits.sum(1), "TypeError"),
        (lambda logits, y, smoothing=0.0: logits.mean(), r"gives \[\] for 3 images"),
        (lambda logits, y, smoothing=0.0: logits.argmax(1).float(), "has no gradient"),
        (lambda logits, y, smoothing=0.0: logits[:, 99], "IndexError"),
        (lambda logits, y, smoothing=0.0: 3.0, "a float"),
    ],
)
def test_a_loss_of_another_shape_is_a_sentence(monkeypatch, loss, message) -> None:
    """It is tried before training: not a traceback in the first step, nor a mean over means."""
    monkeypatch.setitem(LOSSES, "mine", loss)
    with pytest.raises(UserError, match=rf"LOSSES\['mine'\] cannot be used: .*{message}.*called as f\(logits, y"):
        check_added(ObjectiveSpec("x", "at", "mine", inner="mine"), 10)
