"""Costs of items among others of random widths: synthetic losses, models assembled by hand, and several processes."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.calibration import S, T, calibration, hooks_of, in_processes
from support.families import LAYERS, random_tokens, tiny_model
from support.linears import quantize_dequantize
from torch import Tensor

from qpruner.allocation.items import Item, items_of
from qpruner.allocation.marginal import MarginalRises, averaged, draw_contexts, marginal_rises
from qpruner.errors import UserError
from qpruner.plan import DENSE, Precision
from qpruner.quantization.bank import fill

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
BLOCKS = items_of(LAYERS, "block", ())
UNITS = [Item(2, ("down",)), Item(0, ("qkv", "o")), Item(1, ("gate_up",))]


def losses(contexts: Tensor, num_precisions: int, loss: Callable[[Sequence[int]], float]) -> Tensor:
    """The loss of each context with each item in each precision, [K, n, P]."""

    def changed(context: list[int], item: int, place: int) -> float:
        return loss([*context[:item], place, *context[item + 1 :]])

    table = [
        [[changed(context, item, place) for place in range(num_precisions)] for item in range(len(context))]
        for context in contexts.tolist()
    ]
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.parametrize(("num_items", "num_precisions", "num_contexts"), [(3, 2, 2), (5, 4, 6), (1, 3, 2)])
def test_an_additive_loss_is_recovered_without_error(num_items: int, num_precisions: int, num_contexts: int) -> None:
    costs = torch.randn(num_items, num_precisions, dtype=torch.float64)

    def loss(places: Sequence[int]) -> float:
        return 3.0 + sum(float(costs[item, place]) for item, place in enumerate(places))

    contexts = draw_contexts(num_items, num_precisions, num_contexts, 0)
    estimate, error = averaged(losses(contexts, num_precisions, loss))
    torch.testing.assert_close(estimate, costs - costs[:, -1:], rtol=0, atol=1e-12)
    assert error.max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_interactions_of_two_cancel_in_one_pair_of_contexts(seed: int) -> None:
    """Where single contexts are far off, a context and its mirror give the average over all."""
    n = 4
    alone, together = torch.randn(n), 5 * torch.randn(n, n)

    def loss(places: Sequence[int]) -> float:
        low = 1.0 - torch.tensor(places, dtype=torch.float)
        return float(alone @ low + low @ together.triu(1) @ low)

    exact, _ = averaged(losses(torch.tensor(list(product(range(2), repeat=n))), 2, loss))
    pair = losses(draw_contexts(n, 2, 2, seed), 2, loss)
    estimate, error = averaged(pair)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-5)
    for context in pair:
        assert ((context - context[:, -1:])[:, 0] - exact[:, 0]).abs().max() > 0.1
    assert error[:, 0].max() > 0.1 and error[:, 1].max() == 0


def test_the_error_is_that_of_a_mean_over_contexts() -> None:
    given = torch.tensor([[[1.0, 0.0]], [[3.0, 1.0]], [[9.0, 3.0]]]).double()
    estimate, error = averaged(given)
    assert estimate.tolist() == [[3.0, 0.0]]
    assert error.tolist() == [[pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3)), 0.0]]


@pytest.mark.parametrize(("num_items", "num_precisions", "num_contexts"), [(6, 2, 4), (30, 2, 2), (8, 3, 8)])
def test_every_item_meets_every_width_and_its_mirror_equally_often(
    num_items: int, num_precisions: int, num_contexts: int
) -> None:
    contexts = draw_contexts(num_items, num_precisions, num_contexts, 7)
    half = num_contexts // 2
    assert torch.equal(contexts[half:], num_precisions - 1 - contexts[:half])
    assert contexts.min() == 0 and contexts.max() == num_precisions - 1
    means = contexts.double().mean(1) / (num_precisions - 1)  # from all narrow, 0, to all wide, 1
    assert (means >= 0.2).all() and (means <= 0.8).all() and float(means.mean()) == pytest.approx(0.5)
    assert torch.equal(contexts, draw_contexts(num_items, num_precisions, num_contexts, 7))
    assert not torch.equal(contexts, draw_contexts(num_items, num_precisions, num_contexts, 8))


def test_levels_are_spread_from_few_wide_items_to_many() -> None:
    contexts = draw_contexts(80, 2, 4, 0)
    assert contexts.sum(1).tolist() == [25, 35, 55, 45]  # 80 times 5/16, 7/16, and one less these


def frozen(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, **changes).requires_grad_(False)


def bank_of(model: Any) -> Any:
    return fill(model, (NF4, INT8), None, device=torch.device("cpu"))


def assembled(model: Any, items: Sequence[Item], precisions: Sequence[Precision], places: Sequence[int]) -> Tensor:
    """Log-probabilities of a copy whose items have the weights that their precisions make of them."""
    changed = copy.deepcopy(model)
    for item, place in zip(items, places, strict=True):
        for name in item.linears(changed) if precisions[place] != DENSE else ():
            linear = changed.get_submodule(name)
            linear.weight.data = quantize_dequantize(linear.weight, precisions[place])
    with torch.no_grad():
        return changed(input_ids=random_tokens(S, T), use_cache=False).logits.double().log_softmax(-1)


def by_hand(model: Any, items: Sequence[Item], precisions: Sequence[Precision], contexts: Tensor) -> list[Tensor]:
    """Costs by KL and by loss and their errors, from models assembled one by one."""
    tokens = random_tokens(S, T)
    p = assembled(model, (), (), ())

    def kl(places: Sequence[int]) -> float:
        return float((p.exp() * (p - assembled(model, items, precisions, places))).sum(-1).mean())

    def loss(places: Sequence[int]) -> float:
        q = assembled(model, items, precisions, places)
        return float(F.nll_loss(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    by_kl, by_loss = (averaged(losses(contexts, len(precisions), measure)) for measure in (kl, loss))
    return [by_kl[0], by_loss[0], by_kl[1], by_loss[1]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize(
    ("items", "precisions", "size"),
    [(BLOCKS, (NF4, INT8), S), (UNITS, (NF4, INT8, DENSE), 4), (BLOCKS, (NF4, DENSE), 1)],
    ids=["blocks", "units", "dense"],
)
def test_costs_are_those_of_models_assembled_by_hand(
    family: str, items: Sequence[Item], precisions: Sequence[Precision], size: int
) -> None:
    model = frozen(family)
    found = marginal_rises(model, bank_of(model), items, precisions, calibration(size), num_contexts=2, seed=3)
    expected = by_hand(model, items, precisions, draw_contexts(3, len(precisions), 2, 3))
    for tensor, reference in zip(found, expected, strict=True):
        assert tensor.dtype == torch.float64 and tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, reference, rtol=1e-3, atol=2e-6)
    assert (found.kl[:, 0] > 0).all() and (found.kl[:, -1] == 0).all() and (found.loss_error[:, 0] > 0).all()
    assert "of 3 items on average" in str(found) and f"loss {float(found.loss[:, 0].mean()):.4f}" in str(found)


@pytest.mark.parametrize(("size", "processes"), [(1, 2), (4, 3)])
def test_the_number_of_processes_does_not_matter(size: int, processes: int) -> None:
    model = frozen()

    def act(given: Any) -> MarginalRises:
        own = copy.deepcopy(model)
        return marginal_rises(own, bank_of(own), BLOCKS, (NF4, INT8), given, num_contexts=2, seed=0)

    expected = act(calibration(size))
    found = in_processes(processes, size, act)
    for tensor, reference in zip(found[0], expected, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(tensor, other) for tensor, other in zip(found[0], found[-1], strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = frozen(attention_dropout=0.5).train(training)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    marginal_rises(model, bank_of(model), UNITS, (NF4, INT8), calibration(), num_contexts=2, seed=0)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(p is parameters[name] and torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert {module.training for module in model.modules()} == {training} and hooks_of(model) == 0


def test_costs_that_are_not_finite_are_told_and_the_model_is_whole() -> None:
    model = frozen()
    bank = bank_of(model)
    bank.tensors["model.layers.1.mlp.down_proj/int8-8-default/scales"].fill_(float("inf"))
    with pytest.raises(UserError, match="among others is not finite"):
        marginal_rises(model, bank, BLOCKS, (NF4, INT8), calibration(), num_contexts=2, seed=0)
    assert not any(hasattr(module, "precision") for module in model.modules())
