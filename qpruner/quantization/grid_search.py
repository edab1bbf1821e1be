"""The search for grids: the scale and the minimum by which each group of weights is rounded.

With x_i the weights of a group, h_i >= 0 their importance (how much an error in weight i counts), s the scale and m the
minimum of the group, the codes are c_i = clamp(round((x_i - m) / s), 0, L), L = 2^bits - 1, and the objective is

    E(s, m) = sum_i h_i (x_i - m - s c_i)^2.

- ``minmax``: s = (max x - min x) / L and m = min x. Nothing is clipped. The outermost weights determine how coarse the
  grid is in between.
- ``mse``: of the ranges ``f min x ... f max x`` for the factors f of `SHRINKS`, the one with the least error. A few
  weights are clipped so that many are rounded more finely.
- ``neuqi``: s and m are free, as in NeUQI (ICML 2026): m need not be a multiple of s. For given codes, E is quadratic,
  and minimised by a weighted linear fit to the points (c_i, x_i):

      s = sum h_i (c_i - c)(x_i - x) / sum h_i (c_i - c)^2,   m = x - s c,   c and x the weighted means;

  for a given line, the best codes are the nearest ones. Taking turns between the two never raises E, and ends in a
  local minimum, of which there are many. So each group starts from ranges of all sizes `SHRINKS_OF_NEUQI`, at all
  `PLACES` within the range of ``minmax``, and takes a few turns from each; the best result continues from slightly
  smaller and larger scales (`FINER`, in turn) and takes more turns. On groups of 64 real weights and importances, the
  resulting error is on average 0.0, 0.1, 0.2 and 0.6 % above the best of 25,600 lines at 1, 2, 3 and 4 bits. (The paper
  solves for the best m of each scale in a list by sorting the places where a code changes, L for each weight: exact,
  and far slower from 3 bits on.)

In calibrated rounding, the importance is the diagonal of the Hessian X^T X: the sum of the squares of each input.

In a symmetric format, the minimum follows from the scale, m = a s with a fixed by the format (-2^(bits - 1) where zero
is a value). Only s is searched, with either sign, since one side of zero has one value more than the other; the line
then goes through the origin, s = sum h_i u_i x_i / sum h_i u_i^2 with u = c + a. ``minmax`` puts the weight farthest
from zero at the end of the longer side.

Shapes: O rows, I columns, G columns in a group, M groups in a row.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpruner.errors import UserError, nearest
from qpruner.plan import ROW, Precision
from qpruner.quantization.grid import Grid, GridStore, Span, inverse

GridSearch = Literal["minmax", "mse", "neuqi"]
SHRINKS = tuple(1 - 0.02 * step for step in range(31))
"""Factors of the range that ``mse`` tries: 1 down to 0.4."""
SHRINKS_OF_NEUQI = tuple(1 - 0.1 * step for step in range(8))
"""Sizes of the ranges that ``neuqi`` starts from, in units of the range of ``minmax``: 1 down to 0.3."""
PLACES = (0.25, 0.5, 0.75)
"""Positions of these ranges: at 0 a range has the same lower end as that of ``minmax``, at 1 the same upper end."""
FINER = (0.1, 0.05)
"""Relative changes of the best scale that are tried afterwards, downwards and upwards."""
FIRST_TURNS, LAST_TURNS = 2, 6
"""Numbers of turns between codes and line: from each start, and at the end."""
CHUNK = 1 << 16
"""Weights that a CPU processes at a time: few enough for the caches of a core to hold several such tensors."""
CHUNK_OF_GPU = 1 << 22
"""Weights that any other device processes at a time: enough to keep it busy while the next kernel is launched."""


@dataclass(frozen=True)
class Levels:
    """The grids that a format can store at a precision.

    Args:
        bits: number of bits of a code.
        group: number of columns in a group; ``sys.maxsize`` if a group is a whole row.
        offset: minimum in units of the scale; None if the minimum is free.
    """

    bits: int
    group: int
    offset: float | None

    @classmethod
    def of(cls, number_format: GridStore, precision: Precision) -> "Levels":
        """Found by storing the scale 1 and the minimum 0: a symmetric format returns another minimum, its offset."""
        grid = number_format.storable(torch.ones(1, 1), torch.zeros(1, 1), precision)
        assert isinstance(grid, Grid), "each of two segments has levels of its own"
        minimum = float(grid.minima / grid.scales)
        return cls(grid.bits, sys.maxsize if grid.group == ROW else grid.group, minimum or None)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def spans(self, first: int, last: int) -> list[Span]:
        """The groups of the columns from ``first`` up to, but without, ``last``; the last group may be short."""
        starts = range(first, last, min(self.group, last - first))
        return [Span(start, min(start + self.group, last), self.top, self.offset) for start in starts]


@dataclass(frozen=True)
class Segment:
    """Neighbouring columns of a linear that are held in the same precision.

    Args:
        store: format of the columns.
        precision: precision within the format.
        first: index of the first column.
        last: index of the column after the last one.
    """

    store: GridStore
    precision: Precision
    first: int
    last: int

    @property
    def columns(self) -> slice:
        return slice(self.first, self.last)

    @property
    def levels(self) -> Levels:
        return Levels.of(self.store, self.precision)

    @property
    def spans(self) -> list[Span]:
        """The groups of its columns, which are counted in the whole linear."""
        return self.levels.spans(self.first, self.last)


def search_segments(
    weight: Tensor, segments: Sequence[Segment], how: GridSearch, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales and minima [O, M] of the groups of all segments; as `search`, with an importance of shape [I]."""
    each = [
        search(weight[:, segment.columns], segment.levels, how, importance[segment.columns]) for segment in segments
    ]
    scales, minima = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
    return scales, minima


