"""The gradients of scales and minima against finite differences, and what becomes of them when they are stored."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from support.families import logits_of, tiny_model
from torch import Tensor, nn

from qpruner.anatomy import architecture_of
from qpruner.plan import ROW, UNITS, CompressionPlan, Leading, Precision
from qpruner.quantization.apply import quantize_
from qpruner.quantization.formats import GridFormat, dequantize, format_for, quantize
from qpruner.quantization.grid import Grid
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.polishing import (
    PolishedLinear,
    gradients_of_grid,
    linears_with_grids,
    loosen_,
    moved,
    settle_,
)

PRECISIONS = [
    Precision("affine", 2, 32),
    Precision("affine-double", 2, 32),
    Precision("symmetric", 3, 32),
    Precision("symmetric-double", 4, ROW),
    Precision("affine", 1, ROW),
    Precision("affine", 2, 32, Leading(20, Precision("affine", 4, ROW))),
    Precision("symmetric", 3, 32, Leading(40, Precision("symmetric", 8, 32))),
]


def packed(precision: Precision, *, bias: bool = True) -> PackedLinear:
    torch.manual_seed(2)
    return quantize(nn.Linear(72, 6, bias=bias), precision)  # 72 = 2 x 32 + 8: the last group is short


def grid_format(precision: Precision) -> GridFormat:
    number_format = format_for(precision)
    assert isinstance(number_format, GridFormat)
    return number_format


def polished(precision: Precision) -> PolishedLinear:
    """A linear whose grid has moved a little from where it began."""
    linear = PolishedLinear(packed(precision), grid_format(precision))
    with torch.no_grad():
        for moves in (linear.growths, linear.ways):
            if moves is not None:
                moves.normal_(std=0.05)
    return linear


def test_a_grid_moves_by_hand() -> None:
    grid = Grid(torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[-3.0, 2.0, 0.5]]), bits=2, group=4)
    growths, ways = torch.full((1, 3), 2.0).log(), torch.tensor([[0.5, -0.5, 1.0]])
    scales, minima = moved(grid, growths, ways)
    # Values -3, -1, 1, 3 go to twice their distance round 0, and from there half of 6 up: -3, 1, 5, 9.
    # Values 2, 1, 0, -1 go to 3.5, 1.5, -0.5, -2.5, and half of 3 down. A group of one value stays.
    torch.testing.assert_close(scales, torch.tensor([[4.0, -2.0, 0.0]]))
    torch.testing.assert_close(minima, torch.tensor([[-3.0, 2.0, 0.5]]))
    symmetric = Grid(torch.tensor([[0.5]]), torch.tensor([[-1.0]]), bits=2, group=4)
    torch.testing.assert_close(moved(symmetric, growths[:, :1], None), (torch.tensor([[1.0]]), torch.tensor([[-2.0]])))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_it_begins_with_exactly_what_the_packed_one_computes(precision: Precision) -> None:
    plain = packed(precision)
    linear = PolishedLinear(plain, grid_format(precision))
    x = torch.randn(3, 72)
    assert torch.equal(linear(x), plain(x))
    assert torch.equal(dequantize(linear), dequantize(plain))
    assert {name for name, one in linear.named_parameters() if one.requires_grad} == (
        {"growths"} if grid_format(precision).symmetric else {"growths", "ways"}
    )


def columns_and_steps(precision: Precision) -> tuple[Tensor, Tensor]:
    """The group of each of 72 columns, and the largest code of each group."""
    leading, columns, steps = precision.leading, [], []
    parts = [(precision.rest, 72)] if leading is None else [(leading.precision, leading.columns), (precision.rest, 72)]
    for part, end in parts:
        inside = torch.arange(end - sum(map(len, columns))) // (72 if part.group == ROW else 32)
        columns.append(inside + len(steps))
        steps += [2**part.bits - 1] * (int(inside[-1]) + 1)
    return torch.cat(columns), torch.tensor(steps)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_gradients_are_those_of_finite_differences(precision: Precision) -> None:
    """Of a dense layer in float64, whose weight is made of the moves as the formulas have it."""
    linear = polished(precision)
    x, direction = torch.randn(2, 5, 72), torch.randn(2, 5, 6)
    x.requires_grad_()
    (linear(x) * direction).sum().backward()
    codes = linear.number_format.codes(linear.packed(), 72, precision)
    columns, steps = columns_and_steps(precision)
    start = linear.start

    def loss(name: str, place: tuple[int, int], step: float) -> float:
        moves = {name: one.detach().double() for name, one in linear.named_parameters() if one.requires_grad}
        moves[name][place] += step
        scales = start.scales.double() * moves["growths"].exp()
        if "ways" in moves:
            middles = start.minima + start.scales.double() * steps / 2 + start.scales.abs() * steps * moves["ways"]
            minima = middles - scales * steps / 2
        else:
            minima = scales * -(steps + 1) / 2
        weight = scales[:, columns] * codes + minima[:, columns]
        assert linear.bias is not None
        outputs = nn.functional.linear(x.detach().double(), weight, linear.bias.double())
        return float((outputs * direction).sum())

    for name, parameter in linear.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            for place in ((0, 0), (3, parameter.shape[1] - 1), (5, 0)):
                slope = (loss(name, place, 1e-5) - loss(name, place, -1e-5)) / 2e-5
                assert float(parameter.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(x.grad, direction @ dequantize(linear))


def test_gradients_of_scales_and_minima_are_sums_over_groups() -> None:
    gradient, inputs = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    codes = torch.tensor([[1, 2, 3], [0, 1, 0]], dtype=torch.uint8)
    grid = Grid(torch.ones(2, 2), torch.zeros(2, 2), bits=2, group=2)
    of_scales, of_minima = gradients_of_grid(gradient, inputs, codes, grid)
    assert of_scales.tolist() == [[21.0, 300.0], [20.0, 0.0]]
    assert of_minima.tolist() == [[11.0, 100.0], [22.0, 200.0]]


def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass() -> None:
    linear = polished(Precision("affine", 2, 32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(torch.randn(2, 72, requires_grad=True))
    assert kept and max(tensor.numel() for tensor in kept) < 72 * 6


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_polished_it_is_packed_with_the_codes_that_it_had_and_near_where_it_came(precision: Precision) -> None:
    linear = polished(precision)
    result = linear.as_polished()
    assert torch.equal(result.packed()["codes"], linear.packed()["codes"])
    before, trained, after = (dequantize(one) for one in (linear.as_packed(), linear, result))
    assert (after - trained).norm() < 0.5 * (trained - before).norm()
    if not precision.format.endswith("-double"):  # float16
        torch.testing.assert_close(after, trained, rtol=1e-3, atol=1e-3)
    assert type(result) is type(packed(precision)) and result.bias is not None
    assert torch.equal(dequantize(linear.as_packed()), dequantize(packed(precision)))


def test_its_state_dict_is_loaded_again_whatever_the_number_format_of_what_was_trained() -> None:
    linear, other = polished(PRECISIONS[0]), PolishedLinear(packed(PRECISIONS[0]), grid_format(PRECISIONS[0]))
    state: dict[str, Any] = dict(linear.state_dict())
    assert {"codes", "scales", "minima", "bias", "growths", "ways"} == state.keys()
    other.load_state_dict({**state, "ways": state["ways"].double()})
    assert torch.equal(other.growths, linear.growths) and torch.equal(other.ways, linear.ways)
    with pytest.raises(RuntimeError, match="scales is torch.float32"):
        other.load_state_dict({**state, "scales": state["scales"].float()})


def test_linears_of_layers_are_loosened_and_no_table() -> None:
    """Embedding and tied head are packed on a grid, too, and stay as they are; so does what is in NF4."""
    model = tiny_model("llama", tie_word_embeddings=True)
    two, nf4 = Precision("affine", 2, 32), Precision("nf4", 4, 64)
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    units = [dict.fromkeys(UNITS, two) | {"down": nf4}] * len(plan.layers)
    quantize_(model, plan.with_precision(units, embedding=two, head=two), None, device=torch.device("cpu"))
    model.requires_grad_(False)
    expected, names = logits_of(model), linears_with_grids(model)
    loosen_(model)
    assert len(names) == 6 * len(plan.layers) and not any("down_proj" in name for name in names)
    assert {name for name, one in model.named_modules() if isinstance(one, PolishedLinear)} == names.keys()
    assert {name.rpartition(".")[0] for name, one in model.named_parameters() if one.requires_grad} == names.keys()
    assert torch.equal(logits_of(model), expected)
    with torch.no_grad():
        for name in names:
            model.get_parameter(f"{name}.growths").fill_(0.1)
    changed = deepcopy(model)
    settle_(model, polished=False)
    assert torch.equal(logits_of(model), expected)
    settle_(changed, polished=True)
    assert linears_with_grids(changed).keys() == linears_with_grids(model).keys() == names.keys()
    for name in names:
        before, after = (dequantize(one.get_submodule(name)) for one in (model, changed))
        # The middle of each group stays while the rest grows from it by exp(0.1).
        span = after.amax(1) - after.amin(1)
        assert (span / (before.amax(1) - before.amin(1)) - 1.105).abs().max() < 0.1


def test_segments_of_which_one_alone_is_symmetric_are_left_as_they_are() -> None:
    mixed = Precision("affine", 2, 32, Leading(20, Precision("symmetric", 4, 32)))
    alike = PRECISIONS[-1]
    model = nn.Sequential(packed(mixed), packed(alike))
    model.get_input_embeddings = model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    assert list(linears_with_grids(model)) == ["1"]
