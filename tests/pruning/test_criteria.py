import pytest
import torch
from torch import Tensor, nn

from qpruner.anatomy import Coupled
from qpruner.pruning.criteria import (
    Aggregate,
    GradientCriterion,
    aggregate,
    element_scores,
    fluctuation,
    magnitude,
    sum_by_unit,
    wanda,
)

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
GRADIENT = torch.tensor([[0.5, 0.25], [-1.0, 4.0]])
SQUARED = torch.tensor([[2.0, 1.0], [0.0, 16.0]])


def coupled(weight: list[list[float]], axis: int, width: int, dtype: torch.dtype = torch.float32) -> Coupled:
    linear = nn.Linear(len(weight[0]), len(weight), dtype=dtype)
    linear.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
    return Coupled("w", linear, axis, width, linear.weight.shape[axis] // width)


GRID = [[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, -7.0, 8.0], [0.0, 1.0, 0.0, -1.0], [2.0, 2.0, 2.0, 2.0]]
ROWS, COLUMNS = coupled(GRID, 0, 2), coupled(GRID, 1, 2)


@pytest.mark.parametrize(
    ("criterion", "squared", "expected"),
    [
        ("vectorize", None, [[0.5, -0.5], [-3.0, 2.0]]),
        ("param_first", None, [[0.5, 0.5], [3.0, 2.0]]),
        ("param_second", SQUARED, [[2.0, 4.0], [0.0, 4.0]]),
        ("param_mix", SQUARED, [[0.5, 2.5], [3.0, 0.0]]),
    ],
)
def test_element_scores_by_hand(
    criterion: GradientCriterion, squared: Tensor | None, expected: list[list[float]]
) -> None:
    assert element_scores(criterion, WEIGHT, GRADIENT, squared).tolist() == expected


def test_mixed_score_is_what_a_quadratic_loss_changes_by_without_the_weight() -> None:
    """L(w) = a w + h w^2 / 2 has H = h everywhere, here also the Fisher information F = mean of g_n^2 = h."""
    for a, h, w in [(1.0, 2.0, 0.7), (1.0, 2.0, -0.7), (-0.3, 5.0, 0.4), (2.0, 1.0, -8.0), (0.0, 3.0, 1.5)]:

        def loss(x: float, a: float = a, h: float = h) -> float:
            return a * x + h * x * x / 2

        slope = a + h * w
        score = element_scores("param_mix", *(torch.tensor([[x]], dtype=torch.float64) for x in (w, slope, h)))
        assert float(score) == pytest.approx(abs(loss(0.0) - loss(w)), rel=1e-12)


def test_units_are_blocks_of_rows_or_columns() -> None:
    values = torch.arange(16.0).reshape(4, 4)
    assert ROWS.num_units == COLUMNS.num_units == 2
    assert ROWS.by_unit(values).flatten(1).tolist() == [[*range(8)], [*range(8, 16)]]
    assert COLUMNS.by_unit(values)[1].T.tolist() == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert coupled(GRID, 0, 1).by_unit(values).shape == (4, 1, 4)
    assert coupled([[1.0] * 6] * 4, 1, 3).by_unit(torch.zeros(4, 6)).shape == (2, 3, 4)


def test_a_bias_goes_by_rows() -> None:
    assert ROWS.by_unit(torch.arange(4.0)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (ROWS, [1 - 2 + 3 - 4 + 5 + 6 - 7 + 8, 8]),
        (COLUMNS, [1 - 2 + 5 + 6 + 0 + 1 + 4, 3 - 4 - 7 + 8 - 1 + 4]),
        (coupled(GRID, 0, 1), [-2, 12, 0, 8]),
        (coupled(GRID, 1, 1), [8, 7, -2, 5]),
        (coupled(GRID, 0, 4), [18]),
    ],
)
def test_sum_by_unit_by_hand(unit: Coupled, expected: list[float]) -> None:
    total = sum_by_unit(unit, torch.tensor(GRID))
    assert total.tolist() == expected
    assert total.dtype == torch.float64


def test_sums_are_taken_in_double_precision() -> None:
    unit = coupled([[1e8, 1.0, -1e8, 1.0]], 0, 1)
    assert sum_by_unit(unit, unit.linear.weight.detach()).tolist() == [2.0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_norm_of_the_slice(order: int, dtype: torch.dtype) -> None:
    for unit in (coupled(GRID, 0, 2, dtype), coupled(GRID, 1, 2, dtype), coupled(GRID, 1, 1, dtype)):
        weight = unit.linear.weight.detach().double()
        slices = weight.split(unit.width, dim=unit.axis)
        expected = [float(torch.linalg.norm(part.flatten(), order)) for part in slices]
        assert magnitude(unit, order).tolist() == pytest.approx(expected, rel=1e-12)
    assert magnitude(coupled([[3.0, -4.0]], 0, 1), order).tolist() == [7.0 if order == 1 else 5.0]


def test_wanda_by_hand() -> None:
    norms = torch.tensor([1.0, 10.0, 0.0, 100.0])
    by_row = [1 + 20 + 400, 5 + 60 + 800, 10 + 100, 2 + 20 + 200]
    assert wanda(coupled(GRID, 0, 1), norms).tolist() == by_row
    assert wanda(ROWS, norms).tolist() == [by_row[0] + by_row[1], by_row[2] + by_row[3]]
    assert wanda(coupled(GRID, 1, 1), norms).tolist() == [8, 110, 0, 1500]
    assert wanda(COLUMNS, norms).tolist() == [118, 1500]


def test_fluctuation_by_hand() -> None:
    """Columns score 1 * 25, 10 * 4, 0 * 9 and 3 * 5: mean 20, squared deviations 25, 400, 400 and 25."""
    weight = [[3.0, 0.0, 3.0, 1.0], [-4.0, 2.0, 0.0, 2.0]]
    variance = torch.tensor([1.0, 10.0, 0.0, 3.0], dtype=torch.float64)
    columns = [(score - 20) / 212.5**0.5 for score in (25, 40, 0, 15)]
    assert fluctuation([coupled(weight, 1, 1)], [variance]).tolist() == pytest.approx(columns, rel=1e-12)
    by_pair = [(columns[0] + columns[1]) / 2, (columns[2] + columns[3]) / 2]
    assert fluctuation([coupled(weight, 1, 2)], [variance]).tolist() == pytest.approx(by_pair, rel=1e-12)


def test_units_of_a_layer_that_nothing_moves_are_all_at_its_mean() -> None:
    assert fluctuation([COLUMNS], [torch.zeros(4)]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("sum", [9.0, 3.5]), ("prod", [24.0, 0.0]), ("max", [4.0, 3.0]), ("mean", [3.0, 3.5 / 3]), ("first", [2.0, 0.5])],
)
def test_aggregates_by_hand(how: Aggregate, expected: list[float]) -> None:
    scores = [torch.tensor(pair, dtype=torch.float64) for pair in ([2.0, 0.5], [3.0, 0.0], [4.0, 3.0])]
    assert aggregate(scores, how).tolist() == pytest.approx(expected, rel=1e-15)
