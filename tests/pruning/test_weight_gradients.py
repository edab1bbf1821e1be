"""The gradients of frozen weights, against autograd."""

from typing import Any

import pytest
import torch
from support.families import adapted, packed, random_tokens, tiny_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qpruner.anatomy import decoder_layers
from qpruner.plan import Precision
from qpruner.pruning.weight_gradients import WeightGradients
from qpruner.quantization.formats import dequantize


def backward(model: Any, tokens: Tensor | None = None) -> None:
    tokens = random_tokens() if tokens is None else tokens
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def projections(model: Any) -> list[Any]:
    return [linear for layer in decoder_layers(model) for linear in layer.linears.values()]


def as_it_is(gradient: Tensor) -> Tensor:
    return gradient


def merged(model: Any) -> Any:
    """A dense model of the weights that a model with adapters computes with, which all require gradients."""
    return model.merge_and_unload().requires_grad_(True)


def assert_equal(found: dict[nn.Module, Tensor], model: Any, expected: list[Tensor]) -> None:
    for linear, gradient in zip(projections(model.get_base_model()), expected, strict=True):
        largest = float(gradient.abs().max())
        assert largest > 0 and found[linear].dtype == torch.float32
        torch.testing.assert_close(found[linear], gradient, rtol=1e-4, atol=1e-4 * largest)
    assert len(found) == len(expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "olmo2", "phi3", "gpt2"])
def test_they_are_those_of_autograd_summed_over_backward_passes(family: str) -> None:
    model, dense = adapted(tiny_model(family)).train(), merged(adapted(tiny_model(family))).train()
    collected = WeightGradients(model.get_base_model())
    for tokens in (random_tokens(), random_tokens(1, 9)):
        backward(model, tokens)
        backward(dense, tokens)
    assert_equal(collected.take(as_it_is), model, [linear.weight.grad for linear in projections(dense)])


def test_taking_them_begins_anew() -> None:
    model = adapted(tiny_model("llama"))
    collected = WeightGradients(model.get_base_model())
    backward(model)
    first = collected.take(as_it_is)
    assert collected.take(as_it_is) == {}
    backward(model)
    second = collected.take(lambda one: 2 * one)
    assert len(first) == len(second) == 21
    assert all(torch.equal(second[linear], 2 * gradient) for linear, gradient in first.items())


@pytest.mark.parametrize("precision", [Precision("nf4", 4), Precision("int8", 8)], ids=str)
def test_a_packed_base_has_those_of_the_weights_it_stands_for(precision: Precision) -> None:
    model = adapted(packed(tiny_model("llama"), precision))
    dense = adapted(tiny_model("llama"))
    for linear, twin in zip(*(projections(one.get_base_model()) for one in (model, dense)), strict=True):
        twin.base_layer.weight.data = dequantize(linear.base_layer)
    collected, dense = WeightGradients(model.get_base_model()), merged(dense)
    backward(model)
    backward(dense)
    assert_equal(collected.take(as_it_is), model, [linear.weight.grad for linear in projections(dense)])


def test_only_linears_with_adapters_are_collected() -> None:
    model = adapted(tiny_model("llama"), target_modules=("o_proj", "up_proj"))
    collected = WeightGradients(model.get_base_model())
    backward(model)
    expected = [linear for layer in decoder_layers(model.get_base_model()) for linear in (layer.o, layer.up)]
    assert set(collected.take(as_it_is)) == set(expected)


def test_nothing_is_collected_without_a_backward_pass_or_when_they_were_removed() -> None:
    model = adapted(tiny_model("llama"))
    collected = WeightGradients(model.get_base_model())
    with torch.no_grad():
        model(input_ids=random_tokens(), use_cache=False)
    model(input_ids=random_tokens(), use_cache=False)
    assert collected.take(as_it_is) == {}
    collected.remove()
    backward(model)
    assert collected.take(as_it_is) == {}


@pytest.mark.filterwarnings("ignore")
def test_gradient_checkpointing_counts_nothing_twice() -> None:
    found = []
    for checkpointing in (False, True):
        base = tiny_model("llama")
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = adapted(base).train()
        collected = WeightGradients(model.get_base_model())
        backward(model)
        taken = collected.take(as_it_is)
        found.append([taken[linear] for linear in projections(model.get_base_model())])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(again, once)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_frees_the_inputs_that_they_are_made_of(checkpointing: bool) -> None:
    base = tiny_model("llama")
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(base).train()
    WeightGradients(model.get_base_model())
    seen: list[StorageWeakRef] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(StorageWeakRef(inputs[0].untyped_storage()))

    for layer in decoder_layers(model.get_base_model()):
        layer.down.register_forward_hook(look)
    loss = model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss
    assert [one.expired() for one in seen] == [checkpointing] * 3
    loss.backward()
