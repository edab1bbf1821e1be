"""Uniform formats against GGUF's written out, and what only they do; what all formats do is in `test_formats`."""

import pytest
import torch
from support.linears import meant_by, quantize_dequantize, random_linear
from torch import Tensor

from qpruner.modeling_compressed import unpack_codes as unpack
from qpruner.plan import Precision
from qpruner.quantization.formats import dequantize, narrowed, num_bytes, quantize
from qpruner.quantization.uniform import Uniform

FORMATS = {
    one.name: one for one in (Uniform(symmetric, double) for symmetric in (False, True) for double in (False, True))
}
PRECISIONS = [Precision(name, bits, group) for name, one in FORMATS.items() for bits in one.bits for group in (32, -1)]


def random_weight(rows: int = 33, columns: int = 172) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * torch.logspace(-2, 0, rows).unsqueeze(1)


def awkward_weight() -> Tensor:
    """Groups of zeros, of one value, of one sign, with ties and halves, and with one weight far out."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weight[0], weight[1], weight[2], weight[3] = 0, 0.25, weight[2].abs(), -weight[3].abs()
    weight[4] = torch.arange(96) / 8 - 6
    weight[5] = torch.tensor([-1.0, 1.0]).repeat(48)
    weight[6, 40] = 300
    weight[7] = torch.arange(96).remainder(32).sub(16).div(2)
    return weight


def q4_0(w: Tensor) -> tuple[float, list[int]]:
    """Scale and codes of a block of GGUF, in float32 as its quantizer has it."""
    scale = w[w.abs().argmax()] / -8
    inverse = 1 / scale if scale else torch.zeros(())
    return float(scale.half()), [min(15, int(place)) for place in w * inverse + 8.5]


def q8_0(w: Tensor) -> tuple[float, list[int]]:
    scale = w.abs().max() / 127
    places = w * (1 / scale if scale else torch.zeros(()))
    whole = [int(abs(place)) + int(2 * (abs(place) - int(abs(place)))) for place in places]
    return float(scale.half()), [code if place >= 0 else -code for code, place in zip(whole, places, strict=True)]


def q4_1(w: Tensor) -> tuple[float, float, list[int]]:
    scale = (w.max() - w.min()) / 15
    inverse = 1 / scale if scale else torch.zeros(())
    return float(scale.half()), float(w.min().half()), [int(place) for place in (w - w.min()) * inverse + 0.5]


@pytest.mark.parametrize("weight", [random_weight(16, 96), awkward_weight()], ids=["random", "awkward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_32_are_blocks_of_gguf(weight: Tensor, dtype: torch.dtype) -> None:
    weight = weight.to(dtype)
    for name, bits, reference, offset in (
        ("affine", 4, q4_1, 0),
        ("symmetric", 4, q4_0, 0),
        ("symmetric", 8, q8_0, 128),
    ):
        state = FORMATS[name].encode(weight, Precision(name, bits, 32))
        blocks = [reference(block) for row in weight.float() for block in row.split(32)]
        columns = [torch.tensor(column) for column in zip(*blocks, strict=True)]
        assert torch.equal(state["scales"].float(), columns[0].view(-1, 3))
        if name == "affine":
            assert torch.equal(state["minima"].float(), columns[1].view(-1, 3))
        codes = unpack(state["codes"], weight.shape[1], bits)
        assert torch.equal(codes.int() - offset, columns[-1].view_as(codes).int()), name


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_codes_on_the_stored_grid_are_packed_without_loss(precision: Precision) -> None:
    one, weight = FORMATS[precision.format], random_weight()
    groups = 1 if precision.group == -1 else -(-weight.shape[1] // 32)
    grid = one.storable(torch.rand(len(weight), groups) / 10, -torch.rand(len(weight), groups) / 5, precision)
    codes = grid.round(weight)
    state = one.pack(codes, grid)
    decoded = meant_by(state, weight.shape, precision)
    assert torch.equal(decoded, grid.values(codes))
    stored = [grid.scales] if one.symmetric else [grid.scales, grid.minima]
    assert all(torch.equal(tensor.half().float(), tensor) for tensor in stored)
    again = one.storable(grid.scales, grid.minima, precision)
    assert torch.equal(again.scales, grid.scales) and torch.equal(again.minima, grid.minima)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_errors_are_at_most_half_a_step(precision: Precision) -> None:
    """Of weights whose spread differs by 100 from row to row; scales that are stored in eight bits miss some."""
    weight, one = random_weight(), FORMATS[precision.format]
    state = one.encode(weight, precision)
    decoded = meant_by(state, weight.shape, precision)
    scales = one.storable(*one._spans(weight, precision), precision).scales.abs()
    steps = scales.repeat_interleave(172 if precision.group == -1 else 32, dim=1)[:, :172]
    errors = (decoded - weight).abs() / steps
    if precision.bits == 1:
        assert ((decoded - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.7
    elif one.symmetric:  # the far end of the other sign may be cut by a step
        assert errors.max() <= 1.01 + 0.06 * 2 ** (precision.bits - 1) * one.double
        assert errors.median() <= 0.3
    else:
        assert errors.max() <= 0.51 + 0.02 * 2**precision.bits * one.double + 2 ** (precision.bits - 10)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_any_dtype_is_rounded_once_from_float32(precision: Precision) -> None:
    module = quantize(random_linear(172, 33), precision)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(module.unpack(dtype), dequantize(module).to(dtype))


def test_chunks_of_rows_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantize(random_linear(70, 33), Precision("affine", 3, 32))
    whole = dequantize(module)
    monkeypatch.setattr("qpruner.modeling_compressed.CHUNK", 350)  # five rows
    assert torch.equal(dequantize(module), whole)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_rows_and_columns_of_whole_groups_stay_as_they_were(precision: Precision) -> None:
    module = quantize(random_linear(100, 33), precision)  # the last group of 32 has 4
    weight = dequantize(module)
    rows = torch.tensor([30, 2, 3])
    assert torch.equal(dequantize(narrowed(module, 0, rows)), weight[rows])
    columns = torch.cat([torch.arange(64, 96), torch.arange(32), torch.arange(96, 100)])
    assert torch.equal(dequantize(narrowed(module, 1, columns)), weight[:, columns])
    halves = torch.cat([torch.arange(16, 48), torch.arange(64, 80)])  # of two groups in one
    one = FORMATS[precision.format]
    kept = one.take(module.packed(), 1, halves, 100, precision)
    assert (kept is not None) == (precision.group == -1)
    assert narrowed(module, 1, halves).in_features == 48


def test_bytes_by_hand() -> None:
    weights, groups = 4096 * 4096, 4096 * 64
    assert num_bytes(4096, 4096, Precision("affine-double", 2)) == weights // 4 + 2 * groups + 4  # 2.25 bits
    assert num_bytes(4096, 4096, Precision("affine-double", 1)) == weights // 8 + 2 * groups + 4  # 1.25
    assert num_bytes(4096, 4096, Precision("affine", 3)) == weights * 3 // 8 + 4 * groups  # 3.5
    assert num_bytes(4096, 4096, Precision("symmetric", 4, 32)) == weights // 2 + 2 * 2 * groups  # 4.5, as Q4_0
    assert num_bytes(4096, 4096, Precision("symmetric-double", 6, -1)) == weights * 3 // 4 + 4096 + 4
    assert num_bytes(3, 43, Precision("affine", 3, 32)) == 3 * (11 + 6) + 3 * 2 * 2 * 2


def test_scales_in_eight_bits_by_hand() -> None:
    """Of the largest scale 1 at two bits: shares of 2^(-1/24); minima in 255ths of three scales."""
    one, precision = FORMATS["affine-double"], Precision("affine-double", 2, -1)
    grid = one.storable(torch.tensor([[1.0], [0.5], [0.24]]), torch.tensor([[-1.5], [0.0], [-0.72]]), precision)
    state = one.pack(torch.zeros(3, 4, dtype=torch.uint8), grid)
    assert state["largest_scale"] == 1 and state["scale_codes"].tolist() == [[0], [24], [49]]
    assert state["zero_points"].tolist() == [[128], [0], [252]]
    expected = torch.tensor([1, 0.5, 2 ** (-49 / 24)]).half().float()
    assert torch.equal(grid.scales.flatten(), expected)
    assert torch.equal(grid.minima.flatten(), (-expected * torch.tensor([128, 0, 252]) * 3 / 255).half().float())


def test_scales_in_eight_bits_cost_little() -> None:
    weight = random_weight(64, 256)
    for name in ("affine", "symmetric"):
        for bits in (2, 3, 4):
            plain, double = (
                (quantize_dequantize(weight, Precision(form, bits)) - weight).norm()
                for form in (name, f"{name}-double")
            )
            assert double < 1.02 * plain


def test_half_of_the_weights_below_and_half_above_with_one_bit() -> None:
    weight = torch.tensor([[-3.0, -1, 1, 3], [5, 5, 5, 5], [0, 0, 0, 8]])
    for group in (-1, 32):  # of which four are there
        values = quantize_dequantize(weight, Precision("affine", 1, group))
        assert values.tolist() == [[-2, -2, 2, 2], [5, 5, 5, 5], [0, 0, 0, 8]]
