"""Text that passed block by block against the same text through the whole model, for every family."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import LAYERS, adapted, each_of, random_tokens, tiny_model
from torch import Tensor, nn

from qpruner.anatomy import FAMILIES, decoder_blocks, family_of
from qpruner.calibration.blocks import block_runner, linears_within, watching, watching_gradients
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.offload import Offload, offload_
from qpruner.processes import Processes

S, T = 5, 20  # more tokens than the sliding windows of the tiny models
each_family = each_of(FAMILIES)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def calibration(size: int = 2, **changes: Any) -> Calibration:
    """Text in micro-batches of some sequences, on one process unless told."""
    return Calibration.share(random_tokens(S, T), replace(Processes.alone(), **changes), size * T)


def frozen(family: str, **changes: Any) -> Any:
    return tiny_model(family, **changes).requires_grad_(False)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the model's blocks."""
    inside = {id(module) for block in decoder_blocks(model) for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }


def seen_by_whole_model(model: Any, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """What enters each block, what the last gives, and the input of the head; with gradients if the caller has them."""
    states: list[Tensor] = []
    last: list[Tensor] = []
    blocks = decoder_blocks(model)
    handles = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda _, args, output: states.append(output)))
    handles.append(model.get_output_embeddings().register_forward_pre_hook(lambda _, args: last.append(args[0])))
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return states, last[0]


