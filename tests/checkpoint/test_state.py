"""The schema of state.json: other versions end in a sentence, old checkpoints open; optimizer state restores exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults.checkpoints import state_of
from nrat_scale.checkpoint.folder import named_checkpoint, newest_checkpoint
from nrat_scale.checkpoint.format import open_checkpoint, save_checkpoint
from nrat_scale.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from nrat_scale.core.errors import UserError
from tests.support.checkpoints import rewrite_state, save

OLD_RUN = Path(__file__).parents[1] / "golden/abbf399/run"


@pytest.mark.parametrize(
    ("key", "value"),
    [("epoch", None), ("epoch", -1), ("sums", None), ("sums", ["1"]), ("scaler", 3), ("best", {}), ("metrics_lines", True),
     ("validation_due", 0), ("guard", None), ("guard_sums", {}), ("sums", [[float("nan")]]), ("sums", [[True]]),
     ("best", {"step": 1, "epoch": 1, "attack": "pgd2", "natural": {}, "robust": {"correct": 1}}), ("scaler", {"scale": 2.0})],
)  # fmt: skip
def test_a_state_of_another_schema_is_not_resumed(tmp_path: Path, key: str, value: Any) -> None:
    """A missing key and one of another kind are named although every hash matches; the previous checkpoint is used."""
    save(tmp_path, 10)
    rewrite_state(save(tmp_path, 20), state_of(20) | {key: value})
    rewrite_state(save(tmp_path, 30), {k: v for k, v in state_of(30).items() if k != key})
    found, refused = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert [f"'{key}'" in sentence for sentence in refused] == [True, True]
    assert all(
        "another schema" in sentence and "the version of nrat_scale that wrote it" in sentence for sentence in refused
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("whole_epoch", 1), ("identity", 7), ("seed", "0"), ("seed", True), ("pointer", []), ("pointer", {"best": "yes"})],
)
def test_a_key_that_may_be_absent_is_checked(tmp_path: Path, key: str, value: Any) -> None:
    """First versions did not write every key; one that is there must be of its kind."""
    save(tmp_path, 10)
    rewrite_state(save(tmp_path, 20), state_of(20) | {key: value})
    found, refused = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 10
    assert f"'{key}' in its state is" in refused[0]


@pytest.mark.parametrize("schema", [2, -1, None, "2"])
def test_a_newer_schema_is_refused(tmp_path: Path, schema: Any) -> None:
    """A checkpoint of a later version ends in a sentence that says what and the way out, to resume and to evaluate."""
    checkpoint = save(tmp_path, 10)
    rewrite_state(checkpoint, state_of(10) | {"schema": schema})
    with pytest.raises(UserError, match=f"its schema is '{schema}', and this version reads up to 1") as caught:
        newest_checkpoint(tmp_path)
    assert "cannot be resumed" in str(caught.value) and "another run_dir" in str(caught.value)
    with pytest.raises(UserError, match="the version of nrat_scale that wrote it"):
        open_checkpoint(checkpoint.folder)


def test_checkpoints_of_the_first_version_open() -> None:
    """Checkpoints written by commit abbf399 verify, can be resumed, and are found by name."""
    found, refused = newest_checkpoint(OLD_RUN)
    assert found is not None
    assert (found.step, refused) == (12, [])
    assert (named_checkpoint(OLD_RUN, "last").step, named_checkpoint(OLD_RUN, "best").step) == (12, 8)
    for name in ("model", "ema", "optimizer"):
        assert found.tensors(name)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_continues_exactly(kind: type, tmp_path: Path) -> None:
    """Five steps equal three steps, a save, a load into a new optimizer and two more, bit for bit."""

    def run(steps: range, model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()

    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.01, **options)

    whole, optimizer = make()
    run(range(5), whole, optimizer)
    first, optimizer = make()
    run(range(3), first, optimizer)
    tensors = {"model": dict(first.state_dict()), "optimizer": optimizer_tensors(optimizer, first)}
    saved = open_checkpoint(save_checkpoint(tmp_path, tensors, {"step": 3, "epoch": 1}).folder)
    second, optimizer = make()
    second.load_state_dict(saved.tensors("model"))
    load_optimizer_tensors(optimizer, second, saved.tensors("optimizer"))
    run(range(3, 5), second, optimizer)
    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)
    with pytest.raises(UserError, match="does not fit"):
        load_optimizer_tensors(optimizer, second, {"weight/momentum_buffer": torch.zeros(2, 2)})
