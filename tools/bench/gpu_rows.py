"""The rows of `step --gpu`: models and batches, and how each row sets up the step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    model: str
    batch: int
    kwargs: str = "{}"  # of the model, as in a recipe

    @property
    def overrides(self) -> list[str]:
        """Of the benchmark's recipe."""
        return [f"model.kwargs={self.kwargs}"] if self.kwargs != "{}" else []


@dataclass(frozen=True)
class Contender:
    """A row: how the step is set up."""

    name: str
    textbook: bool = False
    autocast: bool = False  # of the textbook
    channels_last: bool = True
    fold: bool = True
    compute_weights: bool = True  # the attack's weights are kept in the compute type
    padding_copy: bool = False  # WideBlock pads with a copy, as in public code
    flip_cudnn_benchmark: bool = False
    compile: bool = False
    graphs: bool = False
    graphed_update: bool = True  # of `graphs`: optimizer, EMA and checks are a graph, too
    seconds: float = 8.0  # that it may take; it is skipped if fewer are left


CASES = (Case("wrn28_10_silu", 512), Case("resnet18_cifar", 128), Case("resnet18_cifar", 512))
# Groups of rows, measured one after the other for all cases.
CONTENDERS = (
    (
        Contender("textbook, fp32", textbook=True, channels_last=False),
        Contender("textbook, bf16 autocast", textbook=True, autocast=True, channels_last=False),
        Contender("textbook, bf16 autocast, channels_last", textbook=True, autocast=True),
        Contender("ours, eager"),
        Contender("ours, graphs", graphs=True, seconds=12),
        Contender("ours, graphs, update launched", graphs=True, graphed_update=False, seconds=12),
    ),
    (
        Contender("ours, eager, without channels_last", channels_last=False),
        Contender("ours, eager, BatchNorm not folded", fold=False),
        Contender("ours, eager, weights cast in every forward", compute_weights=False),
        Contender("ours, eager, padding copied", padding_copy=True),
        Contender("ours, eager, cudnn.benchmark", flip_cudnn_benchmark=True),
        Contender(
            "ours, eager, none of these", channels_last=False, fold=False, compute_weights=False, padding_copy=True
        ),
    ),
    (
        Contender("ours, compiled, graphs", compile=True, graphs=True, seconds=60),
        Contender("ours, compiled", compile=True, seconds=40),
    ),
)
