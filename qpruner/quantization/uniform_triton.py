"""Triton kernel that unpacks uniform weights on a GPU in a single pass through memory.

Plain torch needs about a dozen passes, one for each step. To be imported only where Triton is installed;
`qpruner.quantization.uniform_unpacking` decides when the kernel is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpruner.modeling_compressed import PLANES
from qpruner.plan import ROW

BLOCK = 1024
"""Maximum number of columns of a row that a program unpacks."""


@triton.jit  # type: ignore[untyped-decorator]
def _plane(start, column, inside, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of some columns in a plane that begins at ``start``."""
    place = column * WIDTH
    byte = tl.load(start + place // 8, mask=inside, other=0).to(tl.int32)
    return (byte >> place % 8) & ((1 << WIDTH) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    codes, scales, minima, weight, columns, row_bytes, second_plane, groups, group,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unpacks some columns of one row; ``FIRST`` and ``SECOND`` are the widths of the planes, the latter 0 for none."""
    row = tl.program_id(0).to(tl.int64)  # a table may have more weights than int32 can count
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    bytes_of_row = codes + row * row_bytes
    code = _plane(bytes_of_row, column, inside, FIRST)
    if SECOND > 0:
        code |= _plane(bytes_of_row + second_plane, column, inside, SECOND) << FIRST
    place = row * groups + column // group
    scale = tl.load(scales + place, mask=inside, other=0)
    minimum = tl.load(minima + place, mask=inside, other=0)
    value = code.to(tl.float32) * scale + minimum
    tl.store(weight + row * columns + column, value.to(weight.dtype.element_ty), mask=inside)


def unpack(
    codes: Tensor, scales: Tensor, minima: Tensor, columns: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Computes `qpruner.modeling_compressed.uniform_values`, bit for bit, from the same arguments."""
    rows = len(codes)
    first, second = (*PLANES[bits], 0)[:2]
    weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _unpack[rows, triton.cdiv(columns, block)](
            codes.contiguous(),
            scales.contiguous(),
            minima.contiguous(),
            weight,
            columns,
            codes.shape[1],
            -(-columns * first // 8),
            scales.shape[1],
            columns if group == ROW else group,
            FIRST=first,
            SECOND=second,
            BLOCK=block,
            enable_fp_fusion=False,  # rounds the product before the sum, as torch does
        )
    return weight
