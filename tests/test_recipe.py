"""Recipes: shipped ones have their published values, layers win in order, and every mistake is named."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nrat_scale import recipe as recipe_module
from nrat_scale.core.errors import UserError
from nrat_scale.recipe import RecipeSpec, difference, load_recipe, to_yaml

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK = RECIPES / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    """Every shipped recipe is valid, names itself, and survives being written as the run's recipe.yaml."""
    recipe = load_recipe(path)
    assert (recipe.name, recipe.run_dir) == (path.stem, f"runs/{path.stem}")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_generated_data_recipe() -> None:
    """The WRN-28-10 recipe has the values of DM_AT and of the paper's section 4.4."""
    recipe = load_recipe(RECIPES / "wrn28_10_gen1m.yaml")
    data, optim, objective = recipe.data, recipe.optim, recipe.objective
    assert (recipe.precision, recipe.model.name, recipe.train.epochs) == ("bf16", "wrn28_10_silu", 150)
    assert (data.batch_size, data.epoch_samples, data.generated.fraction) == (512, 50_000, 0.7)
    assert (data.real.noise.kind, data.real.noise.rate) == ("symmetric", 0.2)
    assert (data.validation.source, data.validation.size, data.validation.take) == ("generated", 1024, "stratified")
    assert (optim.name, optim.lr, optim.weight_decay, optim.nesterov) == ("sgd", 0.2, 5e-4, True)
    assert (optim.decay_norms, optim.schedule, optim.pct_start) == (False, "onecycle", 0.025)
    assert (recipe.ema.decay, recipe.ema.warmup_fraction) == (0.995, 0.025)
    assert (recipe.threat.eps, recipe.threat.step, recipe.threat.num_steps) == (8 / 255, 2 / 255, 10)
    assert (recipe.model.bn_momentum, recipe.model.bn_first_step) == (0.01, True)
    assert (objective.name, objective.smoothing, objective.smoothing_mode) == ("nrat", 0.1, "mixed")
    assert recipe.train.validation_attack == "cw40"


def _flat(path: Path) -> dict[str, object]:
    """Dotted keys and values of a resolved recipe, without its name and paths."""
    values = dataclasses.asdict(load_recipe(path))
    keys = {key: value for key, value in _dotted(values) if key not in ("name", "run_dir")}
    return {key: value for key, value in keys.items() if not key.endswith("prepare")}


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        yield from _dotted(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]


def _differences(one: str, other: str) -> dict[str, tuple[object, object]]:
    first, second = (_flat(RECIPES / f"{name}.yaml") for name in (one, other))
    return {key: (first[key], second[key]) for key in first if first[key] != second[key]}


