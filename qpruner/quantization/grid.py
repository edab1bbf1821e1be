"""Grids: the values at equal distances that the weights of a linear are rounded to.

In a group of G consecutive weights of a row, a grid of b bits has the 2^b values

    scale * code + minimum,    code = 0, 1, ..., 2^b - 1.

A grid holds its scales and minima exactly as a number format stores them, so that what is rounded to it loses nothing
more when it is packed. Who chooses them is `qpruner.quantization.grid_search`; who stores them are the formats that
have a grid.

Shapes: O rows (outputs), I columns (inputs), G columns in a group, M = ceil(I / G) groups in a row, the last of which
may be short.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qpruner.plan import Precision


@dataclass(frozen=True)
class Grid:
    """The values that weights [O, I] may take.

    Args:
        scales: distance of neighbouring values in each group, [O, M] in float32; at least 0, and 0 where all values of
            a group are one.
        minima: lowest value in each group, [O, M] in float32.
        bits: number of bits b of a code.
        group: number G of columns in a group.
    """

    scales: Tensor
    minima: Tensor
    bits: int
    group: int

    @property
    def levels(self) -> int:
        """Number of values in a group."""
        return 1 << self.bits

    def round(self, weight: Tensor, first: int = 0) -> Tensor:
        """The codes of the values nearest to weights.

        Args:
            weight: weights of some neighbouring columns, [O, n].
            first: number of the first of these columns.
        """  # uint8 [O, n]
        scales, minima = self._of_columns(first, weight.shape[1])
        steps = torch.where(scales > 0, scales, 1.0)
        return ((weight.float() - minima) / steps).round_().clamp_(0, self.levels - 1).to(torch.uint8)

    def values(self, codes: Tensor, first: int = 0) -> Tensor:
        """What codes [O, n] of some neighbouring columns mean; see `round`."""  # float32 [O, n]
        scales, minima = self._of_columns(first, codes.shape[1])
        return torch.addcmul(minima, scales, codes.float())

    def _of_columns(self, first: int, number: int) -> tuple[Tensor, Tensor]:
        """The scale and the minimum of each weight in some neighbouring columns, [O, number]."""
        groups = torch.arange(first, first + number, device=self.scales.device) // self.group
        return self.scales.index_select(1, groups), self.minima.index_select(1, groups)


class GridStore(Protocol):
    """What can store a grid; the part of a number format that the choice of a grid depends on."""

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> Grid:
        """The grid nearest to scales and minima [out, groups] that can be stored.

        Where a symmetric format takes its minima from the scales, it does not look at those that are given.
        """
