"""Codes in the types of GGUF."""

from typing import Any

import pytest
import torch
from torch import nn

from qpruner.export.gguf_types import BYTES_OF_BLOCK, carried, carried_type, has_wide_scales, num_bytes
from qpruner.plan import ROW, Leading, Precision
from qpruner.quantization.formats import dequantize, quantize
from qpruner.quantization.packed import PackedLinear

SYMMETRIC_4, SYMMETRIC_2 = Precision("symmetric", 4, 32), Precision("symmetric", 2, 64)


def packed(precision: Precision, out_features: int = 6, in_features: int = 128) -> PackedLinear:
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(torch.randn(out_features, in_features, generator=generator))
    return quantize(linear, precision)


def read(linear: PackedLinear) -> torch.Tensor:
    """What the package gguf reads of the blocks."""
    gguf: Any = pytest.importorskip("gguf")
    blocks = carried(linear)
    content = blocks.to_bytes()
    assert content.nbytes == num_bytes((len(content), blocks.codes.shape[1]), blocks.type)
    return torch.from_numpy(gguf.quants.dequantize(content.numpy(), gguf.GGMLQuantizationType[blocks.type]))


@pytest.mark.parametrize(
    ("precision", "type_name"),
    [
        *((Precision("symmetric", bits, 32), "Q4_0") for bits in (2, 3, 4)),
        (Precision("symmetric", 5, 32), "Q5_0"),
        (Precision("symmetric", 6, 32), "Q8_0"),
        (Precision("symmetric", 8, 32), "Q8_0"),
        *((Precision("affine", bits, 32), "Q4_1") for bits in (1, 2, 3, 4)),
        (Precision("affine", 5, 32), "Q5_1"),
        (Precision("symmetric", 4, 128), "Q4_0"),
        (Precision("symmetric-double", 4, 64), "Q4_0"),
        (Precision("affine-double", 3, 64), "Q4_1"),
        (Precision("affine-double", 5, ROW), "Q5_1"),
        (Precision("symmetric", 2, 64, Leading(32, SYMMETRIC_4)), "Q4_0"),
        (Precision("affine", 3, 32, Leading(64, SYMMETRIC_4)), "Q4_1"),
        (Precision("symmetric", 4, 32, Leading(96, Precision("symmetric", 8, 32))), "Q8_0"),
    ],
    ids=str,
)
def test_codes_are_carried_over_exactly(precision: Precision, type_name: str) -> None:
    linear = packed(precision)
    assert carried_type(linear) == type_name
    assert torch.equal(read(linear), dequantize(linear))


@pytest.mark.parametrize("precision", [SYMMETRIC_4, Precision("affine-double", 2, 64), Precision("symmetric", 5, ROW)])
def test_the_rest_of_a_block_comes_behind(precision: Precision) -> None:
    linear = packed(precision, in_features=80)  # two and a half blocks
    assert torch.equal(read(linear)[:, :80], dequantize(linear))
    assert read(linear).shape == (6, 96)


def test_int8_keeps_its_codes_and_rounds_its_scales() -> None:
    linear = packed(Precision("int8", 8))
    assert has_wide_scales(linear.precision) and not has_wide_scales(SYMMETRIC_4)
    scales = linear.packed()["scales"] / 127
    expected = linear.packed()["codes"].float() * scales.half().float().unsqueeze(1)
    assert torch.equal(read(linear), expected)
    assert carried_type(packed(Precision("int8", 8), in_features=80)) == "Q8_0"


@pytest.mark.parametrize(
    "precision",
    [
        Precision("nf4", 4, 64),
        Precision("fp4-double", 4, 32),
        Precision("affine", 6, 32),
        Precision("affine", 8, 64),
        Precision("symmetric", 2, 32, Leading(40, SYMMETRIC_4)),  # begins within a block
        Precision("nf4", 4, 32, Leading(32, SYMMETRIC_4)),
    ],
    ids=str,
)
def test_what_no_type_holds_is_known(precision: Precision) -> None:
    assert carried_type(packed(precision)) is None


def test_bytes_are_those_of_the_package() -> None:
    gguf: Any = pytest.importorskip("gguf")
    for name, size in BYTES_OF_BLOCK.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (32, size)
    assert num_bytes((3, 64), "Q4_1") == 3 * 2 * 20 and num_bytes((3, 5), "BF16") == 30 and num_bytes((7,), "F32") == 28


@pytest.mark.parametrize(
    ("precision", "type_name"),
    [
        (SYMMETRIC_4, "Q4_0"),
        (Precision("symmetric", 8, 32), "Q8_0"),
        (Precision("affine", 4, 32), "Q4_1"),
    ],
)
def test_bytes_are_those_that_the_package_makes_of_the_weight(precision: Precision, type_name: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))  # as in `packed`
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[type_name])
    assert torch.equal(carried(packed(precision)).to_bytes(), torch.from_numpy(expected))
