import math
import pickle

import pytest
import torch

from qpruner.training.finite import LossWatch, all_finite, broken_names, not_finite, tensors_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_value_is_found_among_tensors_of_all_types(value: float) -> None:
    good = {"codes": torch.full((3,), 255, dtype=torch.uint8), "a": torch.ones(2), "half": torch.ones(4).half()}
    assert all_finite(good.values()) and broken_names(good.items()) == []
    bad = {**good, "b": torch.tensor([0.0, value]), "c": torch.tensor(value)}
    assert not all_finite(bad.values()) and broken_names(bad.items()) == ["b", "c"]
    assert all_finite([])


def test_tensors_are_found_in_the_state_of_an_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.tensor([1.0, 1e30])
    optimizer.step()
    found = list(tensors_of([optimizer.state_dict()]))
    assert [tuple(tensor.shape) for tensor in found] == [(), (2,), (2,)]
    assert all_finite(found[:2]) and not all_finite(found)  # the square is too large


def test_the_first_step_of_any_process_is_told() -> None:
    watch = LossWatch()
    assert watch.first_broken(CPU, lambda number: number) is None
    for step, loss in enumerate([1.0, 2.0, math.nan, 1.0, math.inf], 1):
        watch.see(torch.tensor(loss), step)
        assert watch.first_broken(CPU, lambda number: number) == (3 if step >= 3 else None)
    assert watch.first_broken(CPU, lambda number: number.clamp(max=2)) == 2  # another process has it at 2
    assert LossWatch().first_broken(CPU, lambda number: number.clamp(max=7)) == 7


def test_the_remedy_depends_on_what_is_broken() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2))
    assert "The loss is not finite; what" in str(not_finite(model, "The loss is"))
    assert "--model.optimizer.lr" in str(not_finite(model, "The loss is"))
    torch.nn.init.constant_(model[1].weight, math.nan)  # what is trained is not the cause
    assert "--model.optimizer.lr" in str(not_finite(model, "The loss is"))
    assert "16-mixed" in str(not_finite(model.half(), "The loss is"))
    assert "the computation overflows. Use --trainer.precision" in str(not_finite(model[0], "The loss is"))
    torch.nn.init.constant_(model[0].bias, math.inf)
    assert "1 tensors are not, 0.bias the first. Give an undamaged model" in str(not_finite(model, "The loss is"))


def test_a_later_phase_is_mended_without_losing_those_before() -> None:
    model = torch.nn.Linear(2, 2)
    said = str(not_finite(model, "The loss is", later_phase=True))
    assert "Lower optimizer.lr of this phase in --phases" in said and "--model.optimizer.lr" not in said
    assert said.endswith("under another --run.name; --restart would throw away the phases that are over, too.")


def test_the_error_survives_the_way_to_another_process() -> None:
    error = not_finite(torch.nn.Linear(2, 2), "The loss is")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
