"""Codes of one to eight bits as bytes, and back.

A code is cut into planes whose widths divide eight, so that no byte holds a part of a code of a plane: three bits are a
plane of two and one of one, five are four and one, six are four and two. Within a byte of a plane of p bits the earlier
code has the lower bits. A row of codes is the bytes of its planes, one plane after the other, that of the lowest bits
first; each plane of a row starts with a new byte.
"""

import torch
from torch import Tensor
from torch.nn import functional

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Widths in bits of the planes of a code by its own width, that of the lowest bits first."""

SPREADING: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
"""By the width of a plane: word that a byte grows to, and the bits by which its halves move, with what then counts."""


def bytes_of_row(columns: int, bits: int) -> int:
    """Number of bytes of a row of codes."""
    return sum(_bytes_of_plane(columns, width) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """The bytes, uint8 [rows, bytes of a row], of codes uint8 [rows, columns] below 2^bits."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        plane = functional.pad(plane, (0, -codes.shape[1] % per_byte)).view(len(codes), -1, per_byte)
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((plane << places).sum(2, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The codes, uint8 [rows, columns], of what `pack` gave."""
    codes, first, shift = packed, 0, 0
    for width in PLANES[bits]:
        end = first + _bytes_of_plane(columns, width)
        plane = _spread(packed[:, first:end], width, shift)[:, :columns]
        codes = plane if shift == 0 else codes | plane
        first, shift = end, shift + width
    return codes


def _bytes_of_plane(columns: int, width: int) -> int:
    return -(-columns * width // 8)


def _spread(plane: Tensor, width: int, shift: int) -> Tensor:
    """The codes of the bytes [rows, n] of a plane, times 2^shift; uint8 [rows, n * 8 / width].

    A byte becomes a word of as many bytes as it has codes, and halves of what is left together move apart, until each
    byte of the word has a code: far faster on a processor than to look codes up, as all of a vector moves at once.
    """
    if width == 8:
        return plane
    word, steps = SPREADING[width]
    words = plane.to(word)
    for distance, mask in steps:
        words = (words << distance).bitwise_or_(words).bitwise_and_(mask)
    words = words << shift if shift else words
    return words.view(torch.uint8)  # the lowest byte of a word comes first
