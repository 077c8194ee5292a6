"""Which weights of a file are loaded: the only ones, or those that the caller names; never one of several without a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nrat_scale.core.errors import UserError
from nrat_scale.evaluate.__main__ import main
from nrat_scale.evaluate.targets import TargetOptions, find_targets
from nrat_scale.loading.load import load
from nrat_scale.models import create
from tests.support.small_releases import ARGUMENTS, same_logits

OPTIONS: dict[str, Any] = {"arch": "cnn4", "mean": [0.3], "std": [0.2], "width": 4, "hidden": 8}
State = dict[str, Tensor]


@pytest.fixture
def average() -> nn.Module:
    """Other weights than `model`."""
    torch.manual_seed(1)
    return create("cnn4", ARGUMENTS).eval()


def _under(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _pair(raw: str, averaged: str) -> tuple[Callable[[State, State], Any], str, str]:
    return lambda r, a: {raw: r, "epoch": 3, averaged: a, "optimizer": {"momentum": dict(r)}}, raw, averaged


PAIRS: dict[str, tuple[Callable[[State, State], Any], str, str]] = {
    # name: (file's content from raw and averaged weights, key of the raw ones, key of the averaged ones)
    **{
        f"{raw} and {averaged}": _pair(raw, averaged)
        for raw, averaged in (
            ("state_dict", "state_dict_ema"),
            ("state_dict", "ema"),
            ("model", "model_ema"),
            ("model", "ema"),
            ("net", "ema_state_dict"),
            ("model_state_dict", "model_state_dict_ema"),
            ("model", "averaged"),
            ("unaveraged_model_state_dict", "model_state_dict"),
            ("state_dict", "swa_state_dict"),
            ("model", "swa_model"),
            ("student", "teacher"),
            ("params", "params_ema"),
            ("net", "shadow"),
            ("current_model_state", "state_dict"),
            ("generator_running_once", "nobody's name"),
        )
    },
    "nested averages": (
        lambda r, a: {"model": _under("module", r), "ema": {"decay": 0.9, "shadow": _under("module", a)}},
        "model",
        "ema.shadow",
    ),
    "an average within the container": (lambda r, a: {"model": {**r, "ema": a}}, "model", "model.ema"),
    "a list of models": (lambda r, a: {"models": [r, a]}, "models.0", "models.1"),
    "Lightning, two modules": (
        lambda r, a: {"state_dict": {**_under("model", r), **_under("ema_model.module", a)}, "hyper_parameters": {}},
        "state_dict.model",
        "state_dict.ema_model",
    ),
    "Lightning, a callback": (
        lambda r, a: {"state_dict": _under("net", r), "callbacks": {"EMA": {"ema_state": _under("net", a)}}},
        "state_dict",
        "callbacks.EMA.ema_state",
    ),
    "one dictionary, prefixes": (
        lambda r, a: {**_under("student.backbone", r), **_under("teacher.backbone", a)},
        "student",
        "teacher",
    ),
    "one dictionary, with and without module": (lambda r, a: {**r, **_under("module", a)}, ".", "module"),
    "one dictionary, a bare model and its average": (lambda r, a: {**r, **_under("ema", a)}, ".", "ema"),
    "AveragedModel beside its model": (
        lambda r, a: {**_under("model", r), "swa.n_averaged": torch.tensor(3), **_under("swa.module", a)},
        "model",
        "swa",
    ),
    "suffixes": (lambda r, a: {**r, **{f"{name}_ema": value for name, value in a.items()}}, ".", "ema"),
    "names with ema_": (lambda r, a: {**r, **{f"ema_{name}": value for name, value in a.items()}}, ".", "ema"),
    "names without dots": (
        lambda r, a: {**_under("model", r), **{f"model_ema.{name.replace('.', '')}": v for name, v in a.items()}},
        "model",
        "model_ema",
    ),
    "a list without names": (
        lambda r, a: {"model": r, "ema": {"decay": 0.9, "num_updates": 4, "shadow_params": list(a.values())}},
        "model",
        "ema.shadow_params",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_sets_of_weights_are_never_chosen_silently(
    model: nn.Module, average: nn.Module, tmp_path: Path, name: str
) -> None:
    """The error names both keys and the option; each key loads its own weights."""
    content, raw, averaged = PAIRS[name]
    path = tmp_path / "w.pt"
    torch.save(content(dict(model.state_dict()), dict(average.state_dict())), path)
    with pytest.raises(UserError, match=r"holds 2 sets of weights.*weights_key=.*--weights-key") as caught:
        load(path, **OPTIONS)
    assert f"'{raw}'" in str(caught.value) or f'"{raw}"' in str(caught.value)
    assert f"'{averaged}'" in str(caught.value) or f'"{averaged}"' in str(caught.value)
    assert same_logits(load(path, weights_key=raw, **OPTIONS), model)
    assert same_logits(load(path, weights_key=averaged, **OPTIONS), average)


def test_two_prefixes_in_a_safetensors_file(model: nn.Module, average: nn.Module, tmp_path: Path) -> None:
    """The same for the other format, with a normalisation of each set's own."""
    state = {
        f"{name}.1.{key}": value
        for name, m in (("raw", model), ("ema", average))
        for key, value in m.state_dict().items()
    }
    state |= {"raw.0.mean": torch.tensor([0.3]), "raw.0.std": torch.tensor([0.2]), "ema.0.mean": torch.tensor([0.7])}
    save_file(state, tmp_path / "w.safetensors")
    options = {"arch": "cnn4", "width": 4, "hidden": 8}
    with pytest.raises(UserError, match="holds 2 sets of weights: 'ema', 'raw'"):
        load(tmp_path / "w.safetensors", **options)
    assert same_logits(load(tmp_path / "w.safetensors", weights_key="raw", **options), model)
    assert load(tmp_path / "w.safetensors", weights_key="ema", **options).mean.item() == pytest.approx(0.7)


