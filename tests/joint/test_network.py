"""What gates make of a model, against the narrowed and quantized model; and their slopes, against dense weights."""

from functools import partial

import pytest
import torch
from support.families import VOCAB, tiny_model
from support.joint import CPU, FOUR, TWO, gated, gates_of

from qpruner.anatomy import unit_linears
from qpruner.joint.projection import plan_of
from qpruner.likelihood import token_nll
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import quantize_
from qpruner.quantization.formats import dequantize

TOKENS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_quantized_model(family: str) -> None:
    network, _ = gated(family, prunes=False)
    gates = gates_of(network.space)
    network.open(gates)
    model = tiny_model(family)
    quantize_(model, plan_of(network.space, gates, 0.5), None, device=CPU)
    assert torch.allclose(network.network(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_narrowed_model(family: str) -> None:
    """In 16 bits: in fewer, the groups of what is left are others."""
    network, _ = gated(family)
    gates = gates_of(network.space)
    del gates["upgrades"]
    narrowed = tiny_model(family)
    apply_pruning_(narrowed, plan_of(network.space, {"groups": gates["groups"], "channels": gates["channels"]}, 0.5))
    network.open(gates)
    with network.dense():
        logits = network.network(TOKENS).logits
    # A norm over all heads is scaled as if heads were alike.
    tolerance = 0.5 if family == "olmo2" else 1e-5
    assert torch.allclose(logits, narrowed(TOKENS).logits, atol=tolerance)


def test_lifted_channels_have_the_last_width_and_the_others_their_units() -> None:
    network, bank = gated(lifts=True, prunes=False, offered=(TWO, FOUR))
    gates = gates_of(network.space)
    gates["upgrades"].zero_()
    network.open(gates)
    linear = network.linears[1]["down"][0]
    name = unit_linears(tiny_model("llama"))[1]["down"][0]
    lifted = network.space.by_layer(gates["lifted_channels"], "lifted_channels")[1].bool()
    two, four = (dequantize(bank.linear(name, precision)) for precision in (TWO, FOUR))  # type: ignore[arg-type]
    assert torch.equal(linear.present(0, linear.lifted, torch.float32), torch.where(lifted, four, two))


def test_slopes_are_those_of_the_weight() -> None:
    """Against autograd on the weights themselves, in a unit of two linears with all kinds of gates."""
    network, _ = gated(lifts=True)
    gates = {kind: values.requires_grad_() for kind, values in gates_of(network.space).items()}
    network.open(gates)
    linears = network.linears[0]["gate_up"]
    lifted, chosen = linears[0].lifted, int(linears[0].mixture.argmax())
    loss = token_nll(network.network, TOKENS, TOKENS).sum()
    *of_mixtures, of_lifted = torch.autograd.grad(loss, [*(one.mixture for one in linears), gates["lifted_hidden"]])
    weights = [one.present(chosen, lifted, torch.float32).detach().requires_grad_() for one in linears]
    for one, weight in zip(linears, weights, strict=True):
        one.forward = partial(torch.nn.functional.linear, weight=weight)  # type: ignore[method-assign]
    slopes = torch.autograd.grad(token_nll(network.network, TOKENS, TOKENS).sum(), weights)

    expected_lifted = torch.zeros(64)
    for one, weight, slope, of_mixture in zip(linears, weights, slopes, of_mixtures, strict=True):
        widths = [one.widths(number, torch.float32) for number in range(3)]
        expected_lifted += (slope * (widths[2] - widths[chosen])).sum(0)
        left = slope * (1 - lifted)  # type: ignore[operator]
        expected = torch.stack([(left * (width - weight)).sum() for width in widths])
        assert torch.allclose(of_mixture, expected, atol=1e-4)
    assert torch.allclose(of_lifted[0, 1], expected_lifted, atol=1e-5)


def test_the_slope_of_a_unit_is_that_of_scaling_its_output() -> None:
    network, _ = gated()
    gates = {kind: values.requires_grad_() for kind, values in gates_of(network.space).items()}

    def loss(channels: torch.Tensor) -> torch.Tensor:
        network.open({**gates, "channels": channels})
        return token_nll(network.network.double(), TOKENS, TOKENS).double().sum()

    channels = gates["channels"].double()
    (slopes,) = torch.autograd.grad(loss(channels), gates["channels"])
    step = torch.zeros_like(channels)
    step[50] = 1e-2
    with torch.no_grad():
        difference = float(loss(channels + step) - loss(channels - step)) / 2e-2
    assert float(slopes[50]) == pytest.approx(difference, rel=2e-2, abs=1e-5)


def test_the_model_is_there_as_it_was() -> None:
    network, _ = gated()
    dense = tiny_model("llama")(TOKENS).logits
    network.open(gates_of(network.space))
    changed = network.network(TOKENS).logits
    with torch.no_grad(), network.unchanged():
        assert torch.equal(network.network(TOKENS).logits, dense)
    assert torch.equal(network.network(TOKENS).logits, changed) and not torch.equal(changed, dense)
