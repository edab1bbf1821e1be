"""GPTQ (2022): columns of a weight are rounded one after the other, and the remaining ones make up for each error.

With W the weight, Q the rounded weight, X the inputs of the linear and H = X^T X, the objective is the output error,
|X (W - Q)^T|^2 = tr (W - Q) H (W - Q)^T. Once column q is rounded, with error e = w_q - round(w_q) in each row, the
best update of the columns F after it is

    W_F <- W_F - e [K]_qF / [K]_qq,    K the inverse of H among q and F,

and the remaining error is the sum over columns of e^2 / [K]_qq. With H^-1 = U^T U, U upper triangular, row q of K is
U_qq U_q for every q, so that W_F <- W_F - (e / U_qq) U_qF (arXiv 2210.17323, section 3, step 3). Columns beyond a block
are updated once per block.

**First-order term.** FOEM (AAAI 2026) adds to the expansion of the error around the current weights a gradient in
proportion to their deviation from the original ones, D = W - W_original. For the remaining columns that is the gradient
2 D_F H_FF of tr D_F H_FF D_F^T; a share beta of the Newton step on it is -beta D_F, whatever H_FF is, and the whole of
the step to the least of the expansion with column q rounded is

    D_F <- (1 - beta) D_F - e [K]_qF / [K]_qq,    e = w_q - round(w_q) with w_q after its own share.

Without it each step is the best on the calibration text already: there the gradient above and that of the rounded
columns, 2 D_Q H_QF, add up to nothing. What the term buys is weights near the original ones, for other text, much as
damping does. (The authors' code takes beta D_F for the gradient itself, so that its step is -beta D_F H_FF^-1; the form
here needs no inverse of what is left.)

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


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with something added to its diagonal; float64, of the same shape.

    A channel that was always 0 is then treated as uncorrelated with all others: it neither compensates nor is
    compensated.

    Args:
        hessian: X^T X, [..., I, I].
        damping: addition to the diagonal, in units of its mean; above 0.
    """
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, 1.0)
    return hessian


@dataclass(frozen=True)
class Factor:
    """The inverse Cholesky factor of a linear's Hessian, by which columns make up for each other.

    Args:
        order: columns in the order in which they are rounded, [I]; None for that of the weight.
        root: upper triangular U with U^T U the inverse of the Hessian in that order, [I, I] in float32.
    """

    order: Tensor | None
    root: Tensor

    @classmethod
    def of(cls, hessian: Tensor, *, act_order: bool, name: str) -> "Factor":
        """The factor of a Hessian [I, I], damped, in float64.

        Args:
            hessian: Hessian [I, I], damped already.
            act_order: whether columns are rounded in descending order of the Hessian's diagonal.
            name: name of the linear, for errors.

        Raises:
            UserError: the Hessian is not positive definite.
        """
        order = None
        if act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        # Of the columns in reverse order H is L L^T; read backwards L is upper triangular, and so is its inverse U.
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
    """The codes of a weight; uint8 [O, I].

    Args:
        weight: weight, [O, I], in float32.
        factor: factor of the Hessian of its inputs.
        spans: groups of all columns, in their order.
        choose: returns the scale and the minimum [O] of a group from its index and, in the order of the weight, its
            weights [O, G] at the time its first column is rounded; called wherever the group changes.
        first_order: share beta of the remaining columns' deviation that is undone before each column.
    """
    order = torch.arange(weight.shape[1], device=weight.device) if factor.order is None else factor.order
    numbers = numbers_of(spans, weight.device)[order].tolist()
    # A column is a row of what follows: its weights lie side by side in memory.
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
        if first_order:  # as if each column behind the block had been taken back in each turn
            shares = keep ** torch.arange(last - first - 1, -1, -1, device=now.device, dtype=now.dtype)
            errors *= shares.unsqueeze(1)
            now[last:].lerp_(original[last:], 1 - keep ** (last - first))
        now[last:].addmm_(root[first:last, last:].T, errors, alpha=-1)
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return in_order.T.to(torch.uint8).contiguous()


def numbers_of(spans: Sequence[Span], device: torch.device) -> Tensor:
    """The number of the group of each column, [I]."""
    sizes = torch.tensor([span.size for span in spans], device=device)
    return torch.arange(len(spans), device=device).repeat_interleave(sizes)


class FixedGrid:
    """Returns the scale and the minimum of each group of a fixed grid, whatever its current weights."""

    def __init__(self, grid: AnyGrid) -> None:
        self._scales, self._minima = grid.scales.T.contiguous(), grid.minima.T.contiguous()  # [M, rows]

    def choose(self, group: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self._scales[group], self._minima[group]


class FreshGrid:
    """Chooses the grid of each group when the group is reached.

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
    """Blocks of at most `BLOCK` columns, such that where a group begins all its columns are up to date."""
    together: list[tuple[int, int]] = []  # whole groups, as many as a block holds, or one that is longer
    for span in spans:
        if together and span.last - together[-1][0] <= BLOCK:
            together[-1] = (together[-1][0], span.last)
        else:
            together.append((span.first, span.last))
    for start, end in together:
        for first in range(start, end, BLOCK):
            yield first, min(first + BLOCK, end)
