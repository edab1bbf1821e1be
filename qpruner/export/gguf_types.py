"""Weights in the types of GGUF: codes that are carried over as they are, and weights that are rounded to a type.

Blocks of 32 weights of a row have a scale of float16, and some types a minimum. Whatever lies on a grid whose scales
(and minima) are numbers of float16, shared by 32 weights or a multiple of that, is a weight of such a type exactly:

| our codes | type | a weight is |
|---|---|---|
| symmetric, 2 to 4 bits | Q4_0 | scale * (code - 8) |
| symmetric, 5 bits | Q5_0 | scale * (code - 16) |
| symmetric, 6 and 8 bits | Q8_0 | scale * code, of int8 |
| affine, 1 to 4 bits | Q4_1 | scale * code + minimum |
| affine, 5 bits | Q5_1 | scale * code + minimum |

Shapes: O rows (outputs), I columns (inputs).

Source: the layouts of blocks are those that the package gguf 0.19 decodes (``gguf.quants``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpruner.plan import DENSE, ROW, Precision
from qpruner.quantization.formats import GridFormat, format_for
from qpruner.quantization.grid import Grid, GridOfTwo
from qpruner.quantization.packed import PackedLinear

BLOCK = 32
BYTES_OF_BLOCK = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
"""Bytes of a block of each type, its scale and minimum included."""
BYTES_OF_WEIGHT = {"F32": 4, "F16": 2, "BF16": 2}
BY_BITS = {1: "Q4_1", 2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}
"""The type that weights are rounded to by the bits of their plan, where their codes cannot be carried over."""


@dataclass(frozen=True)
class Blocks:
    """Codes and scales of a weight, as a type of GGUF holds them.

    Args:
        type: name of the type.
        codes: codes of the weights as the type stores them, from 0; of Q8_0 raised by 128. uint8 [O, I].
        scales: scale of each block, [O, I / 32], numbers of float16.
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
    """The type that holds the codes of a packed weight exactly; None where none does."""
    if (parts := _parts(packed.precision, packed.in_features)) is None:
        return None
    bits = max(precision.bits for precision, _ in parts)
    if all(precision.format.startswith("symmetric") for precision, _ in parts):
        return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"
    return "Q4_1" if bits <= 4 else "Q5_1" if bits == 5 else None


def carried(packed: PackedLinear) -> Blocks:
    """The codes of a packed weight for which `carried_type` gives a type."""
    type_of_blocks = carried_type(packed)
    number_format: Any = format_for(packed.precision)
    assert type_of_blocks is not None and isinstance(number_format, GridFormat)
    state = packed.packed()
    grid = number_format.grid(state, packed.precision)
    codes = number_format.codes(state, packed.in_features, packed.precision)
    scales = torch.cat([_of_blocks(part.scales, part, columns) for part, columns in _grids(grid, codes.shape[1])], 1)
    if type_of_blocks in ("Q4_1", "Q5_1"):
        minima = [_of_blocks(part.minima, part, columns) for part, columns in _grids(grid, codes.shape[1])]
        return Blocks(type_of_blocks, codes, scales, torch.cat(minima, 1))
    middle = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[type_of_blocks]
    raised, first = codes.clone(), 0
    for part, columns in _grids(grid, codes.shape[1]):  # the code of zero moves to the middle of the type's
        raised[:, first : first + columns] += middle - part.levels // 2
        first += columns
    return Blocks(type_of_blocks, raised, scales, None)


def rounding_type(precision: Precision, dense: str, wanted: str | None) -> str:
    """The type that a weight is rounded to, where its codes are not carried over and its rows are whole blocks.

    Args:
        precision: precision of the weight in the plan.
        dense: type of what is dense.
        wanted: type of all that was packed; None for that of its bits.
    """
    if precision == DENSE:
        return dense
    leading = 0 if precision.leading is None else precision.leading.precision.bits
    return wanted or BY_BITS[max(precision.bits, leading)]


def num_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of a shape in a type."""
    numel = torch.Size(shape).numel()
    return (
        numel * BYTES_OF_WEIGHT[type_name]
        if type_name in BYTES_OF_WEIGHT
        else (numel // BLOCK * BYTES_OF_BLOCK[type_name])
    )


def _parts(precision: Precision, columns: int) -> list[tuple[Precision, int]] | None:
    """Precision and columns of each segment of a weight; None where one has no grid of whole blocks."""
    leading = [] if precision.leading is None else [(precision.leading.precision, precision.leading.columns)]
    behind = columns - sum(number for _, number in leading)
    parts = [*leading, (precision.rest, behind)]
    for part, number in parts:
        number_format = format_for(part)
        if not isinstance(number_format, GridFormat) or number % BLOCK:
            return None
        group = part.group or number_format.groups[0]
        if group is None or (group != ROW and group % BLOCK):
            return None
    return parts


def _grids(grid: Any, columns: int) -> Iterator[tuple[Grid, int]]:
    if isinstance(grid, GridOfTwo):
        yield grid.leading, grid.columns
        yield grid.rest, columns - grid.columns
    else:
        yield grid, columns


def _of_blocks(values: Tensor, grid: Grid, columns: int) -> Tensor:
    """What groups have, for each of their blocks; [O, groups] -> [O, columns / 32]."""
    blocks = columns // BLOCK
    size = blocks if grid.group == ROW else grid.group // BLOCK
    return values.repeat_interleave(size, 1)[:, :blocks]
