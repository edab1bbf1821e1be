"""Codes of one to eight bits as one stream of bits for each row, the layout of most engines.

Code number i of a row occupies b bits from bit i * b on, lowest bit first, across byte boundaries. The layout that
`qpruner.modeling_compressed.unpack_codes` reads is the same for 1, 2, 4 and 8 bits only.
"""

import torch
from torch import Tensor

from qpruner.modeling_compressed import PLANES, unpack_codes
from qpruner.quantization.bit_packing import pack


def bit_stream(codes: Tensor, bits: int) -> Tensor:
    """The bytes, uint8 [rows, ceil(columns * bits / 8)], of codes uint8 [rows, columns] below 2^bits."""
    if len(PLANES[bits]) == 1:
        return pack(codes, bits)
    places = torch.arange(bits, dtype=torch.uint8)
    return pack(((codes.unsqueeze(2) >> places) & 1).flatten(1), 1)


def codes_of_stream(stream: Tensor, columns: int, bits: int) -> Tensor:
    """The codes, uint8 [rows, columns], in the output of `bit_stream`."""
    if len(PLANES[bits]) == 1:
        return unpack_codes(stream, columns, bits)
    places = torch.arange(bits, dtype=torch.uint8)
    single = unpack_codes(stream, columns * bits, 1).view(len(stream), columns, bits)
    return (single << places).sum(2, dtype=torch.uint8)


def words(stream: Tensor) -> Tensor:
    """The stream of each row as little-endian words of 32 bits, the last one filled with zeros; int32."""
    return torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).view(torch.int32)
