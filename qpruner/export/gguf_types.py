"""Weights in the types of GGUF: codes that are carried over unchanged, and weights that are rounded to a type.

Each block of 32 weights in a row has a float16 scale, and in some types a minimum. Weights on a grid whose scales (and
minima) are float16 numbers, shared by 32 weights or a multiple of that, are represented exactly by such a type:

| our codes | type | a weight is |
|---|---|---|
| symmetric, 2 to 4 bits | Q4_0 | scale * (code - 8) |
| symmetric, 5 bits | Q5_0 | scale * (code - 16) |
| symmetric, 6 and 8 bits | Q8_0 | scale * code, of int8 |
| affine, 1 to 4 bits | Q4_1 | scale * code + minimum |
| affine, 5 bits | Q5_1 | scale * code + minimum |

For int8, whose rows have float32 scales, Q8_0 holds the codes with scales rounded to float16.

Shapes: O rows (outputs), I columns (inputs).

Source: the layouts of blocks are those that the package gguf 0.19 decodes (``gguf.quants``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qpruner.plan import ROW, Precision
from qpruner.quantization.formats import GridFormat, format_for
from qpruner.quantization.grid import Grid, GridOfTwo
from qpruner.quantization.int8 import Int8
from qpruner.quantization.packed import PackedLinear

BLOCK = 32
BYTES_OF_BLOCK = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
"""Bytes of a block of each type, its scale and minimum included."""
MIDDLES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
"""The code that stands for zero, for each type without minima."""
BYTES_OF_WEIGHT = {"F32": 4, "F16": 2, "BF16": 2}
ROUNDED_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16", "BF16", "F32")
"""The types that weights can be rounded to."""


@dataclass(frozen=True)
class Blocks:
    """Codes and scales of a weight, as a type of GGUF holds them.

    Args:
        type: name of the type.
        codes: codes of the weights as the type stores them, from 0; for Q8_0 with 128 added. uint8 [O, I].
        scales: scale of each block, [O, I / 32], representable in float16.
        minima: minimum of each block, likewise; None in types without.
    """

    type: str
    codes: Tensor
    scales: Tensor
    minima: Tensor | None

    def to_bytes(self) -> Tensor:
        """The rows as bytes, uint8 [O, bytes of a row]."""
        codes = self.codes.view(len(self.codes), -1, BLOCK)  # [O, blocks, 32]
        parts = [self.scales.half().unsqueeze(2).view(torch.uint8)]
        if self.minima is not None:
            parts.append(self.minima.half().unsqueeze(2).view(torch.uint8))
        if self.type == "Q8_0":
            parts.append((codes ^ 128).view(torch.uint8))  # of int8, whose sign bit is the other way round
        else:
            if self.type.startswith("Q5"):
                places = torch.arange(8, dtype=torch.uint8)
                fifth = (codes >> 4).view(*codes.shape[:2], 4, 8) << places  # bit j of 32 is that of weight j
                parts.append(fifth.sum(3, dtype=torch.uint8))
            low = codes & 15
            parts.append(low[..., :16] | low[..., 16:] << 4)
        return torch.cat(parts, 2).view(len(codes), -1)


def carried_type(packed: PackedLinear) -> str | None:
    """The type that holds the codes of a packed weight; None where none does."""
    if isinstance(format_for(packed.precision), Int8):
        return "Q8_0"
    if (parts := _parts(packed.precision, packed.in_features)) is None:
        return None
    bits = max(precision.bits for precision, _ in parts)
    if all(precision.format.startswith("symmetric") for precision, _ in parts):
        return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"
    return "Q4_1" if bits <= 4 else "Q5_1" if bits == 5 else None


def carried(packed: PackedLinear) -> Blocks:
    """The codes of a packed weight for which `carried_type` gives a type.

    Where rows end within a block, the rest of the block is meaningless padding with codes of 0.
    """
    if isinstance(format_for(packed.precision), Int8):
        return _carried_int8(packed)
    type_of_blocks = carried_type(packed)
    number_format: Any = format_for(packed.precision)
    assert type_of_blocks is not None and isinstance(number_format, GridFormat)
    state, columns = packed.packed(), packed.in_features
    grids = list(_grids(number_format.grid(state, packed.precision), columns))
    codes = number_format.codes(state, columns, packed.precision)
    scales = torch.cat([_of_blocks(grid.scales, grid, number) for grid, number in grids], 1)
    minima = None
    if type_of_blocks in MIDDLES:  # the code of zero moves to the middle of those of the type
        middles = [MIDDLES[type_of_blocks] - grid.levels // 2 for grid, _ in grids]
        numbers = torch.tensor([number for _, number in grids])
        codes = codes + torch.tensor(middles, dtype=torch.uint8).repeat_interleave(numbers)
    else:
        minima = torch.cat([_of_blocks(grid.minima, grid, number) for grid, number in grids], 1)
    return Blocks(type_of_blocks, functional.pad(codes, (0, -columns % BLOCK)), scales, minima)


def _carried_int8(packed: PackedLinear) -> Blocks:
    """The codes of a weight in int8; every block has the scale of its row."""
    state = packed.packed()
    codes = functional.pad(state["codes"].view(torch.uint8) ^ 128, (0, -packed.in_features % BLOCK))
    scales = (state["scales"] / 127).unsqueeze(1).expand(-1, codes.shape[1] // BLOCK)
    return Blocks("Q8_0", codes, scales, None)


def has_wide_scales(precision: Precision) -> bool:
    """Whether the scales of a precision need more than float16."""
    return isinstance(format_for(precision), Int8)


def num_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of a shape in a type."""
    numel = torch.Size(shape).numel()
    if type_name in BYTES_OF_WEIGHT:
        return numel * BYTES_OF_WEIGHT[type_name]
    return numel // BLOCK * BYTES_OF_BLOCK[type_name]


def _parts(precision: Precision, columns: int) -> list[tuple[Precision, int]] | None:
    """Precision and columns of each segment of a weight; None where groups are no whole blocks, or it has no grid."""
    leading = [] if precision.leading is None else [(precision.leading.precision, precision.leading.columns)]
    behind = columns - sum(number for _, number in leading)
    parts = [*leading, (precision.rest, behind)]
    for part, _ in parts:
        number_format = format_for(part)
        if not isinstance(number_format, GridFormat):
            return None
        group = part.group or number_format.groups[0]
        if group is None or (group != ROW and group % BLOCK):
            return None
    return None if leading and leading[0][1] % BLOCK else parts


def _grids(grid: Any, columns: int) -> Iterator[tuple[Grid, int]]:
    if isinstance(grid, GridOfTwo):
        yield grid.leading, grid.columns
        yield grid.rest, columns - grid.columns
    else:
        yield grid, columns


def _of_blocks(values: Tensor, grid: Grid, columns: int) -> Tensor:
    """Repeats the values of groups for each of their blocks; [O, groups] -> [O, columns / 32]."""
    blocks = -(-columns // BLOCK)
    size = blocks if grid.group == ROW else grid.group // BLOCK
    return values.repeat_interleave(size, 1)[:, :blocks]
