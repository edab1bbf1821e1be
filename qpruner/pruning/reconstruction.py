"""The order in which inputs of a linear can be removed, if the remaining weights are adjusted to make up for them.

A linear W [out, in] has inputs X with H = X^T X. When the columns R of W are removed and the others are refitted by
least squares, the squared error of the output is

    cost(R) = tr[ W_R ((H^-1)_RR)^-1 W_R^T ]

(the group form of Optimal Brain Surgeon: OBC, arXiv 2208.11580; ZipLM, arXiv 2302.04089; SlimGPT, arXiv 2412.18110).
Greedily, the unit of least cost is removed, and what remains is as if the linear had never had it:

    W    <-  W - W_R ((H^-1)_RR)^-1 (H^-1)_R:
    H^-1 <-  H^-1 - (H^-1)_:R ((H^-1)_RR)^-1 (H^-1)_R:

The costs depend on W only through P = W^T W. With (H^-1)_RR = L L^T, U = (H^-1)_:R L^-T and V = P_:R L^-T - U T / 2,
where T = L^-1 P_RR L^-T, a step is

    H^-1 <-  H^-1 - U U^T          P <-  P - V U^T - U V^T

A step reads only the columns R of both matrices, so the U and V of many steps are kept aside and subtracted together;
only the diagonal blocks, from which the costs are computed, are up to date all the time. Removing all units of a linear
costs O(in^3), as much as a few inversions, nearly all of it in matrix products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01
"""Default addition to the diagonal of H, as a share of its mean."""

PENDING = 64
"""Columns removed before the matrices are brought up to date: few enough that U and V stay small beside them."""


@dataclass(frozen=True)
class Removal:
    """The greedy order in which units are removed.

    Args:
        order: indices of the units in order of removal, [units].
        costs: squared error of the output, summed over tokens, that removing each unit of ``order`` adds, after the
            best update for all removed before it, [units]; float64. Costs may fall as well as rise; their cumulative
            sums never fall.
    """

    order: Tensor
    costs: Tensor


def greedy_removal(weight: Tensor, gram: Tensor, width: int, ridge: float = RIDGE) -> Removal:
    """The order in which units of a linear's inputs are removed, each time the one of least cost at that point.

    Ties are broken by the lowest index. A unit whose weights or whose inputs are all zero costs nothing.

    Args:
        weight: weight whose columns are removed, [out, in].
        gram: H = X^T X of its inputs, on any device, [in, in]; centred where the linear has a bias that is refitted.
        width: number of columns of a unit; unit u has those from ``u * width``. A divisor of in.
        ridge: addition to the diagonal of H, as a share of its mean, above 0; costs then include the change of the
            weights, too.
    """
    inverse, products = _start(weight, gram, ridge)
    left = torch.arange(len(gram) // width, device=gram.device)  # units that are still there
    order, costs = [], []
    while len(left):
        picked, of_picked, inverse, products = _remove_some(inverse, products, width)
        order.append(left[picked])
        costs.append(of_picked)
        left = left[_others(len(left), picked)]
    return Removal(torch.cat(order), torch.cat(costs))


def deal(scores: Tensor, order: Tensor) -> Tensor:
    """The same scores, reassigned to units so that they rise along an order of removal.

    The unit that is removed first gets the lowest score. Among units of equal scores the order is lost.

    Args:
        scores: scores of the units, [units].
        order: indices of the units in order of removal, [units].
    """  # [units]
    dealt = torch.empty_like(scores)
    dealt[order] = scores.sort().values
    return dealt


def _start(weight: Tensor, gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The initial H^-1 and P."""
    gram = gram.double()
    diagonal = gram.diagonal()
    # With the ridge alone, an input that is always zero would still cost something for its weights.
    live = weight.detach().to(gram) * (diagonal != 0)
    added = ridge * diagonal.mean()
    damped = gram + torch.diag(torch.where(added > 0, added, 1.0).expand(len(gram)))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)), live.T @ live


def _remove_some(inverse: Tensor, products: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Removes units until enough columns are pending: their indices, their costs, and both matrices without them."""
    num_columns, units = len(inverse), len(inverse) // width
    steps = min(units, max(1, PENDING // width))
    pending_u, pending_v = (inverse.new_zeros(num_columns, steps * width) for _ in range(2))
    blocks, product_blocks = _diagonal_blocks(inverse, width), _diagonal_blocks(products, width)
    gone = torch.zeros(units, dtype=torch.bool, device=inverse.device)
    within = torch.arange(width, device=inverse.device)
    picked, costs = [], []
    for step in range(steps):
        of_units = _costs(blocks, product_blocks).masked_fill(gone, torch.inf)
        unit = of_units.argmin(0, keepdim=True)  # [1]; stays on the device, so that no step waits for another
        columns = unit * width + within
        u, v = pending_u[:, : step * width], pending_v[:, : step * width]
        mine_u, mine_v = u[columns].T, v[columns].T
        inverse_columns = inverse[columns].T - u @ mine_u  # [in, width]; rows of a symmetric matrix lie together
        product_columns = products[columns].T - v @ mine_u - u @ mine_v
        factor = _factor(inverse_columns[columns])
        u = _times_inverse(inverse_columns, factor)
        v = _times_inverse(product_columns, factor)
        v -= u @ _times_inverse(v[columns].T, factor) / 2
        pending_u[:, step * width : (step + 1) * width] = u
        pending_v[:, step * width : (step + 1) * width] = v
        u_blocks, v_blocks = u.view(units, width, width), v.view(units, width, width)
        crossed = v_blocks @ u_blocks.mT
        blocks = blocks - u_blocks @ u_blocks.mT
        product_blocks = product_blocks - crossed - crossed.mT
        picked.append(unit)
        costs.append(of_units[unit])
        gone[unit] = True
        blocks[unit] = torch.eye(width, dtype=inverse.dtype, device=inverse.device)  # it is zero, and has no inverse
    places = torch.cat(picked)
    stay = _others(num_columns, (places[:, None] * width + within).flatten())
    u, v = pending_u[stay], pending_v[stay]
    crossed = v @ u.T
    return (
        places,
        torch.cat(costs),
        inverse[stay][:, stay].addmm_(u, u.T, alpha=-1),
        products[stay][:, stay].sub_(crossed).sub_(crossed.T),
    )


def _costs(blocks: Tensor, product_blocks: Tensor) -> Tensor:
    """tr[(H^-1)_RR^-1 P_RR] of each unit, from the diagonal blocks [units, width, width]."""  # [units]
    if blocks.shape[-1] == 1:
        return (product_blocks / blocks).flatten().clamp(min=0)
    solved = torch.cholesky_solve(product_blocks, _factor(blocks))
    return solved.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    units = len(matrix) // width
    return matrix.view(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def _factor(blocks: Tensor) -> Tensor:
    """The Cholesky factor, without waiting for the device to report whether it exists."""
    return torch.linalg.cholesky_ex(blocks).L


def _times_inverse(columns: Tensor, factor: Tensor) -> Tensor:
    """A matrix [rows, width] times L^-T, for a lower triangular L."""
    return torch.linalg.solve_triangular(factor.T, columns, upper=True, left=False)


def _others(number: int, places: Tensor) -> Tensor:
    """The indices below a number that are not among those given."""
    stay = torch.ones(number, dtype=torch.bool, device=places.device)
    stay[places] = False
    return stay.nonzero().flatten()
