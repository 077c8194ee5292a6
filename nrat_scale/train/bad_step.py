"""What to say, and to keep for a search, when a step was not finite."""

from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import Tensor

from nrat_scale.core.files import write_atomically
from nrat_scale.data.batches import Batch
from nrat_scale.train.nonfinite import Verdict
from nrat_scale.train.state import MicroBatch, TrainState
from nrat_scale.train.step import attacked, micro_batches

_NAMED_IDS = 10
_WHAT = {
    "attack": "the loss or gradient of the attack is not finite",
    "ball": "the adversarial images leave the ball around the natural ones, which only a bug can do",
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
}


def report_bad_step(state: TrainState, verdict: Verdict) -> str:
    """One message for all ranks about the first bad step. All ranks call it; those that it happened on write a file.

    RUN/bad-step-XXXXXXXX-rankN.safetensors: x, x_adv, y, ids, generated (whether an id is of the generated source) and the
    weights before that step, `model.NAME`. With the seed and the step of recipe.yaml that repeats it.
    """
    (batch,) = [batch for batch in state.recent if batch.step + 1 == verdict.step]
    # The averaged gradient is that of all ranks: it says nothing about where, if something else does.
    causes = [kind for kind in verdict.wrong if kind != "gradient"] or ["gradient"]
    places = gather_object([_examine(state, batch)] if set(causes) & set(verdict.here) else [])
    names = " and ".join(_WHAT[kind] for kind in causes)
    where = "; ".join(f"rank {p['rank']}, images {p['ids']}, all kept in {p['path']}" for p in places)
    return (
        f"Step {verdict.step} is stopped and changed nothing: {names} ({where}). Lower optim.lr (the paper uses 0.1, 0.05 or "
        "0.01), set train.max_grad_norm, or use precision bf16 or fp32."
    )


@torch.no_grad()
def _examine(state: TrainState, batch: Batch) -> dict[str, Any]:
    """Repeat this rank's part of the step, with the weights that it began with, and write the file."""
    parts = [attacked(state, part) if state.objective.attacks else part for part in micro_batches(state, batch)]
    bad = torch.cat([_not_finite(state, part) for part in parts])
    sources = ["generated" if generated else "real" for generated in batch.generated.tolist()]
    ids = [f"{source} {i}" for source, i in zip(sources, batch.ids.tolist(), strict=True)]
    named = [name for name, is_bad in zip(ids, bad.tolist(), strict=True) if is_bad] or ids
    more = f" and {len(named) - _NAMED_IDS} more" if len(named) > _NAMED_IDS else ""
    tensors = {
        "x": torch.cat([part.x for part in parts]),
        "y": torch.cat([part.y for part in parts]),
        "ids": batch.ids,
        "generated": batch.generated,
        **({"x_adv": torch.cat([p.x_adv for p in parts if p.x_adv is not None])} if state.objective.attacks else {}),
        **{f"model.{name}": value for name, value in state.base.state_dict().items()},
    }
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    path = state.run / f"bad-step-{batch.step + 1:08d}-rank{state.accelerator.process_index}.safetensors"
    write_atomically(path, save(plain, metadata={"format": "pt"}))
    return {"rank": state.accelerator.process_index, "ids": ", ".join(named[:_NAMED_IDS]) + more, "path": str(path)}


def _not_finite(state: TrainState, part: MicroBatch) -> Tensor:
    """bool [b]: images whose logits, natural or adversarial, or whose adversarial pixels are not finite."""
    images = [part.x] + ([part.x_adv] if part.x_adv is not None else [])
    finite = torch.ones(len(part.x), dtype=torch.bool, device=part.x.device)
    for image in images:
        finite &= image.flatten(1).isfinite().all(1) & state.twin.forward(image).isfinite().all(1)
    return ~finite
