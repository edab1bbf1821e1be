"""Searches for grids against numbers by hand and against looking everywhere."""

from itertools import product
from typing import get_args

import pytest
import torch
from support.grids import HalfGrid, choose_grid
from support.linears import meant_by
from torch import Tensor

from qpruner.errors import UserError
from qpruner.plan import ROW, Precision
from qpruner.quantization import grid_search
from qpruner.quantization.grid_search import GridSearch, Levels, search
from qpruner.quantization.uniform import Uniform


def drawn(rows: int, columns: int) -> Tensor:
    """Weights with heavy tails."""
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator)


def counts(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(columns)) ** 3


def lost(weight: Tensor, scales: Tensor, minima: Tensor, top: int, importance: Tensor) -> Tensor:
    """What rounding loses in each row, if a row is a group."""
    codes = ((weight - minima) / scales).round().clamp(0, top)
    return ((weight - minima - scales * codes).square() * importance).sum(-1)


def test_minmax_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.75, 2.0, 7.0, 7.0, 7.0]])
    grid = choose_grid(weight, HalfGrid(), Precision("half", 2, 3), "minmax")
    assert (grid.scales.tolist(), grid.minima.tolist()) == ([[1.0, 0.0]], [[-1.0, 7.0]])
    assert torch.equal(grid.values(grid.round(weight)), torch.tensor([[-1.0, 1.0, 2.0, 7.0, 7.0, 7.0]]))


def test_minmax_of_a_symmetric_format_by_hand() -> None:
    """At 3 bits values run from -4 to 3 scales: the weight farthest from zero is at -4, by the sign of the scale."""
    weight = torch.tensor([[-2.0, 1.0, -2.0, 4.0]])
    grid = choose_grid(weight, HalfGrid(symmetric=True), Precision("half", 3, 2), "minmax")
    assert (grid.scales.tolist(), grid.minima.tolist()) == ([[0.5, -1.0]], [[-2.0, 4.0]])


FORMATS = [Uniform(symmetric, double) for symmetric in (False, True) for double in (False, True)]


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("group", [32, ROW])
def test_minmax_is_what_formats_encode(number_format: Uniform, group: int) -> None:
    """But for codes of weights in the middle of two values, where a format rounds by scales not yet stored."""
    weight, precision = drawn(20, 70), Precision(number_format.name, 4, group)
    grid = choose_grid(weight, number_format, precision, "minmax")
    values = meant_by(number_format.encode(weight, precision), weight.shape, precision)
    same = grid.values(grid.round(weight)) == values
    assert same.float().mean() > 0.98
    packed = number_format.pack(grid.round(weight), grid)
    assert torch.equal(meant_by(packed, weight.shape, precision), grid.values(grid.round(weight)))


@pytest.mark.parametrize("importance", [None, counts(32)])
def test_mse_takes_the_best_of_the_shrunken_ranges(importance: Tensor | None) -> None:
    weight = drawn(20, 32)
    scales, minima = search(weight, Levels(2, 32, None), "mse", importance)
    low, high = weight.aminmax(dim=1, keepdim=True)
    importance = torch.ones(32) if importance is None else importance
    tried = [
        (lost(weight, factor * (high - low) / 3, factor * low, 3, importance), factor) for factor in grid_search.SHRINKS
    ]
    errors, factors = torch.stack([error for error, _ in tried]), torch.tensor([factor for _, factor in tried])
    assert torch.allclose(scales, factors[errors.argmin(0)].unsqueeze(1) * (high - low) / 3, rtol=1e-5)
    assert torch.allclose(lost(weight, scales, minima, 3, importance), errors.amin(0), rtol=1e-4)
    assert factors[errors.argmin(0)].unique().numel() > 3


def test_neuqi_at_one_bit_is_the_best_split_in_two() -> None:
    """In all but a few groups: which of all splits of the sorted weights leaves the least about two means."""
    weight, importance = drawn(50, 16), counts(16)
    scales, minima = search(weight, Levels(1, 16, None), "neuqi", importance)
    expected = []
    for row in weight:
        ordered, order = row.sort()
        count, least = importance[order], float("inf")
        for place in range(1, 16):
            halves = [(ordered[:place], count[:place]), (ordered[place:], count[place:])]
            least = min(least, float(sum((h * (x - (h * x).sum() / h.sum()) ** 2).sum() for x, h in halves)))
        expected.append(least)
    reached = lost(weight, scales, minima, 1, importance)
    ratios = reached / torch.tensor(expected)
    assert ratios.min() > 0.999 and (ratios < 1.001).float().mean() >= 0.95


