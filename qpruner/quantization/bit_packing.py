"""Packs codes of one to eight bits into bytes; `qpruner.modeling_compressed` unpacks them."""

import torch
from torch import Tensor
from torch.nn import functional

from qpruner.modeling_compressed import PLANES


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes; `qpruner.modeling_compressed.unpack_codes` documents the layout and is the inverse.

    Args:
        codes: codes below 2^bits, uint8 [rows, columns].
        bits: width of a code, a key of `qpruner.modeling_compressed.PLANES`.

    Returns:
        Bytes of the codes, uint8 [rows, bytes of a row].
    """
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        plane = functional.pad(plane, (0, -codes.shape[1] % per_byte)).view(len(codes), -1, per_byte)
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((plane << places).sum(2, dtype=torch.uint8))
        shift += width
    return torch.cat(planes, dim=1)
