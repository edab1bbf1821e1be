"""Calibrated rounding against loops that do by hand, column by column, what the equations say."""

from dataclasses import replace

import pytest
import torch
from support.grids import HalfGrid, correlated
from torch import Tensor

from qpruner.plan import Precision
from qpruner.quantization.grid import Grid
from qpruner.quantization.grid_search import choose_grid
from qpruner.quantization.rounding import RoundingConfig, round_weight

PLAIN = RoundingConfig(method="gptq", grid="mse", act_order=False, first_order=0.0)


def drawn(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs


def by_hand(
    weight: Tensor, hessian: Tensor, grid: Grid, damping: float, order: list[int], first_order: float = 0.0
) -> Tensor:
    """Optimal brain quantization in a given order: for each column the inverse of what is left of H is made anew."""
    hessian = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    now, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.uint8)
    for place, q in enumerate(order):
        left = order[place:]
        now[:, left] -= first_order * (now[:, left] - weight.double()[:, left])
        codes[:, q] = grid.round(now[:, q : q + 1].float(), first=q)[:, 0]
        inverse = hessian[left][:, left].inverse()
        away = now[:, q] - grid.values(codes[:, q : q + 1], first=q)[:, 0].double()
        now[:, left] -= torch.outer(away, inverse[0] / inverse[0, 0])
    return codes


def same_but_for_ties(codes: Tensor, expected: Tensor) -> bool:
    """Float32 beside float64: a weight in the middle of two values may go either way, with a row's rest behind it."""
    return float((codes == expected).all(1).float().mean()) >= 0.9


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("first_order", [0.0, 0.03])
@pytest.mark.parametrize("columns", [40, 300])  # in one block; in three, the last of them short
def test_gptq_is_optimal_brain_quantization(act_order: bool, first_order: float, columns: int) -> None:
    weight, hessian = drawn(20, columns), hessian_of(correlated(900, columns))
    precision = Precision("half", 3, 1024)  # one group: its grid is chosen before anything moves
    config = replace(PLAIN, act_order=act_order, first_order=first_order)
    rounded = round_weight(weight, HalfGrid(), precision, hessian, config)
    grid = choose_grid(weight, HalfGrid(), precision, "mse")
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(columns))
    assert torch.equal(rounded.grid.scales, grid.scales)
    assert same_but_for_ties(rounded.codes, by_hand(weight, hessian, grid, config.damping, order, first_order))


def test_nearest_is_plain_rounding() -> None:
    weight, precision = drawn(9, 70), Precision("half", 4, 32)
    config = RoundingConfig(method="nearest", grid="minmax")
    rounded = round_weight(weight, HalfGrid(), precision, hessian_of(correlated(200, 70)), config)
    grid = choose_grid(weight, HalfGrid(), precision, "minmax")
    assert torch.equal(rounded.codes, grid.round(weight))
    assert torch.equal(rounded.values, grid.values(grid.round(weight)))