def search(weight: Tensor, levels: Levels, how: GridSearch, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Searches for scales and minima [O, M] in float32, which a format has yet to store.

    Args:
        weight: weight, [O, I], of any float dtype.
        levels: grids that the format can store.
        how: method of the search; see above.
        importance: weight of each squared error, [I] or [O, I], at least 0. If it is None, or 0 throughout a group, all
            errors count the same. ``minmax`` ignores it.

    Raises:
        UserError: there is no such method.
    """
    if how not in get_args(GridSearch):
        raise UserError(
            f"There is no grid search {how!r}.{nearest(str(how), get_args(GridSearch))} "
            f"Choose one of {', '.join(get_args(GridSearch))}."
        )
    rows, columns = weight.shape
    group = min(levels.group, columns)
    missing = -columns % group
    if importance is None and missing:
        importance = weight.new_ones(columns, dtype=torch.float32)
    grids = []
    chunk = CHUNK if weight.device.type == "cpu" else CHUNK_OF_GPU
    for first in range(0, rows, step := max(1, chunk // columns)):
        part = weight[first : first + step].float()
        part = pad(part, (0, missing), mode="replicate").reshape(len(part), -1, group)  # [n, M, G]
        counts = torch.ones(1, 1, 1, device=weight.device)
        if importance is not None:
            counts = importance.float() if importance.dim() == 1 else importance[first : first + step].float()
            counts = pad(counts, (0, missing)).reshape(
                *counts.shape[:-1], -1, group
            )  # [M, G] or [n, M, G]; 0 beyond the end
            # In units of the group's mean, so that sums of products with small importances do not underflow.
            mean = counts.mean(-1, keepdim=True)
            counts = torch.where(mean > 0, counts / mean, 1.0)
        grids.append(_Groups(part, counts, levels).search(how))
    scales, minima = (torch.cat(parts).squeeze(-1) for parts in zip(*grids, strict=True))
    return scales, minima


class _Groups:
    """Some groups of weights; scales, minima and errors are [n, M, 1].

    Args:
        weights: weights, [n, M, G].
        counts: weight of each squared error, of a shape that broadcasts to ``weights``.
        levels: grids that the format can store.
    """

    def __init__(self, weights: Tensor, counts: Tensor, levels: Levels) -> None:
        self.weights, self.counts, self.levels = weights, counts, levels
        self.total = counts.expand(*counts.shape[:-1], weights.shape[-1]).sum(-1, keepdim=True)

    def search(self, how: GridSearch) -> tuple[Tensor, Tensor]:
        low, high = self.weights.aminmax(dim=-1, keepdim=True)
        if how == "minmax":
            return self.spanning(low, high)
        if how == "mse":
            return self.best([grid for shrink in SHRINKS for grid in self.reaching(low * shrink, high * shrink)])
        starts = []
        for shrink in SHRINKS_OF_NEUQI:
            beyond = (high - low) * (1 - shrink)
            for place in PLACES:
                starts += self.reaching(low + beyond * place, high - beyond * (1 - place))
        line = self.best([self.turned(start, FIRST_TURNS) for start in starts])
        for change in FINER:
            narrow, wide = (self.turned(self.stretched(line, 1 + by), FIRST_TURNS) for by in (-change, change))
            line = self.best([line, narrow, wide])
        return self.best([line, self.turned(line, LAST_TURNS)])

    def spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The grid from the lowest to the highest weight; a symmetric one ends at the weight farthest from zero."""
        if self.levels.offset is None:
            return (high - low) / self.levels.top, low
        scale = torch.where(-low >= high, low, high) / self.levels.offset
        return scale, self.levels.offset * scale

    def reaching(self, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The grid between two values; for a symmetric format, the finest grid of each sign that reaches both."""
        top, offset = self.levels.top, self.levels.offset
        if offset is None:
            return [((high - low) / top, low)]
        scales = []
        for sign, down, up in ((1, low, high), (-1, -high, -low)):
            scale = torch.maximum(down / offset, up / (top + offset) if top + offset > 0 else down / offset)
            scales.append(sign * scale.clamp_min(0))
        return [(scale, offset * scale) for scale in scales]

    def stretched(self, grid: tuple[Tensor, Tensor], factor: float) -> tuple[Tensor, Tensor]:
        """The grid with its scale multiplied by a factor, and the same middle."""
        scale, minimum = grid
        if self.levels.offset is not None:
            return scale * factor, minimum * factor
        return scale * factor, minimum + scale * (1 - factor) * self.levels.top / 2

    def codes(self, grid: tuple[Tensor, Tensor]) -> Tensor:
        places = (self.weights - grid[1]).mul_(inverse(grid[0]))
        return places.add_(0.5).floor_().clamp_(0, self.levels.top)

    def error(self, grid: tuple[Tensor, Tensor]) -> Tensor:
        left = torch.addcmul(grid[1], grid[0], self.codes(grid)).sub_(self.weights)
        return (left.square_() * self.counts).sum(-1, keepdim=True)

    def best(self, grids: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The grid with the least error for each group; the first of several with equal errors."""
        scale, minimum = grids[0]
        least = self.error(grids[0])
        for grid in grids[1:]:
            error = self.error(grid)
            better = error < least
            least = torch.where(better, error, least)
            scale, minimum = torch.where(better, grid[0], scale), torch.where(better, grid[1], minimum)
        return scale, minimum

    def turned(self, grid: tuple[Tensor, Tensor], turns: int) -> tuple[Tensor, Tensor]:
        """The grid after some turns between codes and line."""
        for _ in range(turns):
            grid = self.line(self.codes(grid), grid)
        return grid

    def line(self, codes: Tensor, grid: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The best grid for given codes; a scale that is undetermined or would flip its sign is kept."""
        offset = self.levels.offset
        if offset is None:
            middle = (codes * self.counts).sum(-1, keepdim=True) / self.total
        else:
            middle = torch.full_like(grid[0], -offset)
        codes = codes - middle
        weighted = codes * self.counts
        squares = (weighted * codes).sum(-1, keepdim=True)
        scale = (weighted * self.weights).sum(-1, keepdim=True) / squares
        scale = torch.where((squares > 0) & (scale * grid[0] > 0), scale, grid[0])
        if offset is not None:
            return scale, offset * scale
        return scale, (self.weights * self.counts).sum(-1, keepdim=True) / self.total - scale * middle
