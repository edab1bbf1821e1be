import weakref
from functools import partial
from typing import Any

import pytest
import torch
from support.calibration import calibration, hooks_of, in_processes
from support.families import PLAIN, random_tokens, tiny_model
from torch import Tensor, nn

from qpruner.anatomy import decoder_layers
from qpruner.calibration.gram import MASSIVE_POSITIONS, Gram, input_grams
from qpruner.calibration.norms import input_variances
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError

S, T = 6, 20


def outputs_of(model: Any) -> dict[str, nn.Linear]:
    layers = decoder_layers(model)
    return {f"{number}.{name}": getattr(layer, name) for number, layer in enumerate(layers) for name in ("o", "down")}


def seen_by(model: Any, skip: int) -> dict[str, Tensor]:
    """The inputs of the linears when the whole model runs, [tokens, in]."""
    seen: dict[str, Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0][:, skip:].flatten(0, 1).double())
        )
        for name, linear in outputs_of(model).items()
    ]
    model(input_ids=random_tokens(S, T), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def everything(model: Any, given: Calibration, skip: int = 0) -> dict[str, Tensor]:
    """Products, sums and number of tokens in one tensor, by linear."""

    def consume(name: str, gram: Gram) -> Tensor:
        return torch.cat([gram.products.flatten(), gram.sums, torch.tensor([gram.tokens])])

    return input_grams(model, outputs_of(model), given, consume, skip_positions=skip)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5 * float(values.abs().max()))


@pytest.mark.parametrize("skip", [0, MASSIVE_POSITIONS])
@pytest.mark.parametrize("family", PLAIN)
def test_sums_are_those_of_what_the_linears_receive(family: str, skip: int) -> None:
    model = tiny_model(family).requires_grad_(False)
    expected = {
        name: torch.cat([(inputs.T @ inputs).flatten(), inputs.sum(0), torch.tensor([S * (T - skip)])])
        for name, inputs in seen_by(model, skip).items()
    }
    for size in (S, 4, 1):
        assert_close(everything(model, calibration(size), skip), expected)
    assert hooks_of(model) == 0


def test_products_are_exact_where_the_model_computes_in_bfloat16() -> None:
    """Rounded products of many tokens would have eigenvalues below zero."""
    model = tiny_model("llama").requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        seen = seen_by(model, 0)
    results = everything(model, calibration(S, forward_context=partial(torch.autocast, "cpu", torch.bfloat16)))
    assert_close(
        results,
        {
            name: torch.cat([(inputs.T @ inputs).flatten(), inputs.sum(0), torch.tensor([S * T])])
            for name, inputs in seen.items()
        },
    )


def test_two_processes_are_as_one_and_one_without_text_adds_nothing() -> None:
    models = [tiny_model("llama").requires_grad_(False) for _ in range(4)]  # hooks of one are not for another
    for count, act in ((2, partial(everything, skip=2)), (4, partial(everything, skip=2)), (2, variances)):
        expected = act(models[0], calibration(4))
        # Of 3 micro-batches of two sequences, the last of 4 processes gets none.
        for found in in_processes(count, 2, lambda given, act=act: act(models[given.processes.rank], given)):
            assert_close(found, expected)


def variances(model: Any, given: Calibration) -> dict[str, Tensor]:
    return input_variances(model, outputs_of(model), given)


def test_centred_is_the_gram_matrix_of_inputs_without_their_mean() -> None:
    model = tiny_model("gpt2").requires_grad_(False)
    inputs = seen_by(model, 3)
    found = input_grams(model, outputs_of(model), calibration(2), lambda name, gram: gram.centred, skip_positions=3)
    for name, seen in inputs.items():
        around = seen - seen.mean(0)
        torch.testing.assert_close(found[name], around.T @ around, rtol=1e-4, atol=1e-4)
        assert float((found[name] - seen.T @ seen).abs().max()) > 1e-2


def test_variances_are_those_of_what_the_linears_receive() -> None:
    model = tiny_model("llama").requires_grad_(False)
    expected = {name: inputs.var(0, correction=0) for name, inputs in seen_by(model, 0).items()}
    for size in (S, 4, 1):
        assert_close(variances(model, calibration(size)), expected)


def test_the_matrices_of_a_block_are_gone_before_the_text_enters_the_next() -> None:
    model = tiny_model("llama").requires_grad_(False)
    seen: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    def consume(name: str, gram: Gram) -> Tensor:
        assert gram.products.dtype == gram.sums.dtype == torch.float64
        assert all(one() is None for one in alive)
        seen.append(name)
        alive.append(weakref.ref(gram.products))
        return torch.zeros(1)

    input_grams(model, outputs_of(model), calibration(2), consume, skip_positions=0)
    assert seen == list(outputs_of(model))
    assert all(one() is None for one in alive)


def test_sequences_of_which_nothing_is_left_are_refused() -> None:
    model = tiny_model("llama").requires_grad_(False)
    given = calibration(2, random_tokens(3, 4))
    with pytest.raises(UserError, match=r"have 4 tokens, of which the first 4 .* calibration.length to more than 4"):
        everything(model, given, 4)
    assert set(everything(model, given, 3)) == set(outputs_of(model))