@pytest.mark.parametrize("model", ["wrn28_10", "resnet18"])
def test_variants_differ_in_what_they_say(model: str) -> None:
    """The controlled twin differs in the objective alone, the published one in its attack too; the others in the labels."""
    base = f"{model}_gen1m"
    controlled, published = (_differences(base, f"{base}_dm_at{suffix}") for suffix in ("_controlled", ""))
    assert controlled["objective.name"] == ("nrat", "dm_at")
    outside = {key: value for key, value in controlled.items() if not key.startswith("objective.")}
    assert outside == {}
    assert {key: value for key, value in published.items() if not key.startswith("objective.")} == {
        "threat.init": ("normal", "uniform"),
        "threat.bn": ("eval", "batch"),
    }
    assert _differences(base, f"{base}_real_val") == {"data.validation.source": ("generated", "real")}
    assert load_recipe(RECIPES / f"{base}_real_val.yaml").data.validation.labels == "given"
    assert _differences(f"{base}_real_val", f"{base}_all_noisy") == {
        "data.generated.noise.kind": ("auto", "symmetric"),
        "data.generated.noise.rate": (0.0, 0.2),
        "data.generated.noise.seed": (0, 1),
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_headers_state_the_rates(path: Path) -> None:
    """Every recipe with noise says in its header how many labels of a batch are wrong."""
    data, header = load_recipe(path).data, path.read_text().partition("\nseed:")[0]
    rate = sum(data.noise_of(kind).rate * share for kind, share in data.shares.items())
    text = " ".join(header.replace("#", " ").split())
    assert re.search(rf"{100 * rate:.1f} % of a batch's|{100 * rate:.0f} % of a batch's", text), text
    assert f"recipes/{path.name}" in text


def test_nrat_has_its_authors_learning_rate() -> None:
    """README of TrustAI/NRAT: --lr 0.05 --beta 6.0 for ResNet-18 at noise 0.2."""
    recipe = load_recipe(RECIPES / "resnet18_cifar10.yaml")
    assert (recipe.optim.lr, recipe.objective.lam, recipe.data.real.noise.rate) == (0.05, 6.0, 0.2)


@pytest.mark.parametrize("model", ["wrn28_10", "resnet18"])
def test_recipes_to_compare_differ_in_the_objective_only(model: str) -> None:
    """The files of NRAT and DM_AT are equal but for the objective, which brings DM_AT's own attack settings."""
    nrat, dm_at = (OmegaConf.load(RECIPES / f"{model}_gen1m{suffix}.yaml") for suffix in ("", "_dm_at"))
    assert nrat.pop("objective") != dm_at.pop("objective")
    assert nrat == dm_at
    recipe = load_recipe(RECIPES / f"{model}_gen1m_dm_at.yaml")
    assert (recipe.threat.init, recipe.threat.bn, recipe.objective.lam) == ("uniform", "batch", 5.0)


def test_layers_win_in_order(tmp_path: Path) -> None:
    """Defaults < preset < recipe < overrides."""
    assert load_recipe(QUICK).threat.init == "normal"
    assert load_recipe(QUICK, ["objective.name=pgd_at"]).threat.init == "uniform"
    assert load_recipe(QUICK, ["objective.name=mart"]).objective.lam == 5.0
    path = tmp_path / "mine.yaml"
    path.write_text(QUICK.read_text().replace("  eps: 0.2", "  eps: 0.2\n  init: zero\n  bn: batch"))
    assert (load_recipe(path).threat.init, load_recipe(path).threat.bn) == ("zero", "batch")
    assert load_recipe(path, ["threat.init=normal01", "objective.lam=2"]).threat.init == "normal01"
    assert load_recipe(QUICK, ["threat.eps=8/255"]).threat.eps == 8 / 255


def test_identity_is_what_is_computed() -> None:
    """A run can be resumed in another place or with another length, but not with other settings."""
    same = ["run_dir=elsewhere", "resume=never", "train.max_steps=3", "data.resident=never", "data.real.prepare=x"]
    other = [
        "seed=1",
        "threat.eps=0.1",
        "optim.lr=0.02",
        "data.real.noise.rate=0.1",
        "train.epochs=31",
        "precision=bf16",
        "data.generated.noise={kind: symmetric, rate: 0.2}",
    ]
    identity = load_recipe(QUICK).identity
    assert load_recipe(QUICK, same).identity == identity
    assert all(load_recipe(QUICK, [override]).identity != identity for override in other)


def test_a_warm_start_is_another_recipe_and_its_default_is_not() -> None:
    """A key that was added later leaves the identity of stored runs alone, but the message names it if it differs."""
    none, warm = (load_recipe(QUICK, [f"objective.warm_start={value}"]) for value in (0, 0.5))
    assert none.identity == load_recipe(QUICK, ["objective.warm_start=0.0"]).identity != warm.identity
    assert difference(none, warm) == "objective.warm_start is 0.0 there and 0.5 here"
    assert difference(warm, none) == "objective.warm_start is 0.5 there and 0.0 here"


def test_our_recipes_prevent_a_collapse_and_the_papers_are_the_papers() -> None:
    """Per-step rates, a warm start and a rewind within one window of 50 steps, where no published numbers are repeated."""
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(path)
        ours = path.stem in ("quickstart", "fashion_mnist")
        assert recipe.objective.warm_start == (0.3 if ours else 0.0)
        assert recipe.guard.action == ("rewind" if ours else "warn")
        if ours:
            assert (recipe.optim.per, recipe.guard.window, recipe.guard.patience) == ("step", 50, 1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.warm_start=1.5", ["objective.warm_start is 1.5", "in [0, 1]"]),
        ("objective.warm_start=-0.1", ["objective.warm_start is -0.1"]),
        ("objective.warm_start=nan", ["objective.warm_start is nan"]),
        ("objective.nmae=x", ["objective.nmae", "Did you mean 'name'"]),
        ("data.real.noise.rte=0.1", ["data.real.noise.rte", "'rate'"]),
        ("data.generated=null", ["data.generated.shards=null"]),
        ("objective.family=at", ["unknown key 'objective.family'", "smoothing_mode"]),
        ("objective.name=nart", ["'nart'", "'nrat'"]),
        ("threat.eps=8", ["threat.eps is 8", "8/255"]),
        ("threat.eps=8/0", ["threat.eps", "'8/0' is not a number", "8/255"]),
        ("threat.bn=evil", ["threat.bn", "'eval'"]),
        ("threat=3", ["threat is '3'; it must be a mapping of keys"]),
        ("train.epochs=many", ["train.epochs", "many"]),
        ("train.epochs=0", ["train.epochs is 0"]),
        ("train.validation_attack=aa", ["train.validation_attack", "pgd10"]),
        ("data.batch_size=0", ["data.batch_size is 0"]),
        ("data.generated.fraction=1.5", ["data.generated.fraction is 1.5"]),
        ("data.generated.noise.kind=symetric", ["data.generated.noise.kind is 'symetric'", "'symmetric'"]),
        ("data.generated.noise.rate=0.2", ["data.generated.noise.rate is 0.2", "Name a kind"]),
        ("data.generated.noise.rte=0.2", ["data.generated.noise.rte", "'rate'"]),
        ("data.validation.take=frist", ["data.validation.take", "frist"]),
        ("precision=fp8", ["precision is 'fp8'", "bf16"]),
        ("resume=maybe", ["resume is 'maybe'"]),
        ("optim.lr=-1", ["optim.lr is -1"]),
        ("ema.decay=1", ["ema.decay", "[0, 1)"]),
        ("awp.gamma=-1", ["awp.gamma", "[0, 1)"]),
        ("release.every_epochs=0", ["release.every_epochs is 0"]),
        ("objective.smoothing=0.1", ["smoothing_mode is 'off'", "mixed"]),
        ("seed=${nowhere}", ["nowhere"]),
        ("seed=[1", ["cannot be read"]),
        ("epochs 3", ["not an override", "key=value"]),
    ],
)
def test_mistakes_are_named(override: str, words: list[str]) -> None:
    """A wrong key or value raises one short message that names it and the way out."""
    with pytest.raises(UserError) as caught:
        load_recipe(QUICK, [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "content", ["", "- a\n- b\n", "a: [1\n", "\t: x", "threat: {eps: 0.1, step: 0.1, num_steps: 1}\n"]
)
def test_a_broken_file_is_refused(content: str, tmp_path: Path) -> None:
    """The message for an empty, incomplete or invalid file names the file."""
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="broken"):
        load_recipe(path)


