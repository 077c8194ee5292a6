"""What a recipe costs, in forward passes of the model: one formula for training's display, the benchmark and its tables."""

from nrat_scale.losses import DIVERGENCES
from nrat_scale.recipe import RecipeSpec

FORWARD = 1.0
BACKWARD = 1.0  # to the images or to the weights, each; a training backward does both, so forward and backward cost 3
TRAINED = FORWARD + 2 * BACKWARD
ATTACKED = FORWARD + BACKWARD  # one attack step: the weights are frozen


def forward_equivalents(recipe: RecipeSpec, epoch: int | None = None, *, reuses_natural: bool = False) -> float:
    """The cost of a training step, in forward passes for each image of the batch.

    For example 27 for TRADES and NRAT with 10 steps: 2 x 10 and the natural logits for the attack, 3 x 2 for training.
    Validation is not counted.

    Args:
        recipe: what is trained.
        epoch: of this epoch, counted from 0; by default the mean over all epochs, which differ if AWP begins later or if
            `threat.schedule` has phases.
        reuses_natural: the natural training forward also serves the attack, as in DM_AT in float32.
    """
    objective = recipe.objective
    training = TRAINED * (2 if objective.family in ("trades", "mart") else 1)
    training *= 1 + _perturbed_share(recipe, epoch)
    training += FORWARD * _refined_share(recipe, epoch)
    if objective.family == "natural":
        return training
    needs_natural = objective.inner in DIVERGENCES and not reuses_natural
    attack = ATTACKED * _attack_steps(recipe, epoch) + FORWARD * needs_natural
    return attack + training


def _attack_steps(recipe: RecipeSpec, epoch: int | None) -> float:
    """Gradient steps of the attack, mean over the phases of one epoch, or of training.

    N-FGSM is one step; a start per class costs nothing, because it comes from the gradient of a step that is made anyway.
    """
    epochs = recipe.train.epochs
    begin, end = (0.0, 1.0) if epoch is None else (epoch / epochs, (epoch + 1) / epochs)
    total, before = 0.0, 0.0
    for until, attack in recipe.threat.phases:
        total += attack.num_steps * max(0.0, min(until, end) - max(before, begin))
        before = until
    return total / (end - begin)


def _perturbed_share(recipe: RecipeSpec, epoch: int | None) -> float:
    """The fraction of steps in which AWP repeats the training passes: of one epoch, or of all of them."""
    if not recipe.awp.gamma:
        return 0.0
    first, epochs = recipe.awp.warmup_epochs, recipe.train.epochs
    return max(0.0, 1 - first / epochs) if epoch is None else float(epoch >= first)


def _refined_share(recipe: RecipeSpec, epoch: int | None) -> float:
    """The fraction of steps with the one forward more of ADR's teacher, or of the predictions that TE and SGLR remember."""
    refine, epochs = recipe.objective.refine, recipe.train.epochs
    counted = range(epochs) if epoch is None else (epoch,)
    if refine.kind == "scores":  # of the training forward
        return 0.0
    needed = [refine.kind == "adr" or refine.starts_by((number + 1) / epochs) for number in counted]
    return sum(needed) / len(needed)
