"""Weights of two segments: the first columns in one precision, the rest in another, both packed.

This holds the columns of a linear's most important inputs in more bits. Which columns lead is decided by the order of
the channels (see `CompressionPlan`): segments are contiguous, and no index of columns is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qpruner.errors import UserError
from qpruner.modeling_compressed import LEADING, parted
from qpruner.plan import Leading, Precision
from qpruner.quantization.grid import AnyGrid, Grid, GridOfTwo
from qpruner.quantization.grid_search import Levels

if TYPE_CHECKING:
    from qpruner.quantization.formats import Format, GridFormat


@dataclass(frozen=True)
class Segments:
    """The format of a precision with leading columns: these in one format, the columns after them in another.

    Each segment is laid out in its format like a weight of its own: groups start with the segment, and its last group
    may be short. The names of the leading segment's tensors begin with ``leading_``.

    Args:
        leading: format of the leading columns.
        rest: format of the columns after them.
    """

    leading: "Format"
    rest: "Format"

    @property
    def name(self) -> str:
        return self.rest.name

    @property
    def bits(self) -> tuple[int, ...]:
        return self.rest.bits

    @property
    def groups(self) -> tuple[int | None, ...]:
        return tuple(self.rest.groups)

    def encode(self, weight: Tensor, precision: Precision) -> dict[str, Tensor]:
        leading = leading_of(precision, weight.shape[1])
        first = self.leading.encode(weight[:, : leading.columns], leading.precision)
        return joined(first, self.rest.encode(weight[:, leading.columns :], precision.rest))

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> dict[str, Tensor] | None:
        leading, (first, rest) = leading_of(precision, in_features), parted(state)
        behind = in_features - leading.columns
        indices = index, index
        if axis == 1:
            leads = index < leading.columns
            number = int(leads.sum())
            if not leads[:number].all():
                return None  # a leading column would come after one of the rest
            indices = index[:number], index[number:] - leading.columns
            if number == 0:
                return self.rest.take(rest, axis, indices[1], behind, precision.rest)
            if number == len(index):
                return self.leading.take(first, axis, indices[0], leading.columns, leading.precision)
        taken = self.leading.take(first, axis, indices[0], leading.columns, leading.precision)
        others = self.rest.take(rest, axis, indices[1], behind, precision.rest)
        return None if taken is None or others is None else joined(taken, others)


@dataclass(frozen=True)
class GridSegments(Segments):
    """Two segments whose formats both have grids, which calibration can choose together."""

    leading: "GridFormat"
    rest: "GridFormat"

    @property
    def symmetric(self) -> bool:
        return self.leading.symmetric and self.rest.symmetric

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> GridOfTwo:
        leading = precision.leading
        assert leading is not None
        groups = len(Levels.of(self.leading, leading.precision).spans(0, leading.columns))
        first = self.leading.storable(scales[:, :groups], minima[:, :groups], leading.precision)
        rest = self.rest.storable(scales[:, groups:], minima[:, groups:], precision.rest)
        return _side_by_side(first, leading.columns, rest)

    def pack(self, codes: Tensor, grid: GridOfTwo) -> dict[str, Tensor]:
        first = self.leading.pack(codes[:, : grid.columns], grid.leading)
        return joined(first, self.rest.pack(codes[:, grid.columns :], grid.rest))

    def grid(self, state: Mapping[str, Tensor], precision: Precision) -> GridOfTwo:
        leading, (first, rest) = precision.leading, parted(state)
        assert leading is not None
        grids = self.leading.grid(first, leading.precision), self.rest.grid(rest, precision.rest)
        return _side_by_side(grids[0], leading.columns, grids[1])

    def codes(self, state: Mapping[str, Tensor], in_features: int, precision: Precision) -> Tensor:
        leading, (first, rest) = leading_of(precision, in_features), parted(state)
        codes = self.leading.codes(first, leading.columns, leading.precision)
        return torch.cat([codes, self.rest.codes(rest, in_features - leading.columns, precision.rest)], 1)

    def values(self, state: Mapping[str, Tensor], grid: GridOfTwo, in_features: int, dtype: torch.dtype) -> Tensor:
        first, rest = parted(state)
        values = self.leading.values(first, grid.leading, grid.columns, dtype)
        return torch.cat([values, self.rest.values(rest, grid.rest, in_features - grid.columns, dtype)], 1)


def _side_by_side(leading: AnyGrid, columns: int, rest: AnyGrid) -> GridOfTwo:
    assert isinstance(leading, Grid) and isinstance(rest, Grid), "a segment has no segments"
    return GridOfTwo(leading, columns, rest)


def leading_of(precision: Precision, in_features: int) -> Leading:
    """The leading segment of a precision that has one.

    Args:
        precision: precision with leading columns.
        in_features: number of input columns of the linear.

    Raises:
        UserError: the linear has no columns beside the leading ones.
    """
    leading = precision.leading
    assert leading is not None
    if leading.columns >= in_features:
        raise UserError(
            f"{leading.columns} columns cannot lead in a linear that has {in_features}. Give at most "
            f"{in_features - 1}, or hold all of them in {leading.precision}."
        )
    return leading


def joined(leading: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a weight from those of its two segments."""
    return {**{LEADING + name: tensor for name, tensor in leading.items()}, **rest}