def test_an_average_of_the_parameters_alone_counts(tmp_path: Path) -> None:
    """It lacks BatchNorm's buffers: still two sets, and choosing it names what is missing."""
    net = create("resnet18_cifar", {"num_classes": 3})
    shadow = {name: parameter.detach() for name, parameter in net.named_parameters()}
    for average in (shadow, list(shadow.values())):
        torch.save({"state_dict": net.state_dict(), "ema": {"shadow": average}}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"holds 2 sets of weights: 'state_dict', 'ema\.shadow'"):
            load(tmp_path / "w.pt", arch="resnet18_cifar")
        with pytest.raises(UserError, match=r"'bn1\.running_mean' is missing"):
            load(tmp_path / "w.pt", arch="resnet18_cifar", weights_key="ema")
        assert load(tmp_path / "w.pt", arch="resnet18_cifar", weights_key="state_dict").num_classes == 3


@pytest.mark.parametrize(
    ("key", "inside"),
    [
        ("optimizer", "ema"),
        ("ema_optimizer", ""),
        ("opt", ""),
        ("optimizer_states", "averaged_model"),
        ("sched", "swa"),
    ],
)
def test_an_average_under_an_optimizers_key_is_found(
    model: nn.Module, average: nn.Module, tmp_path: Path, key: str, inside: str
) -> None:
    """A second set under a key that is named like an optimizer's is named, and --weights-key loads either."""
    averaged = dict(average.state_dict())
    torch.save({"model": dict(model.state_dict()), key: {inside: averaged} if inside else averaged}, tmp_path / "w.pt")
    named = f"{key}.{inside}" if inside else key
    with pytest.raises(UserError, match=rf"holds 2 sets of weights: 'model', '{named}'"):
        load(tmp_path / "w.pt", **OPTIONS)
    assert same_logits(load(tmp_path / "w.pt", weights_key="model", **OPTIONS), model)
    assert same_logits(load(tmp_path / "w.pt", weights_key=named, **OPTIONS), average)


@pytest.mark.parametrize("where", ["ema", "optimizer"])
def test_a_few_averaged_tensors_are_named(model: nn.Module, average: nn.Module, tmp_path: Path, where: str) -> None:
    """An average of the last layer alone is no set; it is named, and the raw weights need --weights-key."""
    name, tensor = list(average.state_dict().items())[-1]
    few = {name: tensor} if where == "ema" else {"ema": {name: tensor}}
    torch.save({"model": dict(model.state_dict()), where: few}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"averages of a few of them: '{where}.*--weights-key"):
        load(tmp_path / "w.pt", **OPTIONS)
    assert same_logits(load(tmp_path / "w.pt", weights_key="model", **OPTIONS), model)
    torch.save({**dict(model.state_dict()), where: few}, tmp_path / "flat.pt")
    with pytest.raises(UserError, match=r"averages of a few of them: .*weights_key='\.'"):
        load(tmp_path / "flat.pt", **OPTIONS)
    assert same_logits(load(tmp_path / "flat.pt", weights_key=".", **OPTIONS), model)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.ASGD, torch.optim.RMSprop])
