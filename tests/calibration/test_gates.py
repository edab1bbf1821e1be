"""Derivatives in gates, against gates that autograd really differentiates by."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.calibration import calibration, in_processes
from support.families import PLAIN, random_tokens, tiny_model
from torch import Tensor

from qpruner.anatomy import Coupled, decoder_layers
from qpruner.calibration.gates import squared_gate_gradients
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError


def gated_parts(model: Any) -> dict[str, Coupled]:
    return {
        f"{number}.{part.name}": part
        for number, layer in enumerate(decoder_layers(model))
        for part in (*layer.group_weights, *layer.channel_weights)
        if part.axis == 1
    }


@contextmanager
def multiplied(parts: dict[str, Coupled], gates: dict[str, Tensor]) -> Iterator[None]:
    """What reaches the columns of each unit is multiplied by its gate."""
    with ExitStack() as hooks:
        for name, part in parts.items():
            factors = gates[name].repeat_interleave(part.width)
            hooks.enter_context(
                part.linear.register_forward_pre_hook(lambda _, inputs, factors=factors: (inputs[0] * factors,))
            )
        yield


@pytest.mark.parametrize("family", PLAIN)
def test_they_are_those_of_autograd(family: str) -> None:
    model, tokens = tiny_model(family).requires_grad_(False), random_tokens(5, 20)
    parts = gated_parts(model)
    squares = {name: torch.zeros(part.num_units) for name, part in parts.items()}
    for sequence in tokens.split(1):
        gates = {name: torch.ones(part.num_units, requires_grad=True) for name, part in parts.items()}
        with multiplied(parts, gates):
            logits = model(input_ids=sequence, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1], sequence[0, 1:])
            for name, gradient in zip(parts, torch.autograd.grad(loss, list(gates.values())), strict=True):
                squares[name] += gradient.square() / len(tokens)
    for size in (1, 5):
        results = squared_gate_gradients(model, parts, calibration(size, tokens))
        assert results.keys() == squares.keys()
        for name, expected in squares.items():
            assert float(expected.max()) > 0
            torch.testing.assert_close(results[name].float(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_two_processes_find_what_one_does() -> None:
    models = [tiny_model("llama").requires_grad_(False) for _ in range(3)]

    def work(given: Calibration) -> Tensor:
        model = models.pop()
        return torch.cat([*squared_gate_gradients(model, gated_parts(model), given).values()])

    (alone,), (first, second) = in_processes(1, 2, work), in_processes(2, 2, work)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=0)


def test_the_sequence_whose_gradient_is_not_finite_is_named() -> None:
    model, tokens = tiny_model("llama").requires_grad_(False), random_tokens(5, 20) % 50 + 10
    tokens[3, 7] = 5
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.finfo(torch.float32).max
        model.model.embed_tokens.weight[5, 0] = torch.inf
    with pytest.raises(UserError, match=r"not finite: model.embed_tokens.weight"):
        squared_gate_gradients(model, gated_parts(model), calibration(2, tokens))
