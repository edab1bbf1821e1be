"""Importance of a unit: element scores, their sum over a unit, and the aggregate over a unit's coupled weights.

With w a weight, g the gradient of the calibration loss L (the mean over N sequences of each one's mean loss), and g_n
the gradient of sequence n alone, removing a weight changes the loss by about -w g + w^2 H / 2 (Taylor), with the Fisher
information F = mean of g_n^2 in place of the Hessian H. LLM-Pruner (arXiv 2305.11627) scores a weight or a whole unit
this way:

    vectorize      | sum over the unit of w g |         the derivative of L with respect to a gate on the unit
    param_first    sum of | w g |
    param_second   sum of w^2 F
    param_mix      sum of | w g - w^2 F / 2 |

and, without gradients,

    magnitude_l1, magnitude_l2   L1 or L2 norm of the unit's weights
    wanda                        sum of |w| |x|, x the inputs of w (arXiv 2306.11695, summed over a unit)
    random                       uniform in [0, 1)

These criteria score each of a unit's coupled weights separately, and `aggregate` combines the scores. Others look only
at the columns of o or down, through which all effects of a unit reach the residual stream. With G_n the derivative of
sequence n's mean loss with respect to a gate on the inputs of these columns:

    fisher           mean of G_n^2 (the Fisher information of masks, Kwon et al., arXiv 2204.09656)
    flap             mean of Var(x_j) ||W_:j||^2 over the unit's columns j, standardised (arXiv 2312.11983)
    reconstruction   geometric mean of fisher and param_first, reassigned within each layer so that units are removed
                     in the order in which the output of o or down can best do without them; see
                     `qpruner.pruning.reconstruction`

The first is the cost of removing the whole unit beyond first order, up to a factor that all units share: half the
number of tokens of a sequence. It identifies reliably the units that must stay but says little about the others, about
which the first-order term says more; the last criterion therefore combines both. The reconstruction errors of the last
criterion are not comparable between layers: how much each layer gives up is decided by the loss, and which of its units
by the error that remains after the remaining weights are adjusted.

g, F, G, Var and x refer to the whole text, regardless of how it was split into micro-batches.
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
"""Criteria that need the gradient of each individual sequence."""


def element_scores(
    criterion: GradientCriterion,
    weight: Tensor,  # [out, in]
    gradient: Tensor,  # [out, in], of the mean loss over all sequences
    squared: Tensor | None,  # [out, in], mean of the squared gradients of each sequence's loss
) -> Tensor:
    """The contribution of each weight to the score of its unit; signed for ``vectorize``."""  # [out, in]
    first = weight * gradient
    if squared is None:
        return first if criterion == "vectorize" else first.abs()
    second = weight.square() * squared
    return second if criterion == "param_second" else (first - second / 2).abs()


def sum_by_unit(coupled: Coupled, values: Tensor) -> Tensor:
    """Sums values of a weight's shape over each unit, in float64."""  # [units]
    return coupled.by_unit(values).flatten(1).sum(1, dtype=torch.float64)


def magnitude(coupled: Coupled, order: int) -> Tensor:
    """Norm of the part of a weight that belongs to each unit."""  # [units]
    return coupled.by_unit(coupled.linear.weight.detach()).flatten(1).double().norm(p=order, dim=1)


def wanda(coupled: Coupled, input_norm: Tensor) -> Tensor:
    """Sum over each unit of |w| times the norm of the input channel of w.

    Args:
        coupled: weight whose units are scored.
        input_norm: L2 norm of each input channel over all calibration tokens, [in].
    """  # [units]
    return sum_by_unit(coupled, coupled.linear.weight.detach().abs() * input_norm)


def fluctuation(parts: Sequence[Coupled], variances: Sequence[Tensor]) -> Tensor:
    """How much the output fluctuates with a unit's inputs, in standard deviations from the mean of its layer.

    As in FLAP (arXiv 2312.11983): the columns of a weight are scored by Var(x_j) ||W_:j||^2, the scores are
    standardised over the weight, so that layers and kinds of units are comparable, and averaged over each unit. The
    experts of a mixture count as one weight, side by side; an input channel of an expert is zero for tokens that are
    not routed to it.

    Args:
        parts: weight of o or down, whose columns belong to units; for a mixture, the down of each expert.
        variances: for each part, variance of each of its input channels over all calibration tokens, [in].
    """  # [units], of any sign
    columns = torch.cat(
        [v * part.linear.weight.detach().double().square().sum(0) for part, v in zip(parts, variances, strict=True)]
    )
    spread = columns.std(correction=0)
    standardised = (columns - columns.mean()) / torch.where(spread > 0, spread, 1.0)
    return standardised.view(-1, parts[0].width).mean(1)


def aggregate(scores: list[Tensor], how: Aggregate) -> Tensor:
    """Combines the scores of a unit's coupled weights.

    Args:
        scores: scores of the units by each weight, [weights] of [units], in the order in which a layer names its
            weights.
        how: how the scores of a unit's weights are combined: sum, product, maximum, mean, or the first (q, or gate)
            alone.
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