def test_mart_refuses_cutmix() -> None:
    """A contradiction between two specs names both."""
    with pytest.raises(UserError, match=r"data\.augment\.cutmix mixes labels, but MART needs hard labels"):
        load_recipe(QUICK, ["objective.name=mart", "data.augment.cutmix=0.5"])


STORED = Path(__file__).parent / "golden" / "abbf399" / "run"


def test_a_stored_recipe_loads_with_its_identity() -> None:
    """The run that abbf399 wrote, with keys that are retired since, can be resumed: its identity is unchanged."""
    state = json.loads((STORED / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert load_recipe(STORED / "recipe.yaml").identity == state["identity"]


def test_a_difference_in_an_added_key_is_named() -> None:
    """A run without noise of generated labels is not resumed with it, and the message has both values."""
    noisy = load_recipe(QUICK, ["data.generated.noise={kind: symmetric, rate: 0.2}"])
    assert difference(load_recipe(QUICK), noisy) == "data.generated.noise.kind is none there and symmetric here"
    assert difference(noisy, load_recipe(QUICK)) == "data.generated.noise.kind is symmetric there and none here"


def test_retired_keys_are_dropped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A retired key is ignored: silently with its old default, else with one sentence; unknown keys still fail."""
    monkeypatch.setattr(recipe_module, "RETIRED", {"data.threads": (0, "one thread suffices"), "train.turbo": (1, "x")})
    usual = load_recipe(QUICK)
    assert load_recipe(QUICK, ["data.threads=0", "train.turbo=1"]) == usual
    assert capsys.readouterr().err == ""
    assert load_recipe(QUICK, ["data.threads=4"]) == usual
    assert capsys.readouterr().err == f"warning: {QUICK}: data.threads is ignored: one thread suffices.\n"
    with pytest.raises(UserError, match=r"unknown key 'data\.thread'"):
        load_recipe(QUICK, ["data.thread=4"])


def test_missing_recipe(tmp_path: Path) -> None:
    """The message for a missing file, or for a folder, names the path."""
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(UserError, match=path.name):
            load_recipe(path)


def test_specs_are_frozen() -> None:
    """A recipe cannot change after its check."""
    recipe: RecipeSpec = load_recipe(QUICK)
    with pytest.raises(AttributeError):
        recipe.seed = 3  # type: ignore[misc]


def test_off_is_a_smoothing_mode() -> None:
    """YAML 1.1 reads the word `off` as False; as a smoothing mode it keeps its meaning."""
    assert load_recipe(QUICK, ["objective.smoothing_mode=off"]).objective.smoothing_mode == "off"