def test_an_optimizers_own_tensors_are_no_weights(tmp_path: Path, kind: Any) -> None:
    """An ordinary checkpoint, with the state of an optimizer by number or by name, loads without a key."""
    net = create("cnn4", ARGUMENTS)
    optimizer = kind(net.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    by_number = optimizer.state_dict()
    names = [name for name, _ in net.named_parameters()]
    slots = [name for name, value in by_number["state"][0].items() if isinstance(value, Tensor) and value.ndim]
    by_name = {names[number]: state for number, state in by_number["state"].items()}
    by_slot = {slot: {names[number]: state[slot] for number, state in by_number["state"].items()} for slot in slots}
    masters = {"fp32_from_fp16": [[p.detach() for p in net.parameters()]]}
    for state in (by_number, {"state": by_name}, masters, {"state": by_slot}):
        torch.save({"model": net.state_dict(), "optimizer": state, "epoch": 3}, tmp_path / "w.pt")
        assert same_logits(load(tmp_path / "w.pt", **OPTIONS), net.eval())


def test_a_key_that_fits_nothing_or_too_much(model: nn.Module, average: nn.Module, tmp_path: Path) -> None:
    """The error names the keys; a part of a name is no key."""
    state, other = dict(model.state_dict()), dict(average.state_dict())
    torch.save({"a": {"x": state, "y": other}, "ab": state}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds 3 sets of weights: 'a\.x', 'a\.y', 'ab'"):
        load(tmp_path / "w.pt", **OPTIONS)
    with pytest.raises(UserError, match=r"holds 2 sets of weights: 'a\.x', 'a\.y'"):
        load(tmp_path / "w.pt", weights_key="a", **OPTIONS)
    with pytest.raises(UserError, match=r"no weights under 'em'; it has those of 'a\.x', 'a\.y', 'ab'"):
        load(tmp_path / "w.pt", weights_key="em", **OPTIONS)
    assert same_logits(load(tmp_path / "w.pt", weights_key="a.y", **OPTIONS), average)
    torch.save(state, tmp_path / "w.pt")
    assert same_logits(load(tmp_path / "w.pt", weights_key=".", **OPTIONS), model)
    with pytest.raises(UserError, match="weights_key and other arguments describe a weight file"):
        load(tmp_path, weights_key="ema")


def test_another_model_beside_the_weights(model: nn.Module, tmp_path: Path) -> None:
    """A teacher of another architecture in one dictionary is no part of the model; the key leaves it out."""
    state = {**_under("student", dict(model.state_dict())), "teacher.conv.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"under 'student', and beside them 'teacher\.conv\.weight'.*--weights-key"):
        load(tmp_path / "w.pt", **OPTIONS)
    assert same_logits(load(tmp_path / "w.pt", weights_key="student", **OPTIONS), model)
    torch.save({**state, "student.extra": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="'extra' is not part of it"):
        load(tmp_path / "w.pt", weights_key="student", **OPTIONS)


def test_the_option_of_evaluation(
    model: nn.Module, average: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--weights-key` picks the weights, and results record it."""
    net = create("cnn4", {"num_classes": 10})
    other = {name: value + 1 for name, value in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "ema": other}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="--weights-key"):
        find_targets(str(tmp_path / "w.pt"), TargetOptions(arch="cnn4"))
    (target,) = find_targets(str(tmp_path / "w.pt"), TargetOptions(arch="cnn4", weights_key="ema")).targets
    assert target.identity["weights_key"] == "ema"
    assert torch.equal(target.model.state_dict()["classifier.bias"], other["classifier.bias"])
    with pytest.raises(UserError, match="--weights-key describe a weight file"):
        TargetOptions(weights_key="ema")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--weights-key" in capsys.readouterr().out


# ---- wrappers -------------------------------------------------------------------------------------------------------


def _compiled(net: nn.Module) -> nn.Module:
    """As torch.compile gives it; of a compiled model it gives a function."""
    return torch._dynamo.OptimizedModule(net, torch._dynamo.optimize("eager"))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": _compiled,
    "average": AveragedModel,
    "parallel": nn.DataParallel,
    "sequential": lambda net: nn.Sequential(nn.Identity(), net),
}


@pytest.mark.parametrize("inner", WRAPPERS)
@pytest.mark.parametrize("middle", [*WRAPPERS, None])
@pytest.mark.parametrize("outer", [*WRAPPERS, None])
def test_wrapped_models_load_in_any_nesting(
    model: nn.Module, tmp_path: Path, outer: str | None, middle: str | None, inner: str
) -> None:
    """torch.compile, AveragedModel, DataParallel (as DistributedDataParallel) and Sequential, three deep, in any order."""
    wrapped = WRAPPERS[inner](model)
    for name in (middle, outer):
        wrapped = wrapped if name is None else WRAPPERS[name](wrapped)
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "w.pt")
    assert same_logits(load(tmp_path / "w.pt", **OPTIONS), model)


def test_a_compiled_part_of_a_model_loads(tmp_path: Path) -> None:
    """Regional compilation puts its prefix into the middle of names; two tensors of one name are refused."""
    net = create("resnet18_cifar", {"num_classes": 3}).eval()
    state = dict(net.state_dict())
    net.layer1, net.bn1 = _compiled(net.layer1), nn.DataParallel(net.bn1)
    assert "layer1._orig_mod.0.conv1.weight" in net.state_dict()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", arch="resnet18_cifar").state_dict()
    assert list(loaded) == list(state) and all(torch.equal(loaded[name], value) for name, value in state.items())
    torch.save({**net.state_dict(), "layer1.0.conv1.weight": state["layer1.0.conv1.weight"]}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="one tensor twice"):
        load(tmp_path / "w.pt", arch="resnet18_cifar")


def test_old_batchnorm_loads(tmp_path: Path) -> None:
    """torch before 0.4.1 counted no batches. If only one layer lacks the count, the file is damaged."""
    net = create("resnet18_cifar", {"num_classes": 3}).eval()
    state = {f"module.{name}": value for name, value in net.state_dict().items() if not name.endswith("_tracked")}
    torch.save(state, tmp_path / "w.pt")
    assert same_logits(load(tmp_path / "w.pt", arch="resnet18_cifar"), net, (2, 3, 8, 8))
    torch.save({**state, "module.bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"'layer1\.0\.bn1\.num_batches_tracked' is missing"):
        load(tmp_path / "w.pt", arch="resnet18_cifar")


def test_types_that_would_lose_numbers_are_refused(tmp_path: Path) -> None:
    """Floating-point types are converted; quantised weights are not weights. A batch count may have any type."""
    net = create("resnet18_cifar", {"num_classes": 3}).eval()
    state = dict(net.state_dict())
    counts = {name: value.to(torch.int32) for name, value in state.items() if name.endswith("_tracked")}
    torch.save({**state, **counts, "bn1.num_batches_tracked": torch.tensor(1.0)}, tmp_path / "w.pt")
    assert same_logits(load(tmp_path / "w.pt", arch="resnet18_cifar"), net, (2, 3, 8, 8))
    for kind, shown in ((torch.int8, "int8"), (torch.int64, "I64"), (torch.complex64, "complex64")):
        torch.save({**state, "conv1.weight": state["conv1.weight"].to(kind)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=rf"'conv1\.weight' has type '{shown}' instead of torch\.float32"):
            load(tmp_path / "w.pt", arch="resnet18_cifar")


def test_nested_containers_cost_no_time(model: nn.Module, tmp_path: Path) -> None:
    """Deep settings and a dictionary that contains itself do no harm; one that stands for millions is refused."""
    deep: Any = "value"
    for _ in range(50):
        deep = {"key": deep}
    content: dict[str, Any] = {"model": dict(model.state_dict()), "config": deep, "losses": [0.5] * 1000}
    content["again"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds 7 sets of weights: 'model', 'again\.model', .* and 1 more"):
        load(tmp_path / "w.pt", **OPTIONS)
    assert same_logits(load(tmp_path / "w.pt", weights_key="model", **OPTIONS), model)
    many: Any = {"x": torch.zeros(2)}
    for _ in range(7):
        many = {str(number): many for number in range(10)}
    torch.save(many, tmp_path / "w.pt")
    with pytest.raises(UserError, match="too many nested entries"):
        load(tmp_path / "w.pt", **OPTIONS)
