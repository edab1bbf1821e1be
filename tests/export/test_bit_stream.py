"""Streams of bits."""

import pytest
import torch

from qpruner.export.bit_stream import bit_stream, codes_of_stream, words


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_codes_follow_one_another(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 21), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    stream = bit_stream(codes, bits)
    assert stream.shape == (3, -(-21 * bits // 8))
    assert torch.equal(codes_of_stream(stream, 21, bits), codes)
    for row, bytes_of_row in zip(codes.tolist(), stream.tolist(), strict=True):
        number = sum(code << bits * place for place, code in enumerate(row))
        assert number.to_bytes(stream.shape[1], "little") == bytes(bytes_of_row)


def test_words_are_filled_with_zeros() -> None:
    assert words(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)).tolist() == [[0x04030201, 5]]
