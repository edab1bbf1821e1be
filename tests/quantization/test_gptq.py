"""GPTQ against the loop that its equations describe, and that loop against the least of what it expands."""

import pytest
import torch
from support.grids import HalfGrid, choose_grid, correlated
from torch import Tensor

from qpruner.errors import UserError
from qpruner.plan import Precision
from qpruner.quantization.gptq import Factor, damped, gptq
from qpruner.quantization.grid import Grid
from qpruner.quantization.grid_search import Levels, search


def drawn(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def hessian_of(columns: int) -> Tensor:
    inputs = correlated(3 * columns, columns)
    return damped(inputs.T @ inputs, 0.01)


def step(now: Tensor, original: Tensor, hessian: Tensor, value: Tensor, first_order: float) -> Tensor:
    """The columns that are left [O, n], once the first of them has its rounded values [O]; first-order share first."""
    now = now - first_order * (now - original)
    inverse = hessian.inverse()
    return now - torch.outer(now[:, 0] - value, inverse[0] / inverse[0, 0])


def by_hand(weight: Tensor, hessian: Tensor, grid: Grid, order: list[int], first_order: float = 0.0) -> Tensor:
    """Optimal brain quantization in a given order: for each column the inverse of what is left of H is found anew."""
    now, original, codes = weight.double(), weight.double(), torch.zeros_like(weight, dtype=torch.uint8)
    for place, q in enumerate(order):
        left = order[place:]
        ready = now[:, q] - first_order * (now[:, q] - original[:, q])
        codes[:, q] = grid.round(ready.unsqueeze(1).float(), first=q)[:, 0]
        value = grid.values(codes[:, q : q + 1], first=q)[:, 0].double()
        now[:, left] = step(now[:, left], original[:, left], hessian[left][:, left], value, first_order)
    return codes


def on(grid: Grid):  # type: ignore[no-untyped-def]
    return lambda group, weights: (grid.scales[:, group], grid.minima[:, group])


def share_of_equal_rows(codes: Tensor, expected: Tensor) -> float:
    """Float32 beside float64: a weight in the middle of two values may go either way, and the row's rest with it."""
    return float((codes == expected).all(1).float().mean())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("first_order", [0.0, 0.03])
@pytest.mark.parametrize("columns", [40, 300])  # in one block; in three, the last of them short
def test_is_optimal_brain_quantization(act_order: bool, first_order: float, columns: int) -> None:
    weight, hessian = drawn(20, columns), hessian_of(columns)
    grid = choose_grid(weight, HalfGrid(), Precision("half", 3, 32), "mse")
    factor = Factor.of(hessian, act_order=act_order, name="layer")
    codes = gptq(weight, factor, Levels(3, 32, None).spans(0, weight.shape[1]), on(grid), first_order=first_order)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(columns))
    assert codes.dtype == torch.uint8
    assert share_of_equal_rows(codes, by_hand(weight, hessian, grid, order, first_order)) >= 0.9
    assert not torch.equal(codes, grid.round(weight))


@pytest.mark.parametrize("first_order", [0.0, 0.1])
def test_a_step_is_the_least_of_the_expansion(first_order: float) -> None:
    """The conditions of the least of beta g d + d H d with d_q given, g the gradient of D H D by finite differences."""
    now, original, hessian = drawn(1, 6).double(), drawn(1, 6, seed=2).double(), hessian_of(6)
    value = torch.tensor([0.2], dtype=torch.float64)

    def strayed(weights: Tensor) -> Tensor:
        return ((weights - original) @ hessian * (weights - original)).sum()

    width = 1e-4
    gradient = torch.stack([(strayed(now + e) - strayed(now - e)) / (2 * width) for e in width * torch.eye(6)])
    # [2 H, e_q; e_q^T, 0] [d; multiplier] = [-beta g; value - w_q]
    conditions = torch.zeros(7, 7, dtype=torch.float64)
    conditions[:6, :6] = 2 * hessian
    conditions[0, 6] = conditions[6, 0] = 1
    change = torch.linalg.solve(conditions, torch.cat([-first_order * gradient, value - now[0, :1]]))[:6]
    assert torch.allclose(step(now, original, hessian, value, first_order)[0], now[0] + change, atol=1e-6)
    if first_order:
        assert strayed(now - first_order * (now - original)) < strayed(now)  # the share leads downhill


@pytest.mark.parametrize("group", [48, 100, 200])  # more than a block holds, one that no block ends with, and longer
def test_a_fresh_grid_is_of_the_weights_as_they_are_when_their_turn_comes(group: int) -> None:
    weight, hessian, levels = drawn(12, 250), hessian_of(250), Levels(3, group, None)
    seen, given = [], []

    def choose(number: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        scales, minima = search(weights.contiguous(), levels, "minmax")
        seen.append(weights.clone())
        given.append((scales, minima))
        return scales[:, 0], minima[:, 0]

    codes = gptq(
        weight, Factor.of(hessian, act_order=False, name="layer"), levels.spans(0, 250), choose, first_order=0.0
    )
    scales, minima = (torch.cat(parts, 1) for parts in zip(*given, strict=True))
    values = Grid(scales, minima, 3, group).values(codes)
    assert [part.shape[1] for part in seen] == [min(group, 250 - first) for first in range(0, 250, group)]
    for number, weights in enumerate(seen):  # the best that columns can be for those before them, by least squares
        first = number * group
        before, behind = hessian[:first, first:], hessian[first:, first:]
        expected = weight[:, first:] + (weight - values)[:, :first].double() @ before @ behind.inverse()
        assert torch.allclose(weights.double(), expected[:, : weights.shape[1]], atol=1e-4)


def test_damping_is_in_units_of_the_mean_and_never_nothing() -> None:
    hessian = torch.diag(torch.tensor([0.0, 1.0, 5.0]))
    assert torch.equal(damped(hessian, 0.5).diagonal(), torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert torch.equal(damped(torch.zeros(2, 3, 3), 0.5), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_a_hessian_that_is_none() -> None:
    with pytest.raises(UserError, match="Hessian of layer is not positive.*Give more calibration text, raise"):
        Factor.of(damped(-torch.eye(3) + 2, 0.01), act_order=False, name="layer")
