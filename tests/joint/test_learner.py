"""Learning, without a Trainer: the budget in the slopes, and the best gates."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.joint import BATCH, TEXT, between, learner_of

from qpruner.errors import UserError
from qpruner.joint.gates import sampled
from qpruner.joint.learner import PlanLearner, take_out
from qpruner.joint.price import smooth_bytes
from qpruner.joint.prior import loss_of
from qpruner.joint.projection import differentiable_bytes, hard
from qpruner.joint.space import unit_bytes
from qpruner.likelihood import IGNORED
from qpruner.processes import Processes


def test_slopes_lose_what_would_change_the_bytes_and_nothing_else() -> None:
    slopes, costs = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    take_out(slopes, costs)  # the component along (1, 0, 1) of (3, 1, 2) is 2.5 of it
    assert [slope.tolist() for slope in slopes] == [[0.5, 1.0], [-0.5]]
    unchanged = [torch.tensor([1.0])]
    take_out(unchanged, [torch.tensor([0.0])])
    assert unchanged[0].tolist() == [1.0]


@pytest.mark.parametrize("gates", ["plain", "layers", "hypernetwork"])
def test_a_small_step_lowers_the_loss_along_the_budget(gates: str) -> None:
    """The bytes that the slopes say stay; without the projection, nearly all gates would open."""
    learner = learner_of(gates=gates)
    learner.training_step(BATCH, 0).backward()
    learner.on_before_optimizer_step(None)  # type: ignore[arg-type]
    parameters = [*learner.gates.parameters()]
    stored = smooth_bytes(learner.space, learner.gates_of_step(learner.limits[0], 0))
    costs = torch.autograd.grad(stored, parameters, allow_unused=True, materialize_grads=True)
    along = sum(float((one.grad * cost).sum()) for one, cost in zip(parameters, costs, strict=True)
                if one.grad is not None)  # fmt: skip
    size = math.sqrt(sum(float(cost.square().sum()) for cost in costs))
    slope = math.sqrt(sum(float(one.grad.square().sum()) for one in parameters if one.grad is not None))
    assert slope > 0 and abs(along) < 1e-4 * size * slope


def test_all_micro_batches_of_a_step_count_for_the_direction_of_the_bytes() -> None:
    """Each has noise of its own; what is left of the slopes is orthogonal to the sum of their costs."""
    learner = learner_of(gates="plain")
    parameters = [*learner.gates.parameters()]

    def along_costs_of(*numbers: int) -> float:
        """Cosine between the slopes and the gradient of the bytes of these micro-batches."""
        stored = sum(smooth_bytes(learner.space, learner.gates_of_step(learner.limits[0], each)) for each in numbers)
        costs = torch.autograd.grad(stored, parameters)
        pairs = [(parameter.grad, cost) for parameter, cost in zip(parameters, costs, strict=True)]
        slopes, costs = (torch.cat([part.double().flatten() for part in parts]) for parts in zip(*pairs, strict=True))
        return float(slopes @ costs / slopes.norm() / costs.norm())

    for step in range(2):  # the second with nothing left of the first
        for parameter in parameters:
            parameter.grad = None
        for number in (2 * step, 2 * step + 1):
            learner.training_step(BATCH, number).backward()
        learner.on_before_optimizer_step(None)  # type: ignore[arg-type]
        assert abs(along_costs_of(2 * step, 2 * step + 1)) < 1e-4 < abs(along_costs_of(2 * step + 1))


def test_gates_of_a_step_are_those_of_its_number_and_within_the_budget() -> None:
    learner = learner_of()
    limit = learner.limits[0]
    first, again, other = (learner.gates_of_step(limit, number) for number in (3, 3, 4))
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    assert any(not torch.equal(first[kind], other[kind]) for kind in first)
    for gates in (first, other):
        assert set(torch.cat([values.detach().flatten() for values in gates.values()]).unique().tolist()) == {0.0, 1.0}
        assert 0.9 * limit < float(smooth_bytes(learner.space, gates).detach()) <= limit


@pytest.mark.parametrize("estimator", ["reinmax", "straight_through"])
@pytest.mark.parametrize("constraint", ["projection", "penalty"])
def test_layers_left_alone_are_whole_while_gates_learn_and_have_no_slopes(constraint: str, estimator: str) -> None:
    learner = learner_of({"alone": frozenset({1})}, constraint=constraint, estimator=estimator)
    space, kinds = learner.space, ("groups", "channels")
    for kind in kinds:  # otherwise, this layer would go first
        space.by_layer(getattr(learner, f"start_{kind}"), kind)[1].sub_(10)
    learner.training_step(BATCH, 0).backward()
    above = learner.above_threshold(learner.limits[0])
    for gates in (learner.gates_of_step(learner.limits[0], 0), hard(above, dict.fromkeys(above, 0.0))):
        assert all(space.by_layer(gates[kind], kind)[1].eq(1).all() for kind in kinds)
    for kind in kinds:
        slopes = learner.gates.shifts[kind].grad
        assert slopes.isfinite().all() and slopes.any()
        assert not space.by_layer(slopes, kind)[1].any()


def test_the_best_gates_are_taken_whatever_came_later() -> None:
    learner = learner_of()
    (start,) = learner.limits
    learner.compare_with_best()
    assert learner.best is not None and learner.best.step == 0
    assert learner.best.loss == pytest.approx(
        loss_of(learner.ground.gated, learner.logits(start), start, TEXT, Processes.alone())
    )
    expected = learner.plans()
    with torch.no_grad():
        for parameter in learner.gates.parameters():
            parameter.normal_(0, 10)
    learner.compare_with_best()
    assert learner.plans() == expected
    assert unit_bytes(expected[0], 4) <= start


def test_gates_that_are_not_finite_are_never_the_best() -> None:
    learner = learner_of()
    learner.compare_with_best()
    best = learner.best
    with torch.no_grad():
        for parameter in learner.gates.parameters():
            parameter.fill_(math.nan)
    (limit,) = learner.limits
    assert loss_of(learner.ground.gated, learner.logits(limit), limit, TEXT, Processes.alone()) == math.inf
    learner.best = replace(best, loss=math.inf)  # which everything that is finite is better than
    learner.compare_with_best()
    assert learner.best.step == 0 and learner.best.loss == math.inf


def test_a_base_that_is_not_finite_is_told_before_the_first_step() -> None:
    learner = learner_of()
    learner.start_groups.fill_(math.nan)  # so that the start is computed again
    with torch.no_grad():
        learner.ground.gated.network.model.norm.weight.fill_(math.inf)
    with pytest.raises(UserError, match="On the 4 training rows that gates begin with, the loss .* is not finite"):
        learner.on_fit_start()


@pytest.mark.parametrize(("steps", "times"), [(1, 1), (9, 9), (10, 10), (19, 10), (25, 9), (200, 10)])
def test_gates_are_compared_at_most_ten_times_and_at_the_end(
    steps: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, at = learner_of(steps=steps), list[int]()
    for step in range(steps + 1):
        monkeypatch.setattr(PlanLearner, "global_step", step)
        for _ in range(2):  # as the batches of one step
            if learner.comparison_is_due:
                learner.compared_at = step
                at.append(step)
    assert at[0] == 0 and at[-1] == steps and len(set(at)) == len(at) == times + 1


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_every_target_of_a_step_counts_the_same_however_micro_batches_share_them(loss: str) -> None:
    """As in a fit of adapters: the Trainer takes the mean of the micro-batches."""
    learner = learner_of(loss=loss)
    labels = BATCH["labels"].clone()
    for row, prompt in enumerate((2, 9, 4, 12)):
        labels[row, :prompt] = IGNORED
    batch: Any = {**BATCH, "labels": labels}
    whole = float(learner.training_step(batch, 0).detach())
    counts = (labels[:, 1:] != IGNORED).sum(1).tolist()
    assert counts == [10, 3, 8, 0]
    losses = []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):  # the last without a target
        part: Any = {name: values[rows] for name, values in batch.items()} | {"step_tokens": torch.tensor(21 / 3)}
        losses.append(float(learner.training_step(part, 0).detach()))
    assert sum(losses) / 3 == pytest.approx(whole, rel=1e-6)
    assert losses[2] == 0.0


def test_a_penalty_is_the_distance_to_the_budget_on_a_logarithmic_scale() -> None:
    """Under the same gates, whatever the budget, so that losses differ by it alone."""
    learner = learner_of(constraint="penalty", penalty=2.0)
    thresholds = learner.start_thresholds(between(learner.space))
    learner.start_thresholds = lambda limit: thresholds  # type: ignore[method-assign]
    losses = {}
    for share in (0.2, 0.5, 0.9):
        learner.limits = [between(learner.space, share)]
        loss = float(learner.training_step(BATCH, 0).detach())
        stored = float(differentiable_bytes(learner.space, learner.gates_of_step(learner.limits[0], 0)).detach())
        losses[share] = loss - 2.0 * abs(math.log(stored / learner.limits[0]))
    assert losses[0.2] == pytest.approx(losses[0.5], abs=1e-4) == losses[0.9]


def test_noise_does_not_depend_on_the_default_dtype() -> None:
    """Which is another in a step than in the projection of its gradient, where a Trainer computes in float64."""
    logits = {"groups": torch.zeros(7)}
    expected = sampled(logits, 1.0, torch.Generator().manual_seed(5))["groups"]
    torch.set_default_dtype(torch.float64)
    try:
        noisy = sampled(logits, 1.0, torch.Generator().manual_seed(5))["groups"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(noisy, expected)
