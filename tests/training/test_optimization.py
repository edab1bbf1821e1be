import math

import pytest
import torch
from torch.nn import Parameter

from qpruner.errors import UserError
from qpruner.training.optimization import OptimizerConfig, lr_factor, make_optimizer, make_scheduler


def test_schedules_by_hand() -> None:
    cosine = OptimizerConfig(schedule="cosine", warmup_steps=3, final_lr=0.1)
    assert [lr_factor(cosine, step, 13) for step in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(cosine, 8, 13) == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert lr_factor(cosine, 5, 13) == pytest.approx(1 - 0.9 * (0.5 - 0.5 * math.cos(math.pi / 5)))
    assert lr_factor(cosine, 13, 13) == pytest.approx(0.1)
    assert lr_factor(cosine, 20, 13) == pytest.approx(0.1)
    linear = OptimizerConfig(schedule="linear")
    assert [lr_factor(linear, step, 4) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert lr_factor(OptimizerConfig(schedule="constant", warmup_steps=1), 99, 100) == 1.0


def test_the_number_of_steps_is_not_asked_for_before_the_second_step() -> None:
    asked = []
    optimizer = make_optimizer(OptimizerConfig(), [Parameter(torch.ones(1))])
    scheduler = make_scheduler(OptimizerConfig(schedule="linear"), optimizer, lambda: asked.append(1) or 10)
    assert not asked
    optimizer.step()
    scheduler.step()
    assert asked == [1]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_trains_equal_parameters_and_leaves_frozen_ones(name: str) -> None:
    # Two parameters of equal value are two parameters; 64 x 64 is the size from which on bitsandbytes uses 8 bits.
    first, second, frozen = (Parameter(torch.zeros(64, 64), requires_grad=flag) for flag in (True, True, False))
    optimizer = make_optimizer(OptimizerConfig(name=name, lr=0.1), [first, second, frozen])  # type: ignore[arg-type]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(first), id(second)]
    for _ in range(3):
        optimizer.zero_grad()
        (first.sum() + 2 * second.sum() + frozen.sum()).backward()
        optimizer.step()
    for parameter in (first, second):
        assert torch.allclose(parameter, torch.full_like(parameter, -0.3), atol=1e-3)
    assert frozen.abs().max() == 0
    bits = {
        state.dtype
        for p in optimizer.state.values()
        for state in p.values()
        if torch.is_tensor(state) and state.numel() > 1000
    }
    assert bits == ({torch.uint8} if name.endswith("8bit") else {torch.float32})


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": -1}, {"final_lr": 1.5}, {"warmup_steps": -1}, {"beta2": 1.0}, {"weight_decay": -0.1}]
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)  # type: ignore[arg-type]
