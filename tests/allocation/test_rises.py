"""Measured rises against a model that was quantized by hand, and their first order against a plain backward pass."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.calibration import S, T, calibration, hooks_of, in_processes
from support.families import LAYERS, random_tokens, tiny_model
from support.linears import quantize_dequantize
from torch import Tensor

from qpruner.allocation.items import Item, items_of
from qpruner.allocation.rises import first_order_rises, measured_rises
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS, Precision
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import fill

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
BOTH = (NF4, INT8)
BLOCKS, SOME = items_of(LAYERS, "block", ()), [Item(0, ("o",)), Item(2, ("qkv",)), Item(1, ("gate_up", "down"))]
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
START = LoftQSettings(4, 4.0, ("q_proj", "down_proj"), 3, 0)


def frozen(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(family, **changes).requires_grad_(False)


def bank_of(model: Any, precisions: Sequence[Precision] = BOTH, start: LoftQSettings | None = None) -> Any:
    return fill(model, precisions, start, device=torch.device("cpu"))


def rounded(model: Any, item: Item, precision: Precision) -> Any:
    """A copy whose item has the weights that a precision makes of it."""
    changed = copy.deepcopy(model)
    for name in item.linears(changed):
        linear = changed.get_submodule(name)
        linear.weight.data = quantize_dequantize(linear.weight, precision)
    return changed


def log_probabilities(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(S, T), use_cache=False).logits.double().log_softmax(-1)


def naive(model: Any, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """KL and rise of the loss; [items, 2]."""
    p, tokens = log_probabilities(model), random_tokens(S, T)
    kl, loss = torch.zeros(len(items), 2), torch.zeros(len(items), 2)
    for row, item in enumerate(items):
        for column, precision in enumerate(BOTH):
            q = log_probabilities(rounded(model, item, precision))
            kl[row, column] = (p.exp() * (p - q)).sum(-1).mean()
            nll = [F.nll_loss(one[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for one in (q, p)]
            loss[row, column] = nll[0] - nll[1]
    return kl, loss


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-4, atol=1e-6)


@FAMILIES
@pytest.mark.parametrize("size", [S, 4, 1])
def test_measured_rises_are_those_of_models_quantized_by_hand(family: str, size: int) -> None:
    model = frozen(family)
    kl, loss = measured_rises(model, bank_of(model), SOME, BOTH, calibration(size))
    expected_kl, expected_loss = naive(model, SOME)
    assert_close(kl, expected_kl)
    assert_close(loss, expected_loss)
    assert (kl[:, 0] > 10 * kl[:, 1]).all() and (kl[:, 1] > 0).all()
    # The other direction differs by more than what is allowed for.
    p, q = log_probabilities(model), log_probabilities(rounded(model, SOME[2], NF4))
    assert float((q.exp() * (q - p)).sum(-1).mean()) != pytest.approx(float(kl[2, 0]), rel=1e-3)


def test_more_bits_cost_less_and_dense_nothing() -> None:
    model = frozen()
    kl, loss = measured_rises(model, bank_of(model), BLOCKS, (INT8, DENSE, NF4), calibration(4))
    assert (kl[:, 0] < kl[:, 2]).all() and kl[:, 0].mean() < kl[:, 2].mean()
    assert torch.equal(kl[:, 1], torch.zeros(LAYERS).double()) and torch.equal(loss[:, 1], torch.zeros(LAYERS).double())


def test_what_is_measured_is_the_weight_in_the_bank() -> None:
    """LoftQ of several iterations rounds another weight than that of the model."""
    model = frozen()
    item, bank = Item(1, ("qkv", "down")), bank_of(model, [NF4], START)
    changed = copy.deepcopy(model)
    for name in item.linears(changed):
        changed.get_submodule(name).weight.data = bank.weight(name, NF4, torch.device("cpu"))
    expected = F.kl_div(log_probabilities(changed), log_probabilities(model), log_target=True, reduction="sum") / (
        S * T
    )
    kl, _ = measured_rises(model, bank, [item], [NF4], calibration())
    assert_close(kl, expected.view(1, 1))
    assert float(kl) != pytest.approx(float(measured_rises(model, bank_of(model), [item], [NF4], calibration())[0]))
    assert_close(
        first_order_rises(model, bank, [item], [NF4], calibration()),
        plain_first_order(model, item, lambda name, _: bank.weight(name, NF4, torch.device("cpu"))).view(1, 1),
    )


@pytest.mark.parametrize(("size", "processes"), [(1, 2), (4, 2), (4, 3)])
def test_the_number_of_processes_does_not_matter(size: int, processes: int) -> None:
    model = frozen()
    expected = measured_rises(model, bank_of(model), BLOCKS, BOTH, calibration(size))
    gradients = first_order_rises(model, bank_of(model), BLOCKS, BOTH, calibration(size))

    def act(given: Calibration) -> tuple[Tensor, Tensor, Tensor]:
        own = copy.deepcopy(model)
        bank = bank_of(own)
        return *measured_rises(own, bank, BLOCKS, BOTH, given), first_order_rises(own, bank, BLOCKS, BOTH, given)

    found = in_processes(processes, size, act)
    for tensors in found:
        for tensor, one in zip(tensors, (*expected, gradients), strict=True):
            torch.testing.assert_close(tensor, one, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(tensor, other) for tensor, other in zip(found[0], found[-1], strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = frozen(attention_dropout=0.5)
    bank = bank_of(model)
    expected = measured_rises(model, bank, SOME, BOTH, calibration())
    model.train(training)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    found = measured_rises(model, bank, SOME, BOTH, calibration())
    first_order_rises(model, bank, SOME, BOTH, calibration())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(p is parameters[name] and torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert {module.training for module in model.modules()} == {training} and hooks_of(model) == 0


def test_the_model_computes_in_the_given_context() -> None:
    model, types = frozen(), []
    given = calibration(4, forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    with model.lm_head.register_forward_hook(
        lambda _, args, output: types.append((output.dtype, output.requires_grad))
    ):
        measured_rises(model, bank_of(model), SOME, [NF4], given)
    assert types == [(torch.bfloat16, False)] * 2 * (1 + len(SOME))  # in two micro-batches, before once and after each


def plain_first_order(model: Any, item: Item, weight_of: Any) -> Tensor:
    """|sum g (Q(W) - W)|, with g by a backward pass through all weights at once."""
    trained, tokens = copy.deepcopy(model).requires_grad_(True), random_tokens(S, T)
    logits = trained(input_ids=tokens, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    linears = {name: trained.get_submodule(name) for name in item.linears(model)}
    changes = ((one.weight.grad * (weight_of(name, one.weight) - one.weight)).sum() for name, one in linears.items())
    return torch.stack(list(changes)).sum().abs().detach()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("size", [S, 4, 1])
def test_first_order_is_the_product_of_gradient_and_rounding_error(family: str, size: int) -> None:
    model = frozen(family)
    found = first_order_rises(model, bank_of(model), [*SOME, BLOCKS[1]], BOTH, calibration(size))
    expected = [
        [plain_first_order(model, item, lambda _, weight, to=to: quantize_dequantize(weight, to)) for to in BOTH]
        for item in [*SOME, BLOCKS[1]]
    ]
    assert_close(found, torch.tensor(expected))
    assert (found > 0).all()


def test_first_order_adds_the_linears_of_an_item_with_their_signs() -> None:
    model = frozen()
    units = [Item(layer, (unit,)) for layer in range(LAYERS) for unit in UNITS]
    alone = first_order_rises(model, bank_of(model), units, [NF4], calibration()).view(LAYERS, 4)
    together = first_order_rises(model, bank_of(model), BLOCKS, [NF4], calibration()).flatten()
    assert (together <= alone.sum(1) + 1e-12).all() and not torch.allclose(together, alone.sum(1), rtol=1e-3)


def test_first_order_is_near_the_measured_rise_where_rounding_is_fine() -> None:
    """Of items whose gradient tells: eight bits, at a model that was not trained."""
    model = frozen()
    _, loss = measured_rises(model, bank_of(model), BLOCKS, [INT8], calibration())
    found = first_order_rises(model, bank_of(model), BLOCKS, [INT8], calibration())
    torch.testing.assert_close(found, loss.abs(), rtol=0.3, atol=2e-5)


def test_rises_that_are_not_finite_are_told_with_the_item() -> None:
    model = frozen()
    bank = bank_of(model)
    bank.tensors["model.layers.1.mlp.down_proj/int8-8-default/scales"].fill_(float("inf"))
    with pytest.raises(UserError, match="by quantizing layer 1 down is not finite"):
        measured_rises(model, bank, [Item(0, UNITS), Item(1, ("down",))], BOTH, calibration())
