"""Weights as other engines store them: codes, and a scale and a minimum for every group, all groups of one size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from qpruner.errors import UserError
from qpruner.plan import ROW, Precision
from qpruner.quantization.formats import GridFormat, format_for
from qpruner.quantization.grid import Grid
from qpruner.quantization.int8 import Int8
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.uniform import Uniform


@dataclass(frozen=True)
class GroupLayout:
    """How the codes of a packed linear are grouped.

    Args:
        bits: bits of a code.
        size: columns of a group; all columns of the linear where a group is a row.
        symmetric: whether the minimum of each group is its scale times -2^(b - 1).
    """

    bits: int
    size: int
    symmetric: bool

    @classmethod
    def of(cls, linear: PackedLinear) -> Self | None:
        """The layout of a linear; None if its format is not a uniform grid, or if it has two segments."""
        number_format = format_for(linear.precision)
        if isinstance(number_format, Int8):
            return cls(8, linear.in_features, symmetric=True)
        if linear.precision.leading is not None or not isinstance(number_format, Uniform):
            return None
        size = number_format.group(linear.precision)
        rows = size == ROW or size > linear.in_features
        return cls(linear.precision.bits, linear.in_features if rows else size, number_format.symmetric)

    def divided(self, columns: int, sizes: Sequence[int]) -> int | None:
        """The largest of some sizes that divides both these groups and the columns of a row; None if none does.

        Args:
            columns: number of columns of the linear.
            sizes: sizes to choose from; -1 for a whole row.
        """
        whole = [columns if size == ROW else size for size in sizes]
        return max((size for size in whole if self.size % size == 0 and columns % size == 0), default=None)


@dataclass(frozen=True)
class GroupedWeight:
    """A weight [O, I] with values scale * code + minimum, each row in M = ceil(I / G) groups of G columns.

    Args:
        codes: uint8 [O, I], below 2^b.
        scales: float32 [O, M].
        minima: float32 [O, M], the value of code 0.
        bits: bits b of a code.
        size: columns G of a group, of which the last may be short.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    bits: int
    size: int

    @classmethod
    def of(cls, linear: PackedLinear, size: int | None = None) -> Self:
        """The unchanged codes and scales of a linear that has a `GroupLayout`.

        Args:
            linear: packed linear.
            size: columns of a group, a divisor of the linear's group size, or any size if its groups are rows; the
                scale of a group is repeated for each of the parts.
        """
        layout, state = GroupLayout.of(linear), linear.packed()
        assert layout is not None
        number_format = format_for(linear.precision)
        if isinstance(number_format, GridFormat):
            grid = number_format.grid(state, linear.precision)
            assert isinstance(grid, Grid)
            codes = number_format.codes(state, linear.in_features, linear.precision)
            scales, minima = grid.scales, grid.minima
        else:
            codes = (state["codes"].short() + 128).to(torch.uint8)
            scales = (state["scales"] * (1 / 127)).unsqueeze(1)
            minima = -128 * scales
        size = layout.size if size is None else size
        parts = torch.arange(0, linear.in_features, size) // layout.size  # the group that each part is of
        return cls(codes, scales[:, parts], minima[:, parts], layout.bits, size)

    @classmethod
    def encoded(cls, weight: Tensor, bits: int, size: int, *, symmetric: bool) -> Self:
        """Rounds weights [O, I] to the nearest codes, with the grid of each group set by its minimum and maximum.

        Args:
            weight: weights, float32.
            bits: bits of a code.
            size: 32, 64, 128 or all columns.
            symmetric: whether minima are the scales times -2^(b - 1).
        """
        number_format = Uniform(symmetric=symmetric)
        precision = Precision(number_format.name, bits, ROW if size == weight.shape[1] else size)
        state = number_format.encode(weight, precision)
        grid = number_format.grid(state, precision)
        return cls(number_format.codes(state, weight.shape[1], precision), grid.scales, grid.minima, bits, size)

    def widened(self, bits: int) -> Self:
        """The same values of symmetric codes in more bits."""
        middle = (1 << (bits - 1)) - (1 << (self.bits - 1))
        minima = self.scales * -float(1 << (bits - 1))
        return replace(self, codes=self.codes + middle, minima=minima, bits=bits)


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of an export in a dtype of 16 bits.

    Raises:
        UserError: a value is beyond the range of the dtype.
    """
    held = value.to(dtype)
    if not held.isfinite().all():
        raise UserError(
            f"{name} holds values beyond those of {str(dtype).removeprefix('torch.')}. Export with --dtype bfloat16."
        )
    return held
