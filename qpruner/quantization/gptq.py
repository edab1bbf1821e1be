"""GPTQ (2022): the columns of a weight are rounded one by one, and the remaining columns compensate for each error.

With W the weight, Q the rounded weight, X the inputs of the linear and H = X^T X, the objective is the output error,
|X (W - Q)^T|^2 = tr (W - Q) H (W - Q)^T. Once column q is rounded, with error e = w_q - round(w_q) in each row, the
best update of the columns F after it is

    W_F <- W_F - e [K]_qF / [K]_qq,    K the inverse of H among q and F,

and the remaining error is the sum over columns of e^2 / [K]_qq. With H^-1 = U^T U, U upper triangular, row q of K is
U_qq U_q for every q, so that W_F <- W_F - (e / U_qq) U_qF (arXiv 2210.17323, section 3, step 3). Columns beyond a block
are updated once per block.

**First-order term.** FOEM (AAAI 2026) adds a gradient to the expansion of the error around the current weights, in
proportion to their deviation D = W - W_original from the original ones. For the remaining columns, this is the gradient
2 D_F H_FF of tr D_F H_FF D_F^T. A share beta of its Newton step is -beta D_F, whatever H_FF is, and the full step to
the minimum of the expansion with column q rounded is

    D_F <- (1 - beta) D_F - e [K]_qF / [K]_qq,    e = w_q - round(w_q) with w_q after its own share.

On the calibration text, each step is optimal without the term already, since the gradient above and that of the rounded
columns, 2 D_Q H_QF, cancel. The term keeps weights near the original ones, which helps on other text, much as damping
does. (The authors' code uses beta D_F as the gradient itself, so that its step is -beta D_F H_FF^-1; the form here
needs no inverse for the remaining columns.)

Shapes: O rows (outputs), I columns (inputs), G columns in a group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.errors import UserError
from qpruner.quantization.grid import AnyGrid, Span, inverse
from qpruner.quantization.grid_search import GridSearch, Segment, search

BLOCK = 128
"""Maximum number of columns that are rounded before the columns after the block are updated."""
Choose = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Function that returns the scale and the minimum of a group; see `gptq`."""


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with an addition to its diagonal; float64, of the same shape.

    An input that is always 0 is uncorrelated with all others, so its column neither compensates for errors nor has its
    own compensated.

    Args:
        hessian: X^T X, [..., I, I].
        damping: amount added to the diagonal, in units of its mean; above 0. A zero matrix gets 1 instead.
    """
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, 1.0)
    return hessian


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of a linear's inverse Hessian, from which columns compensate for each other's errors.

    Args:
        order: columns in the order in which they are rounded, [I]; None for their order in the weight.
        root: upper triangular U such that U^T U is the inverse of the Hessian in this order, [I, I] in float32.
    """

    order: Tensor | None
    root: Tensor

    @classmethod
    def of(cls, hessian: Tensor, *, act_order: bool, name: str) -> "Factor":
        """Computes the factor of a Hessian, in the Hessian's dtype.

        Args:
            hessian: damped Hessian [I, I], in float64.
            act_order: whether columns are rounded in descending order of the Hessian's diagonal.
            name: name of the linear, for errors.

        Raises:
            UserError: the Hessian is not positive definite.
        """
        order = None
        if act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        # With its columns in reverse order, H is L L^T. L read backwards is upper triangular, and so is its inverse U.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if failed:
            raise UserError(
                f"The Hessian of {name} is not positive, although rounding.damping was added to its diagonal: its "
                f"text is too short, or its inputs are almost all the same. Give more calibration text, raise "
                f"rounding.damping, or use rounding.method nearest."
            )
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        return cls(order, inverse.float())


