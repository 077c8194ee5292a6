"""Graphed calls: captured once, compared, replayed on the present inputs and weights."""

import pytest
import torch
from torch import nn

from nrat_scale.core.errors import UserError
from nrat_scale.core.graphs import GraphedCall, relative_difference
from tests.support.captured import capture_operations


def close(plain, graphed):
    return "" if all(relative_difference(*pair) < 1e-6 for pair in zip(plain, graphed, strict=True)) else "it differs"


def graphed(function, weights, said, **options):
    options = {"close": close, "enabled": True, "capture": capture_operations, "say": said.append} | options
    return GraphedCall("step", function, reads=lambda: weights, **options)


def test_replays_follow_inputs_and_weights():
    """Results are those of plain calls, also after the weights changed in place, and keep their values afterwards."""
    model, said = nn.Linear(3, 2), []

    def gradient(x):
        x = x.detach().requires_grad_()
        return (torch.autograd.grad(model(x).square().sum(), x)[0], model(x).detach())

    call = graphed(gradient, list(model.parameters()), said)
    kept = []
    for _ in range(6):
        x = torch.randn(4, 3)
        kept.append((call(x), gradient(x)))
        with torch.no_grad():
            model.weight.add_(1)
    for ours, theirs in kept:
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert call.num_captures == 1 and not said


def test_moved_weights_and_new_keys_are_captured_again():
    """A number is frozen by the capture, so it belongs to the key; a weight that moved is found by its address."""
    model, said, factor = nn.Linear(3, 2), [], [1.0]
    call = graphed(lambda x: (model(x).detach() * factor[0],), [model.weight], said)
    x = torch.ones(4, 3)
    for factor[0] in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0):
        assert torch.equal(call(x, key=factor[0])[0], model(x) * factor[0])
    assert call.num_captures == 2
    model.weight.data = model.weight.data.clone() + 1
    call = graphed(lambda x: (model(x).detach(),), [model.weight], said)
    for _ in range(4):
        call(x)
    before = call.num_captures
    kept = model.weight.data
    model.weight.data = kept.clone() + 1
    assert torch.equal(call(x)[0], model(x)) and call.num_captures == before + 1
    call(torch.ones(5, 3))
    assert torch.equal(call(torch.ones(5, 3))[0], model(torch.ones(5, 3)))


def test_what_a_capture_changes_is_restored():
    """The calls of a capture leave no trace: a counter counts the calls."""
    total, said = torch.zeros(()), []

    def count(x):
        total.add_(x.sum())
        return (total * 2,)

    call = graphed(count, [total], said, state=lambda: [total])
    for number in range(1, 7):
        assert float(call(torch.ones(2))[0]) == 4 * number
    assert float(total) == 12


@pytest.mark.parametrize("required", [False, True])
def test_a_capture_that_fails_runs_eager(required):
    """A host decision that depends on a value cannot be captured: eager with one sentence, or an error if asked for."""
    said = []
    call = graphed(lambda x: (x if x.sum().item() > 0 else -x,), [], said, required=required)
    x = -torch.ones(2)
    for _ in range(2):
        call(x)
    if required:
        with pytest.raises(UserError, match=r"The step cannot run as a CUDA graph .* Use train\.graphs=auto"):
            call(x)
        return
    for _ in range(3):
        assert torch.equal(call(x)[0], -x)
    assert len(said) == 1 and said[0].endswith("it runs eager.") and not call.enabled


def test_a_graph_that_differs_is_not_used():
    """A function that keeps a count on the host would be frozen; the comparison notices."""
    count, said = [0.0], []

    def impure(x):
        count[0] += 1
        return (x + count[0],)

    call = graphed(impure, [], said)
    values = [float(call(torch.zeros(()))[0]) for _ in range(5)]
    assert values == sorted(values) and len(set(values)) == 5
    assert len(said) == 1 and "it differs" in said[0]


def test_gradients_accumulate_in_a_replay():
    """A whole forward and backward pass: `.grad` of the weights is added to in place, as by plain calls."""
    models, said = (
        [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)],
        [],
    )
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def step(model):
        def run(x):
            loss = model(x).square().mean()
            loss.backward()
            return (loss.detach(),)

        return run

    def state():
        return [*models[0].buffers(), *(p.grad for p in models[0].parameters())]

    call = graphed(step(models[0]), list(models[0].parameters()), said, state=state)
    for number in range(6):
        x = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(number))
        losses = call(x), step(models[1])(x)
        torch.testing.assert_close(*losses)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(*(list(model.buffers()) for model in models))
    assert call.num_captures == 1 and not said


def test_a_number_that_changes_now_and_then_is_captured_for_ever():
    """As a learning rate does each epoch: more captures than are kept, each replayed; a number of one call is not captured."""
    model, said, factor = nn.Linear(3, 2), [], [0.0]
    call = graphed(lambda x: (model(x).detach() * factor[0],), list(model.parameters()), said)
    x = torch.ones(4, 3)
    for number in range(70):
        for _ in range(6):
            factor[0] = float(number)
            assert torch.equal(call(x, key=number)[0], model(x) * number)
    assert call.enabled and not said and call.num_captures == 70 and call.num_replays == 70 * 4
    assert len(call._captured) == len(call._calls) == 16
    for number in range(100, 200):
        call(x, key=number)
    assert call.num_captures == 70


def test_weights_that_always_move_are_given_up():
    """A capture for each call costs more than it gives; the part says so and goes on without."""
    model, said = nn.Linear(3, 2), []
    call = graphed(lambda x: (model(x).detach(),), [model.weight], said)
    kept = []
    for _ in range(70):
        kept.append(model.weight.data)
        model.weight.data = model.weight.data.clone()
        assert torch.equal(call(torch.ones(4, 3))[0], model(torch.ones(4, 3)))
    assert not call.enabled and said == [
        "The step cannot run as a CUDA graph (it was captured 64 times, because it changes too often); it runs eager."
    ]
