"""Orders and costs of removal against least squares solved from scratch."""

import pytest
import torch
from torch import Tensor

from qpruner.pruning import reconstruction
from qpruner.pruning.reconstruction import deal, greedy_removal

TINY_RIDGE = 1e-12


def layer(columns: int, out: int = 5, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in], and inputs [tokens, in] that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((out, columns), (tokens, columns), (columns, columns))
    )
    return weight, inputs @ mix


def error_without(weight: Tensor, inputs: Tensor, units: list[int], width: int) -> float:
    """Squared error of the output when the columns of some units are gone and the others fitted."""
    gone = {unit * width + place for unit in units for place in range(width)}
    stay = [column for column in range(weight.shape[1]) if column not in gone]
    wanted = inputs @ weight.T
    fitted = torch.linalg.lstsq(inputs[:, stay], wanted).solution
    return float((inputs[:, stay] @ fitted - wanted).square().sum())


def exhaustive(weight: Tensor, inputs: Tensor, width: int) -> tuple[list[int], list[float]]:
    """Each time the unit whose removal, with all before, leaves the least error; everything is solved anew."""
    left, order, errors = list(range(weight.shape[1] // width)), [], [0.0]
    while left:
        tried = {unit: error_without(weight, inputs, [*order, unit], width) for unit in left}
        order.append(min(tried, key=tried.__getitem__))
        errors.append(tried[order[-1]])
        left.remove(order[-1])
    return order, [after - before for before, after in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize("pending", [64, 3, 1])
@pytest.mark.parametrize(("columns", "width"), [(14, 1), (14, 2), (12, 3), (12, 6), (7, 7), (1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_order_and_costs_are_those_of_an_exhaustive_choice_step_by_step(
    columns: int, width: int, pending: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "PENDING", pending)
    weight, inputs = layer(columns, seed=seed)
    order, costs = exhaustive(weight, inputs, width)
    found = greedy_removal(weight, inputs.T @ inputs, width, TINY_RIDGE)
    assert found.order.tolist() == order
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-6)
    if columns // width > 4:  # costs of the dense layer alone say something else
        alone = [error_without(weight, inputs, [unit], width) for unit in range(columns // width)]
        assert sorted(range(columns // width), key=alone.__getitem__) != order


def test_order_of_many_units_is_that_of_matrices_kept_up_to_date_at_every_step() -> None:
    weight, inputs = layer(150, out=20, tokens=300)
    gram = inputs.T @ inputs
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(150, dtype=torch.float64))
    order, costs = [], []
    for _ in range(150):
        of_units = weight.square().sum(0) / inverse.diagonal()
        of_units[order] = torch.inf
        unit = int(of_units.argmin())
        row = inverse[unit] / inverse[unit, unit]
        order.append(unit)
        costs.append(float(of_units[unit]))
        weight = weight - torch.outer(weight[:, unit], row)
        inverse = inverse - torch.outer(inverse[unit], row)
        inverse[order, order] = 1.0
    found = greedy_removal(layer(150, out=20, tokens=300)[0], gram, 1)
    assert found.order.tolist() == order
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-6)


def test_costs_add_up_to_all_that_the_output_was() -> None:
    weight, inputs = layer(30)
    costs = greedy_removal(weight, inputs.T @ inputs, 3, TINY_RIDGE).costs
    assert float(costs.sum()) == pytest.approx(float((inputs @ weight.T).square().sum()), rel=1e-6)
    assert bool((costs >= 0).all())


def test_the_ridge_counts_the_change_of_the_weights() -> None:
    """As so many more tokens that are one channel alone."""
    weight, inputs = layer(10)
    gram = inputs.T @ inputs
    more = torch.cat([inputs, (0.3 * gram.diagonal().mean()).sqrt() * torch.eye(10, dtype=torch.float64)])
    order, costs = exhaustive(weight, more, 2)
    found = greedy_removal(weight, gram, 2, 0.3)
    assert found.order.tolist() == order
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-6)


@pytest.mark.parametrize("width", [1, 2])
def test_dead_units_cost_nothing_and_go_first(width: int) -> None:
    weight, inputs = layer(12)
    weight[:, 4:6] = 0
    inputs[:, 8:10] = 0
    found = greedy_removal(weight, inputs.T @ inputs, width)
    dead = {column // width for column in (4, 5, 8, 9)}
    assert set(found.order[: len(dead)].tolist()) == dead
    assert not found.costs[: len(dead)].any()
    assert bool((found.costs[len(dead) :] > 0).all())


def test_a_layer_without_any_input_costs_nothing() -> None:
    found = greedy_removal(torch.ones(3, 6), torch.zeros(6, 6), 2)
    assert found.order.tolist() == [0, 1, 2]
    assert found.costs.tolist() == [0, 0, 0]


def test_of_two_units_that_say_the_same_the_second_costs_all() -> None:
    """A copy is free to go as long as the other is there, which then carries both."""
    weight, inputs = layer(6)
    inputs[:, 5] = inputs[:, 2]
    found = greedy_removal(weight, inputs.T @ inputs, 1, 1e-9)
    assert int(found.order[0]) in (2, 5)
    assert float(found.costs[0]) < 1e-6 * float(found.costs[1])
    merged = weight[:, :5].clone()
    merged[:, 2] += weight[:, 5]
    rest = greedy_removal(merged, inputs[:, :5].T @ inputs[:, :5], 1, 1e-9)
    assert [int(unit) % 3 if unit in (2, 5) else int(unit) for unit in found.order[1:]] == [
        int(unit) % 3 if unit == 2 else int(unit) for unit in rest.order
    ]
    assert found.costs[1:].tolist() == pytest.approx(rest.costs.tolist(), rel=1e-4)


def test_the_order_does_not_depend_on_the_scale_of_inputs_or_the_format_of_weights() -> None:
    weight, inputs = layer(20)
    gram = inputs.T @ inputs
    weight = weight.to(torch.bfloat16)
    order = greedy_removal(weight.double(), gram, 1).order
    for found in (greedy_removal(weight, gram, 1), greedy_removal(weight, 1e-6 * gram, 1)):
        assert torch.equal(found.order, order)
        assert found.costs.dtype == torch.float64


def test_scores_are_dealt_along_an_order() -> None:
    scores, order = torch.tensor([5.0, 1.0, 4.0, 1.0]), torch.tensor([2, 0, 3, 1])
    assert deal(scores, order).tolist() == [1.0, 5.0, 1.0, 4.0]