def gptq(weight: Tensor, factor: Factor, spans: Sequence[Span], choose: Choose, *, first_order: float) -> Tensor:
    """Rounds a weight by GPTQ; returns its codes, uint8 [O, I].

    Args:
        weight: weight, [O, I], in float32.
        factor: factor of the Hessian of its inputs.
        spans: groups of all columns, in the order of the weight.
        choose: returns the scale and the minimum [O] of a group from its index and its weights [O, G] when its first
            column is about to be rounded; called wherever the group changes. The weights are those of the group only if
            columns are rounded in the order of the weight.
        first_order: share beta, in [0, 1), of the remaining columns' deviation that is undone before each column.
    """
    order = torch.arange(weight.shape[1], device=weight.device) if factor.order is None else factor.order
    numbers = numbers_of(spans, weight.device)[order].tolist()
    # Transposed, so that the weights of a column are contiguous in memory.
    original = weight.T[order]
    now, codes = original.clone(), torch.empty_like(original)
    root, pivots = factor.root, factor.root.diagonal().tolist()
    keep, group = 1 - first_order, -1
    for first, last in _blocks(spans):
        errors = torch.empty_like(now[first:last])
        for q in range(first, last):
            if first_order:
                now[q:last].lerp_(original[q:last], first_order)
            if numbers[q] != group:
                group = numbers[q]
                scale, minimum = choose(group, now[q : q + spans[group].size].T)
                per_step = inverse(scale)
            torch.mul(now[q] - minimum, per_step, out=codes[q])
            codes[q].add_(0.5).floor_().clamp_(0, spans[group].top)
            error = (now[q] - torch.addcmul(minimum, scale, codes[q])).div_(pivots[q])
            now[q + 1 : last].addr_(root[q, q + 1 : last], error, alpha=-1)
            errors[q - first] = error
        if first_order:  # as if each column after the block had been pulled back before every column
            shares = keep ** torch.arange(last - first - 1, -1, -1, device=now.device, dtype=now.dtype)
            errors *= shares.unsqueeze(1)
            now[last:].lerp_(original[last:], 1 - keep ** (last - first))
        now[last:].addmm_(root[first:last, last:].T, errors, alpha=-1)
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return in_order.T.to(torch.uint8).contiguous()


def numbers_of(spans: Sequence[Span], device: torch.device) -> Tensor:
    """The index of the group of each column, [I]."""
    sizes = torch.tensor([span.size for span in spans], device=device)
    return torch.arange(len(spans), device=device).repeat_interleave(sizes)


class FixedGrid:
    """Returns the scale and the minimum of each group of a fixed grid, regardless of its current weights."""

    def __init__(self, grid: AnyGrid) -> None:
        self._scales, self._minima = grid.scales.T.contiguous(), grid.minima.T.contiguous()  # [M, rows]

    def choose(self, group: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self._scales[group], self._minima[group]


class FreshGrid:
    """Searches for the grid of each group, from its weights at the time the group is reached.

    Args:
        segments: segments of the linear that the grid is for.
        how: method of the grid search.
        importance: weight of a squared error in each column, [I].
    """

    def __init__(self, segments: Sequence[Segment], how: GridSearch, importance: Tensor) -> None:
        self._how, self._importance = how, importance
        self._groups = [(segment, segment.levels, span) for segment in segments for span in segment.spans]
        self._grids: list[AnyGrid] = []

    def choose(self, group: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        segment, levels, span = self._groups[group]
        counts = self._importance[span.first : span.last]
        grid = segment.store.storable(*search(weights.contiguous(), levels, self._how, counts), segment.precision)
        self._grids.append(grid)
        return grid.scales[:, 0], grid.minima[:, 0]

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        """Scales and minima of all groups, [rows, M]."""
        return torch.cat([grid.scales for grid in self._grids], 1), torch.cat([grid.minima for grid in self._grids], 1)


def _blocks(spans: Sequence[Span]) -> Iterator[tuple[int, int]]:
    """Blocks of at most `BLOCK` columns, such that all columns of a group are up to date when the group begins."""
    together: list[tuple[int, int]] = []  # as many whole groups as a block holds, or one longer group
    for span in spans:
        if together and span.last - together[-1][0] <= BLOCK:
            together[-1] = (together[-1][0], span.last)
        else:
            together.append((span.first, span.last))
    for start, end in together:
        for first in range(start, end, BLOCK):
            yield first, min(first + BLOCK, end)
