"""Codes of one to eight bits as bytes, and back.

A code is cut into planes whose widths divide eight, so that no byte holds a part of a code of a plane: three bits are a
plane of two and one of one, five are four and one, six are four and two. Within a byte of a plane of p bits the earlier
code has the lower bits. A row of codes is the bytes of its planes, one plane after the other, that of the lowest bits
first; each plane of a row starts with a new byte.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Widths in bits of the planes of a code by its own width, that of the lowest bits first."""


def bytes_of_row(columns: int, bits: int) -> int:
    """Number of bytes of a row of codes."""
    return sum(_bytes_of_plane(columns, width) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """The bytes, uint8 [rows, bytes of a row], of codes uint8 [rows, columns] below 2^bits."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        plane = functional.pad(plane, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((plane << places).sum(2, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The codes, uint8 [rows, columns], of what `pack` gave."""
    return unpack_to_floats(packed, columns, bits).to(torch.uint8)


def unpack_to_floats(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The codes, float32 [rows, columns], of what `pack` gave; a view where a row ends within a byte."""
    if bits == 8:
        return packed.float()
    codes, first, shift = None, 0, 0
    for width in PLANES[bits]:
        end = first + _bytes_of_plane(columns, width)
        plane = _look_up(packed[:, first:end], width, shift)[:, :columns]
        codes = plane if codes is None else codes.add_(plane)
        first, shift = end, shift + width
    assert codes is not None
    return codes


def _bytes_of_plane(columns: int, width: int) -> int:
    return -(-columns * width // 8)


def _look_up(plane: Tensor, width: int, shift: int) -> Tensor:
    """What the bytes [rows, n] of a plane mean; float32 [rows, n * 8 / width]."""
    codes = _meanings(width, shift, plane.device).index_select(0, plane.flatten().int())
    return codes.view(plane.shape[0], -1)


@cache  # made once for a device, not at every product
@torch.inference_mode(False)
def _meanings(width: int, shift: int, device: torch.device) -> Tensor:
    """What each of the 256 bytes of a plane means: its 8 / width codes, times 2^shift; float32 [256, 8 / width]."""
    values = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, width, device=device)
    return ((values & ((1 << width) - 1)) << shift).float()