def pass_forward(model: Any, given: Calibration) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What enters each block, what the last gives, and the input of the head, for each micro-batch."""
    with block_runner(model, given) as runner, torch.no_grad():
        states = [runner.embed()]
        for number in range(len(runner.blocks)):
            states.append(list(runner.outputs(number, states[-1])))
        return states, [runner.last(hidden) for hidden in states[-1]]


@each_family
@pytest.mark.parametrize("context", [None, autocast])
@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}])
def test_states_are_bit_for_bit_those_of_the_whole_model(
    family: str, context: Callable[[], Any] | None, attention: dict[str, str]
) -> None:
    model = frozen(family, **attention)
    given = calibration(2, **({} if context is None else {"forward_context": context}))
    states, last = pass_forward(model, given)
    assert [len(batch.tokens) for batch in given.batches] == [2, 2, 1]
    for place, batch in enumerate(given.batches):
        with given.processes.forward_context(), torch.no_grad():
            expected, expected_last = seen_by_whole_model(model, batch.tokens)
        assert len(expected) == LAYERS + 1
        assert all(torch.equal(one[place], other) for one, other in zip(states, expected, strict=True))
        assert torch.equal(last[place], expected_last)


@each_family
def test_states_do_not_depend_on_the_micro_batch(family: str) -> None:
    model = frozen(family)
    whole, last = pass_forward(model, calibration(S))
    for size in (1, 2):
        states, lasts = pass_forward(model, calibration(size))
        for one, other in zip([*states, lasts], [*whole, last], strict=True):
            torch.testing.assert_close(torch.cat(one), other[0], rtol=1e-5, atol=1e-5)


def gradients_of_blocks(model: Any, given: Calibration) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weight gradients, and the gradients at what enters each block from the last to the first, of a simple loss."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor, at_output: Tensor) -> None:
        gradient = at_output.flatten(0, 1).float().T @ inputs.flatten(0, 1).float()
        sums[name] = sums[name] + gradient if name in sums else gradient

    at_inputs: list[Tensor] = []
    with block_runner(model, given) as runner:
        entering = [runner.embed()]
        for number in range(len(runner.blocks) - 1):
            entering.append(list(runner.outputs(number, entering[-1])))
        slopes: list[Tensor] = []

        def slope(place: int, output: Tensor) -> Tensor:
            return slopes[place] if at_inputs else output.cos()  # of the sum of sines

        for number in reversed(range(len(runner.blocks))):
            with watching_gradients(linears_within(runner.blocks[number], linears_of(model)), add):
                slopes = list(runner.backward(number, entering.pop(), slope))
            at_inputs.append(torch.cat(slopes))
    return sums, at_inputs


@each_family
@pytest.mark.parametrize(("context", "tolerance"), [(None, 1e-5), (autocast, 0.01)])
def test_gradients_are_those_of_the_whole_backward_pass(
    family: str, context: Callable[[], Any] | None, tolerance: float
) -> None:
    model = frozen(family)
    given = calibration(2, **({} if context is None else {"forward_context": context}))
    found, at_inputs = gradients_of_blocks(model, given)
    linears = linears_of(model)
    model.requires_grad_(True)
    with given.processes.forward_context():
        states, _ = seen_by_whole_model(model, random_tokens(S, T))
    slopes = torch.autograd.grad(states[-1].sin().sum(), [*states[:-1], *(one.weight for one in linears.values())])
    expected = dict(zip(linears, slopes[LAYERS:], strict=True))
    assert found.keys() == expected.keys() and len(found) >= 4 * LAYERS

    def off(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm())

    assert max(off(found[name], expected[name]) for name in found) <= tolerance
    assert max(map(off, at_inputs, reversed(slopes[:LAYERS]))) <= tolerance


def test_below_adapters_too() -> None:
    model = adapted(tiny_model("llama"))
    states, _ = pass_forward(model, calibration())
    with torch.no_grad():
        expected, _ = seen_by_whole_model(model.get_base_model(), random_tokens(S, T))
    torch.testing.assert_close(torch.cat(states[-1]), expected[-1], rtol=1e-5, atol=1e-5)
    plain, _ = pass_forward(tiny_model("llama"), calibration())
    assert not torch.allclose(torch.cat(states[-1]), torch.cat(plain[-1]), rtol=1e-2)


def test_one_block_works_at_a_time_and_all_text_passes_it_first() -> None:
    model, worked = frozen("llama"), []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: worked.append(number))
    gradients_of_blocks(model, calibration(2))
    assert worked == [0] * 3 + [1] * 3 + [2] * 3 + [1] * 3 + [0] * 3  # the last once


def test_outputs_may_take_the_place_of_inputs() -> None:
    model, given = frozen("gemma2"), calibration()
    expected, _ = pass_forward(model, given)
    with block_runner(model, given) as runner:
        states = runner.embed()
        for number in range(len(runner.blocks)):
            for place, output in enumerate(runner.outputs(number, states)):
                states[place] = output
    assert all(map(torch.equal, states, expected[-1]))


def test_kept_states_are_let_go_once_a_block_had_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []
    monkeypatch.setattr(
        "qpruner.calibration.blocks.let_go", lambda tensors: gone.extend(tensor.data_ptr() for tensor in tensors)
    )
    model = frozen("llama")
    with block_runner(model, calibration()) as runner:
        states = runner.embed()
        list(runner.outputs(0, states))
        assert gone == []  # in memory they stay
    offload_(model, Offload(tmp_path))
    with block_runner(model, calibration()) as runner:
        states = runner.embed()
        pointers = [hidden.data_ptr() for hidden in states]
        for place, _ in enumerate(runner.outputs(0, states)):
            assert gone == pointers[:place]
        assert gone == pointers
        list(runner.backward(0, states, lambda _, output: output))
        assert gone == 2 * pointers


def test_a_block_may_be_changed_before_the_text_goes_on() -> None:
    model, given = frozen("llama"), calibration()
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        seen.setdefault(name, []).append(inputs)

    with block_runner(model, given) as runner:
        states = runner.embed()
        for number, block in enumerate(runner.blocks):
            with watching(linears_within(block, linears_of(model)), see):
                for _ in runner.outputs(number, states):
                    pass
            block.mlp.down_proj.weight *= 0.5
            states = list(runner.outputs(number, states))
    halved = tiny_model("llama")
    with torch.no_grad():
        for block in halved.model.layers:
            block.mlp.down_proj.weight *= 0.5
        expected, _ = seen_by_whole_model(halved, random_tokens(S, T))
    torch.testing.assert_close(torch.cat(states), expected[-1], rtol=1e-5, atol=1e-5)
    assert {name: len(inputs) for name, inputs in seen.items()} == dict.fromkeys(linears_of(model), 3)
    # What the second block's projections saw came of the first block as it was after the change.
    first = halved.model.layers[1].input_layernorm(expected[1])
    torch.testing.assert_close(torch.cat(seen["model.layers.1.self_attn.q_proj"]), first, rtol=1e-5, atol=1e-5)


@each_family
def test_masks_and_embeddings_of_equal_micro_batches_are_kept_once(family: str) -> None:
    with block_runner(frozen(family, attn_implementation="eager"), calibration(2)) as runner:
        runner.embed()
        assert runner._calls[0] is runner._calls[1]
        assert runner._calls[2] is not runner._calls[1]  # of one sequence instead of two


@each_family
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(family: str, training: bool) -> None:
    model = frozen(family, attention_dropout=0.5).train(training)
    model.get_submodule(family_of(model.config)[1].layers)[1].train(not training)
    modes = [module.training for module in model.modules()]
    expected, _ = pass_forward(tiny_model(family), calibration())
    states, _ = pass_forward(model, calibration())
    assert all(map(torch.equal, states[-1], expected[-1]))
    gradients_of_blocks(model, calibration())
    with pytest.raises(IndexError):  # a word that the model does not have
        pass_forward(model, replace(calibration(), batches=[replace(calibration().batches[0], tokens=TOO_HIGH)]))
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())


TOO_HIGH = torch.full((1, T), 1000)


def test_a_forward_of_the_blocks_own_is_left_there() -> None:
    model = frozen("llama")
    block = model.model.layers[1]
    block.forward = doubled = partial(lambda forward, *args, **kwargs: 2 * forward(*args, **kwargs), block.forward)
    states, _ = pass_forward(model, calibration())
    assert block.forward is doubled
    with torch.no_grad():
        expected, _ = seen_by_whole_model(model, random_tokens(S, T))
    torch.testing.assert_close(torch.cat(states[-1]), expected[-1], rtol=1e-5, atol=1e-5)


class Halving(nn.Module):
    """The blocks of a trunk that does something of its own to what each of them gives."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return self.block(hidden / 2, **kwargs)


def test_a_trunk_that_works_between_its_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen("llama")
    blocks = [*model.model.layers]
    for number in range(LAYERS):
        model.model.layers[number] = Halving(model.model.layers[number])
    monkeypatch.setattr("qpruner.calibration.blocks.decoder_blocks", lambda _: blocks)
    with pytest.raises(UserError, match="'llama' do something between its blocks that qpruner does not know"):
        pass_forward(model, calibration())


def test_a_trunk_that_works_after_its_blocks_is_refused() -> None:
    model = frozen("llama")
    model.model.register_forward_hook(
        lambda _, args, output: setattr(output, "last_hidden_state", 2 * output.last_hidden_state)
    )
    with pytest.raises(UserError, match="'llama' do something after its blocks that qpruner does not know"):
        pass_forward(model, calibration())


def test_values_that_are_not_finite_pass() -> None:
    model = frozen("llama")
    model.model.embed_tokens.weight.fill_(float("nan"))
    states, _ = pass_forward(model, calibration())
    assert all(hidden.isnan().all() for hidden in states[-1])
