"""The kernel that unpacks uniform weights on a GPU: each byte is read once, each weight written once.

Torch takes a pass through memory for every step of it, a dozen in all. Only to be imported where Triton is installed;
`qpruner.quantization.uniform_unpacking` says when it is used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpruner.modeling_compressed import PLANES
from qpruner.plan import ROW

BLOCK = 1024
"""Most columns of a row that a program unpacks."""


@triton.jit  # type: ignore[untyped-decorator]
def _plane(start, column, inside, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of some columns in a plane, by the place of its first byte."""
    place = column * WIDTH
    byte = tl.load(start + place // 8, mask=inside, other=0).to(tl.int32)
    return (byte >> place % 8) & ((1 << WIDTH) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    codes, scales, minima, weight, columns, row_bytes, second_plane, groups, group,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of one row; ``SECOND`` is the width of the second plane, or 0."""
    row = tl.program_id(0).to(tl.int64)  # a table may have more weights than int32 counts
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
    """What `qpruner.modeling_compressed.uniform_values` gives, bit for bit, and of the same arguments."""
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
            enable_fp_fusion=False,  # the product is rounded before the sum, as torch has it
        )
    return weight