@pytest.mark.parametrize("bits", [2, 3])
def test_neuqi_is_as_good_as_looking_everywhere(bits: int) -> None:
    weight, importance, top = drawn(40, 16), counts(16), 2**bits - 1
    scales, minima = search(weight, Levels(bits, 16, None), "neuqi", importance)
    low, high = weight.aminmax(dim=1, keepdim=True)
    least = torch.full((40,), float("inf"))
    for scale, place in product(torch.linspace(0.1, 1.05, 96), torch.linspace(-0.05, 0.9, 96)):
        step, minimum = scale * (high - low) / top, low + place * (high - low)
        codes = ((weight - minimum) / step).round().clamp(0, top)
        minimum = ((weight - step * codes) * importance).sum(1, keepdim=True) / importance.sum()
        least = torch.minimum(least, lost(weight, step, minimum, top, importance))
    ratios = lost(weight, scales, minima, top, importance) / least
    assert ratios.median() < 1.001 and ratios.mean() < 1.02


def test_neuqi_of_a_symmetric_format_is_the_best_scale() -> None:
    weight, importance = drawn(40, 16), counts(16)
    scales, minima = search(weight, Levels(3, 16, -4.0), "neuqi", importance)
    assert torch.allclose(minima, -4 * scales)
    widest = weight.abs().amax(1, keepdim=True) / 3
    factors = torch.cat([torch.linspace(0.05, 1.2, 2000), -torch.linspace(0.05, 1.2, 2000)])
    tried = [lost(weight, f * widest, -4 * f * widest, 7, importance) for f in factors]
    ratios = lost(weight, scales, minima, 7, importance) / torch.stack(tried).amin(0)
    assert ratios.median() < 1.001 and ratios.mean() < 1.03


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_longer_search_loses_less(bits: int, symmetric: bool) -> None:
    weight, importance, precision = drawn(30, 150), counts(150), Precision("half", bits, 64)
    errors = []
    for how in get_args(GridSearch):
        grid = choose_grid(weight, HalfGrid(symmetric), precision, how, importance)
        errors.append(float(((grid.values(grid.round(weight)) - weight).square() * importance).sum()))
    minmax, mse, neuqi = errors
    assert neuqi < mse <= minmax * 1.001


@pytest.mark.parametrize("how", get_args(GridSearch))
def test_groups_know_nothing_of_each_other(how: GridSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short last group is a group as any other; how many rows are looked at together does not matter."""
    weight, importance = drawn(9, 40), torch.stack([counts(40) * row for row in range(1, 10)])
    scales, minima = search(weight, Levels(3, 16, None), how, importance)
    assert scales.shape == minima.shape == (9, 3)
    for group, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        alone = search(weight[:, columns], Levels(3, 16, None), how, importance[:, columns])
        assert torch.allclose(alone[0][:, 0], scales[:, group]) and torch.allclose(alone[1][:, 0], minima[:, group])
    monkeypatch.setattr(grid_search, "CHUNK", 80)
    assert all(map(torch.equal, search(weight, Levels(3, 16, None), how, importance), (scales, minima)))


@pytest.mark.parametrize("how", get_args(GridSearch))
def test_importance_counts_in_proportion(how: GridSearch) -> None:
    """Of any size, tiny ones, too; where all of a group is 0 its weights count alike."""
    weight, levels, importance = drawn(9, 32), Levels(2, 16, None), counts(32)
    whole = search(weight, levels, how, importance)
    assert all(map(torch.allclose, search(weight, levels, how, importance * 1e-30), whole))
    importance[:16] = 0
    partly, alike = search(weight, levels, how, importance), search(weight, levels, how)
    assert torch.allclose(partly[0][:, 0], alike[0][:, 0]) and torch.allclose(partly[0][:, 1], whole[0][:, 1])


@pytest.mark.parametrize("how", get_args(GridSearch))
@pytest.mark.parametrize("value", [0.0, -0.25, 3.0])
def test_a_group_of_one_value_loses_nothing(how: GridSearch, value: float) -> None:
    grid = choose_grid(torch.full((2, 8), value), HalfGrid(), Precision("half", 2, 8), how)
    assert torch.equal(grid.values(grid.round(torch.full((2, 8), value))), torch.full((2, 8), value))


def test_the_grid_is_what_the_format_stores() -> None:
    grid = choose_grid(drawn(4, 32).bfloat16(), HalfGrid(), Precision("half", 4, 16), "neuqi")
    assert torch.equal(grid.scales, grid.scales.half().float()) and torch.equal(grid.minima, grid.minima.half().float())
    assert (grid.bits, grid.group, grid.scales.shape) == (4, 16, (4, 2))


def test_another_search() -> None:
    with pytest.raises(UserError, match="no grid search 'mes'. Did you mean 'mse'. Choose one of minmax, mse"):
        choose_grid(drawn(2, 8), HalfGrid(), Precision("half", 4, 8), "mes")  # type: ignore[arg-type]
