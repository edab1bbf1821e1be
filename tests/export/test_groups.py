"""Codes and scales of packed linears, in groups of another size and in more bits."""

import pytest
import torch
from support.linears import random_linear
from torch import Tensor

from qpruner.errors import UserError
from qpruner.export.groups import GroupedWeight, GroupLayout, rounded
from qpruner.plan import ROW, Leading, Precision
from qpruner.quantization.formats import dequantize, quantize
from qpruner.quantization.packed import PackedLinear


def packed(precision: Precision, in_features: int = 96) -> PackedLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return quantize(random_linear(in_features, 5), precision)


def values(weight: GroupedWeight) -> Tensor:
    columns = torch.arange(weight.codes.shape[1]) // weight.size
    return weight.codes * weight.scales[:, columns] + weight.minima[:, columns]


@pytest.mark.parametrize(
    ("precision", "size"),
    [
        (Precision("affine", 4, 32), 32),
        (Precision("affine-double", 3, 32), 16),
        (Precision("affine", 1, 64), 32),
        (Precision("symmetric", 5, 64), 32),
        (Precision("symmetric-double", 2, 128), 96),
        (Precision("affine", 8, ROW), 32),
        (Precision("int8", 8), 96),
    ],
)
def test_codes_and_scales_mean_the_weight(precision: Precision, size: int) -> None:
    linear = packed(precision)
    weight = GroupedWeight.of(linear, size)
    assert weight.scales.shape == (5, 96 // size) and int(weight.codes.max()) < 2**weight.bits
    torch.testing.assert_close(values(weight), dequantize(linear), rtol=1e-6, atol=1e-7)


def test_symmetric_codes_mean_the_same_in_more_bits() -> None:
    weight = GroupedWeight.of(packed(Precision("symmetric", 3, 32)))
    wider = weight.widened(8)
    assert wider.bits == 8 and torch.equal(values(wider), values(weight))
    assert torch.equal(wider.minima, -128 * weight.scales)


def test_layouts_and_the_groups_that_they_divide_into() -> None:
    layout = GroupLayout.of(packed(Precision("affine", 4, 64)))
    assert layout == GroupLayout(4, 64, symmetric=False)
    assert layout.divided(96, (128, 64, 32)) == 32 and layout.divided(128, (ROW, 64, 32)) == 64
    assert layout.divided(100, (128, 64, 32)) is None
    assert GroupLayout.of(packed(Precision("symmetric", 4, 128))) == GroupLayout(4, 96, symmetric=True)
    assert GroupLayout(4, 96, symmetric=True).divided(96, (ROW, 64, 32)) == 96
    assert GroupLayout.of(packed(Precision("nf4", 4))) is None
    leading = Precision("symmetric", 4, 32, Leading(32, Precision("symmetric", 8, 32)))
    assert GroupLayout.of(packed(leading)) is None


def test_codes_chosen_anew_are_the_nearest() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    encoded = GroupedWeight.encoded(weight, 4, 32, symmetric=False)
    steps = encoded.scales.repeat_interleave(32, 1)
    assert ((values(encoded) - weight).abs() <= 0.51 * steps).all()


def test_what_a_dtype_cannot_hold_is_told() -> None:
    assert rounded("a", torch.tensor([1.0]), torch.float16).dtype == torch.float16
    with pytest.raises(UserError, match="a holds values beyond those of float16. Export with --dtype bfloat16"):
        rounded("a", torch.tensor([1e5]), torch.float16)
