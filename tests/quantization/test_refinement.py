"""Refinement against least squares and against trying every value."""

import pytest
import torch
from support.grids import HalfGrid, choose_grid, correlated
from torch import Tensor

from qpruner.plan import Precision
from qpruner.quantization import refinement
from qpruner.quantization.gptq import damped
from qpruner.quantization.grid import Grid, GridOfTwo
from qpruner.quantization.grid_search import Levels
from qpruner.quantization.refinement import losses, refitted, swept


def layer(rows: int, columns: int, group: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """A weight, its codes, its damped Hessian and its grid."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1
    inputs = correlated(3 * columns, columns)
    grid = choose_grid(weight, HalfGrid(symmetric), Precision("half", 3, group), "minmax")
    return weight, grid.round(weight), damped(inputs.T @ inputs, 0.01), grid


def test_losses_are_what_outputs_lack() -> None:
    weight, codes, hessian, grid = layer(5, 24, 8)
    root = torch.linalg.cholesky(hessian)
    lacking = ((weight - grid.values(codes)).double() @ root).square().sum(1)
    assert torch.allclose(losses(weight, grid.values(codes), hessian).double(), lacking, rtol=1e-4)


@pytest.mark.parametrize(("columns", "group"), [(24, 8), (21, 8), (20, 1024)])  # whole groups, a short one, a row
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_for_given_codes_is_that_of_least_squares(
    columns: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of outputs on inputs that have the Hessian: rows of L^T with L L^T = H."""
    weight, codes, hessian, grid = layer(5, columns, group, symmetric=symmetric)
    monkeypatch.setattr(refinement, "CHUNK", 2 * columns * grid.scales.shape[1])  # two rows at a time
    spans = Levels(3, group, -4.0 if symmetric else None).spans(0, columns)
    scales, minima = refitted(weight, codes, hessian, grid, spans)
    inputs = torch.linalg.cholesky(hessian).T
    belongs = torch.nn.functional.one_hot(torch.arange(columns) // group).double()  # [I, M]
    for row in range(5):
        basis = belongs * (codes[row].double() - (4 if symmetric else 0)).unsqueeze(1)
        if not symmetric:
            basis = torch.cat([basis, belongs], 1)
        fitted = torch.linalg.lstsq(inputs @ basis, (inputs @ weight[row].double()).unsqueeze(1)).solution[:, 0]
        values = Grid(scales, minima, 3, group).values(codes)[row].double()
        assert torch.allclose(values, basis @ fitted, atol=1e-4)
    better = losses(weight, Grid(scales, minima, 3, group).values(codes), hessian)
    assert (better < losses(weight, grid.values(codes), hessian)).all()


@pytest.mark.parametrize("symmetric", [(False, True), (True, False), (True, True)])
def test_the_grid_of_two_segments_is_that_of_least_squares_over_both(symmetric: tuple[bool, bool]) -> None:
    """Ten columns of 3 bits in a group of 8 and a short one, and 14 of 2 bits in groups of 7."""
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)) * 0.1
    inputs = correlated(72, 24)
    hessian, grids, spans = damped(inputs.T @ inputs, 0.01), [], []
    for first, last, bits, group, only_scales in ((0, 10, 3, 8, symmetric[0]), (10, 24, 2, 7, symmetric[1])):
        precision = Precision("half", bits, group)
        grids.append(choose_grid(weight[:, first:last], HalfGrid(only_scales), precision, "minmax"))
        spans += Levels(bits, group, -(2.0 ** (bits - 1)) if only_scales else None).spans(first, last)
    two = GridOfTwo(grids[0], 10, grids[1])
    codes = two.round(weight)
    changed = two.on(*refitted(weight, codes, hessian, two, spans))
    roots = torch.linalg.cholesky(hessian).T
    belongs = torch.zeros(24, 4, dtype=torch.float64)
    for number, (first, last) in enumerate(((0, 8), (8, 10), (10, 17), (17, 24))):
        belongs[first:last, number] = 1
    zero = torch.tensor([4.0 * symmetric[0]] * 10 + [2.0 * symmetric[1]] * 14, dtype=torch.float64)
    free = [number for number in range(4) if not symmetric[number > 1]]
    for row in range(5):
        basis = torch.cat([belongs * (codes[row] - zero).unsqueeze(1), belongs[:, free]], 1)
        fitted = torch.linalg.lstsq(roots @ basis, (roots @ weight[row].double()).unsqueeze(1)).solution[:, 0]
        assert torch.allclose(changed.values(codes)[row].double(), basis @ fitted, atol=1e-4)
    swept_codes = swept(weight, codes, hessian, two, spans)
    assert swept_codes[:, 10:].max() <= 3 < swept_codes[:, :10].max()
    assert (losses(weight, two.values(swept_codes), hessian) < losses(weight, two.values(codes), hessian)).all()


def test_where_codes_do_not_tell_the_grid_is_a_grid_still() -> None:
    """All codes of a group are one: scale and minimum cannot be told apart."""
    weight, codes, hessian, grid = layer(5, 24, 8)
    codes[:, :8] = 0
    codes[0] = 3
    scales, minima = refitted(weight, codes, hessian, grid, Levels(3, 8, None).spans(0, 24))
    assert scales.isfinite().all() and minima.isfinite().all() and (scales > 0).all()
    assert torch.allclose(scales[1:, 0], grid.scales[1:, 0], rtol=1e-3)


@pytest.mark.parametrize("columns", [24, 300])  # within a block, and beyond
def test_a_sweep_takes_the_best_value_for_each_column_in_turn(columns: int) -> None:
    weight, codes, hessian, grid = layer(6, columns, 32)
    now = grid.values(codes).double()
    expected = codes.clone()
    for column in range(columns):
        tried = []
        for code in range(8):
            trial = now.clone()
            trial[:, column] = grid.values(torch.full((6, 1), code), first=column)[:, 0].double()
            away = weight.double() - trial
            tried.append((away @ hessian * away).sum(1))
        expected[:, column] = torch.stack(tried).argmin(0).to(torch.uint8)
        now[:, column] = grid.values(expected[:, column : column + 1], first=column)[:, 0].double()
    reached = swept(weight, codes, hessian, grid, Levels(3, 32, None).spans(0, columns))
    assert (reached == expected).all(1).float().mean() >= 0.8  # float32 beside float64: a tie, and the row behind it
    assert (losses(weight, grid.values(reached), hessian) < losses(weight, grid.values(codes), hessian)).all()
