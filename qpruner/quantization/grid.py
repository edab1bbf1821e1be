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

from qpruner.plan import ROW, Precision


@dataclass(frozen=True)
class Grid:
    """The values that weights [O, I] may take.

    Args:
        scales: distance from the value of a code to that of the next in each group, [O, M] in float32; below 0 where
            higher codes have lower values, and 0 where all values of a group are one.
        minima: value of code 0 in each group, the lowest one unless the scale is below 0; [O, M] in float32.
        bits: number of bits b of a code.
        group: number G of columns in a group; -1 where a group is a whole row.
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
        """The codes of the values nearest to weights; of two that are as near, the higher code.

        Args:
            weight: weights of some neighbouring columns, [O, n].
            first: number of the first of these columns.
        """  # uint8 [O, n]
        scales, minima = self._of_columns(first, weight.shape[1])
        places = (weight.float() - minima).mul_(inverse(scales))
        return places.add_(0.5).floor_().clamp_(0, self.levels - 1).to(torch.uint8)

    def values(self, codes: Tensor, first: int = 0) -> Tensor:
        """What codes [O, n] of some neighbouring columns mean; see `round`."""  # float32 [O, n]
        scales, minima = self._of_columns(first, codes.shape[1])
        return torch.addcmul(minima, scales, codes.float())

    def _of_columns(self, first: int, number: int) -> tuple[Tensor, Tensor]:
        """The scale and the minimum of each weight in some neighbouring columns, [O, number]."""
        groups = groups_of_columns(first, number, self.group, self.scales.device)
        return self.scales.index_select(1, groups), self.minima.index_select(1, groups)


def groups_of_columns(first: int, number: int, group: int, device: torch.device) -> Tensor:
    """The number of the group of each of some neighbouring columns, [number]."""
    columns = torch.arange(first, first + number, device=device)
    return torch.zeros_like(columns) if group == ROW else columns // group


def inverse(scales: Tensor) -> Tensor:
    """What a difference is multiplied by to count it in scales; 0 for scales of 0, in which nothing is counted."""
    tiny = torch.finfo(torch.float32).tiny  # of smaller ones the inverse is infinite
    return torch.where(scales.abs() >= tiny, 1 / scales, 0.0)


class GridStore(Protocol):
    """What can store a grid; the part of a number format that the choice of a grid depends on."""

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> Grid:
        """The grid nearest to scales and minima [out, groups] that can be stored.

        Where a symmetric format takes its minima from the scales, it does not look at those that are given.
        """
