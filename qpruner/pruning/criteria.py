"""How much a unit matters: element scores, their sum over a unit, and what a unit's coupled weights make together.

With w a weight, g the gradient of the calibration loss L = mean over N sequences of their mean loss, and g_n that of
sequence n alone, removing a weight changes the loss by about -w g + w^2 H / 2 (Taylor), with the Fisher information
F = mean of g_n^2 in place of the Hessian H. LLM-Pruner (arXiv 2305.11627) scores a weight or a whole unit by it:

    vectorize      | sum over the unit of w g |         the derivative of L in a gate on the unit
    param_first    sum of | w g |
    param_second   sum of w^2 F
    param_mix      sum of | w g - w^2 F / 2 |

and without gradients

    magnitude_l1, magnitude_l2   L1 or L2 norm of the unit's weights
    wanda                        sum of |w| |x|, x the inputs that w meets (arXiv 2306.11695, summed over a unit)
    random                       uniform in [0, 1)

What these score is each of a unit's coupled weights, and `aggregate` puts them together. Others look at the columns of
o or down alone, through which all that a unit does reaches the hidden states. With G_n the derivative of sequence n's
mean loss in a gate on what reaches these columns:

    fisher           mean of G_n^2 (the Fisher information of masks, Kwon et al., arXiv 2204.09656)
    flap             mean of Var(x_j) ||W_:j||^2 over the unit's columns j, standardised (arXiv 2312.11983)
    reconstruction   geometric mean of fisher and param_first, dealt within each layer so that units go in the order in
                     which the output of o or down can do without them; see `qpruner.pruning.reconstruction`

The first is what removing the whole unit costs beyond first order, but for a factor that all units share: half the
number of tokens of a sequence. It is sure of the units that must stay and says little of the others, of which first
order says more; so the last takes both. The errors that the last looks at do not compare between layers: what each
layer gives is decided by the loss, and which of its units by the error that is left when the weights that stay are
adjusted.

g, F, G, Var and x are those of the whole text, however it was cut to pass through the model.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from qpruner.anatomy import Coupled

GradientCriterion = Literal["vectorize", "param_first", "param_second", "param_mix"]
WeightCriterion = Literal[
    "vectorize", "param_first", "param_second", "param_mix", "wanda", "magnitude_l1", "magnitude_l2", "random"
]
"""Criteria that score each of a unit's coupled weights."""
Criterion = Literal["fisher", WeightCriterion, "reconstruction", "flap"]
Aggregate = Literal["sum", "prod", "max", "mean", "first"]

GRADIENT_CRITERIA: tuple[str, ...] = get_args(GradientCriterion)
SECOND_ORDER: tuple[GradientCriterion, ...] = ("param_second", "param_mix")
"""Criteria that need the gradient of each sequence alone."""


def element_scores(
    criterion: GradientCriterion,
    weight: Tensor,  # [out, in]
    gradient: Tensor,  # [out, in], of the mean loss over all sequences
    squared: Tensor | None,  # [out, in], mean of the squared gradients of each sequence's loss
) -> Tensor:
    """What each weight adds to the score of its unit; signed for ``vectorize``."""  # [out, in]
    first = weight * gradient
    if squared is None:
        return first if criterion == "vectorize" else first.abs()
    second = weight.square() * squared
    return second if criterion == "param_second" else (first - second / 2).abs()


def sum_by_unit(coupled: Coupled, values: Tensor) -> Tensor:
    """Sums values of the shape of a weight over each unit, in float64."""  # [units]
    return coupled.by_unit(values).flatten(1).sum(1, dtype=torch.float64)


def magnitude(coupled: Coupled, order: int) -> Tensor:
    """Norm of the part of a weight that belongs to each unit."""  # [units]
    return coupled.by_unit(coupled.linear.weight.detach()).flatten(1).double().norm(p=order, dim=1)


def wanda(coupled: Coupled, input_norm: Tensor) -> Tensor:
    """Sum over each unit of |w| times the norm of the inputs that w meets.

    Args:
        coupled: weight whose units are scored.
        input_norm: L2 norm of each input channel over all calibration tokens, [in].
    """  # [units]
    return sum_by_unit(coupled, coupled.linear.weight.detach().abs() * input_norm)


def fluctuation(parts: Sequence[Coupled], variances: Sequence[Tensor]) -> Tensor:
    """How much of the output varies with a unit's inputs, in standard deviations from the mean of its layer.

    As FLAP has it (arXiv 2312.11983): columns of a weight score Var(x_j) ||W_:j||^2, are standardised over the
    weight, so that layers and kinds compare, and averaged over a unit. The experts of a mixture are one weight, side by
    side; an input channel of one of them is zero for tokens that do not reach it.

    Args:
        parts: weight whose columns belong to units, of o or down; of a mixture, the down of each expert.
        variances: variance of each input channel of these over all calibration tokens, [in].
    """  # [units], of any sign
    columns = torch.cat(
        [v * part.linear.weight.detach().double().square().sum(0) for part, v in zip(parts, variances, strict=True)]
    )
    spread = columns.std(correction=0)
    standardised = (columns - columns.mean()) / torch.where(spread > 0, spread, 1.0)
    return standardised.view(-1, parts[0].width).mean(1)


def aggregate(scores: list[Tensor], how: Aggregate) -> Tensor:
    """What a unit's coupled weights make together.

    Args:
        scores: scores of the units by each weight, [weights] of [units], in the order in which a layer names its
            weights.
        how: what a unit's weights make together: sum, product, largest, mean, or the first (q, or gate) alone.
    """  # [units]
    stacked = torch.stack(scores)
    match how:
        case "sum":
            return stacked.sum(0)
        case "prod":
            return stacked.prod(0)
        case "max":
            return stacked.amax(0)
        case "mean":
            return stacked.mean(0)
        case "first":
            return stacked[0]
