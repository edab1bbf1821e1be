import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpruner.modeling_compressed import PLANES, bytes_of_row
from qpruner.modeling_compressed import unpack_codes as unpack
from qpruner.quantization.bit_packing import pack


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@settings(deadline=None)
@given(st.sampled_from(sorted(PLANES)), st.integers(1, 5), st.integers(1, 70))
def test_codes_come_back_from_bytes(bits: int, rows: int, columns: int) -> None:
    codes = random_codes(rows, columns, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, bytes_of_row(columns, bits))
    assert torch.equal(unpack(packed, columns, bits), codes)


@pytest.mark.parametrize("bits", PLANES)
def test_no_bit_is_wasted_in_whole_bytes_and_a_row_is_packed_alone(bits: int) -> None:
    assert bytes_of_row(64, bits) == 8 * bits
    codes = random_codes(3, 37, bits)
    assert torch.equal(pack(codes, bits)[1:2], pack(codes[1:2], bits))


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [7, 255], [7, 255]),
        (4, [1, 15, 2], [0xF1, 0x02]),
        (2, [0, 1, 2, 3, 1], [0b11100100, 0b01]),
        (1, [1, 0, 0, 0, 0, 0, 1, 1, 1], [0b11000001, 0b1]),
        (3, [5, 2, 7, 0, 4], [0b00111001, 0b00, 0b10101]),  # the two lower bits, then the upper one
        (5, [0b10011, 0b01111], [0xF3, 0b01]),
        (6, [0b110001, 0b101010, 0b000111], [0xA1, 0x07, 0b001011]),
    ],
)
def test_bytes_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [expected]


@pytest.mark.parametrize("bits", PLANES)
def test_every_byte_is_read_alike_wherever_it_lies(bits: int) -> None:
    """Also those above 127, which are negative in a signed word."""
    bytes_ = torch.arange(256, dtype=torch.uint8).repeat(2 * bits).view(2, -1)[:, : 32 * bits]
    columns = 32 * bits * 8 // bits
    codes = unpack(bytes_, columns, bits)
    assert torch.equal(pack(codes, bits), bytes_)
