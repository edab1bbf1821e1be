"""Passes calibration text through a model block by block: all of it through one block, then all through the next.

At any time only one block runs, on one micro-batch. Between blocks, a micro-batch is represented by its hidden states
[B, T, H] in host memory. Statistics of a block are collected by hooks while it runs, or computed from its outputs:

    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number, block in enumerate(runner.blocks):
            with watching(linears_within(block, linears), see):
                for place, output in enumerate(runner.outputs(number, states)):
                    states[place] = runner.keep(output)

A block may be changed, and its outputs computed again, before the text passes on to the next block. Code that reads or
changes the weights of a block does so inside ``runner.working(number)``: the weights of an offloaded model
(`qpruner.offload`) are on the compute device only there. For such a model, ``runner.keep`` also puts hidden states into
files.

A backward pass goes from the last block to the first. It needs the hidden states that entered each block: the block
runs again, this time with gradients, and receives the gradient at its outputs.

How a model calls its blocks (masks, rotary embeddings, and which of them for which layer) is not reimplemented here:
the model's own trunk runs once for each micro-batch, with blocks that only record their arguments.

Shapes: B sequences of a micro-batch, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import decoder_blocks, family_of
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.likelihood import Head, causal_model, hidden_states
from qpruner.modes import evaluating
from qpruner.offload import at_work, let_go, offload_of


@dataclass(frozen=True)
class BlockCall:
    """Arguments with which a model calls one of its blocks, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockRunner:
    """Runs the blocks of a model one at a time on calibration text. Created by `block_runner`.

    Hidden states and their gradients are passed as lists with one tensor [B, T, H] for each micro-batch of this
    process, on any device; returned tensors are on the compute device.

    Args:
        model: causal language model of a supported family, perhaps with adapters, on the compute device.
        calibration: this process's share of the text.

    Raises:
        UserError: an unsupported family.
    """

    def __init__(self, model: Any, calibration: Calibration) -> None:
        causal = causal_model(model)
        _, family = family_of(causal.config)
        self.blocks: list[nn.Module] = decoder_blocks(causal)
        self.head = Head.of(model)
        self.batches = calibration.batches
        self.model = model
        self._norm: nn.Module = causal.get_submodule(family.last_norm)
        self._device = calibration.processes.device
        self.context = calibration.processes.forward_context
        self._calls: list[list[BlockCall]] = []
        self.offload = offload_of(model)
        self._working: set[int] = set()

    @torch.no_grad()
    def embed(self) -> list[Tensor]:
        """The hidden states that enter the first block; also records how the model calls its blocks.

        Raises:
            UserError: between its blocks or after them, the model computes something that is not supported.
        """
        states: list[Tensor] = []
        self._calls = []
        for batch in self.batches:
            with _recording(self.blocks) as (entered, calls), self.context():
                left = hidden_states(self.model, batch.tokens.to(self._device))
            # The recording blocks return their input, so each of them must have received the same tensor.
            if len(calls) != len(self.blocks) or any(hidden is not entered[0] for hidden in entered):
                raise self._unknown("between its blocks")
            if not torch.equal(left, self.last(entered[0])) and entered[0].isfinite().all():
                raise self._unknown("after its blocks")
            same = bool(self._calls) and _equal(calls, self._calls[-1])
            self._calls.append(self._calls[-1] if same else calls)
            states.append(self.keep(entered[0]))
        return states

    @contextmanager
    def working(self, number: int) -> Iterator[nn.Module]:
        """Moves a block to the compute device inside the context; only blocks of an offloaded model are elsewhere."""
        if number in self._working:
            yield self.blocks[number]
            return
        with at_work(self.blocks[number], self._device, self.offload):
            self._working.add(number)
            try:
                yield self.blocks[number]
            finally:
                self._working.remove(number)

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor, detached and moved to host memory, or into a file if the model is offloaded."""
        return tensor.detach().cpu() if self.offload is None else self.offload.shelve(tensor.detach().cpu())

    def call(self, number: int, place: int, hidden: Tensor) -> Tensor:
        """The output of a block for hidden states, with a graph for gradients if the caller has gradients enabled.

        Args:
            number: index of the block, from 0.
            place: index of the micro-batch that the hidden states belong to.
            hidden: hidden states that enter the block, [B, T, H].
        """  # [B, T, H]
        call = self._calls[place][number]
        with self.working(number) as block, self.context():
            output: Tensor = block(hidden.to(self._device), *call.args, **call.kwargs)
        return output

    @torch.no_grad()
    def outputs(self, number: int, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """The outputs of a block, one micro-batch after the other.

        The hidden states of a micro-batch are read only when its turn comes, so the caller may overwrite them in the
        list with the output.

        Args:
            number: index of the block, from 0.
            states: hidden states that enter the block.

        Yields:
            Output of the block for each micro-batch, [B, T, H].
        """
        with self.working(number):
            for place in range(len(states)):
                hidden = states[place]
                yield self.call(number, place, hidden)
                self._let_go(hidden)

    def backward(
        self, number: int, states: Sequence[Tensor], slope: Callable[[int, Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """The gradient of a loss at the inputs of a block, one micro-batch after the other.

        Args:
            number: index of the block, from 0.
            states: hidden states that enter the block.
            slope: returns the gradient of the loss at the block's output, from the index of the micro-batch and that
                output [B, T, H]. As it receives the output, the last block need not have run before.

        Yields:
            Gradient at the hidden states of each micro-batch, [B, T, H].
        """
        with self.working(number):
            for place, hidden in enumerate(states):
                leaf = hidden.to(self._device).detach().requires_grad_()
                with torch.enable_grad():
                    output = self.call(number, place, leaf)
                at_output = slope(place, output.detach()).to(self._device)
                (at_input,) = torch.autograd.grad(output, leaf, at_output)
                yield at_input
                self._let_go(hidden)

    def last(self, hidden: Tensor) -> Tensor:
        """The last norm of the output [B, T, H] of the last block: the input of the head."""  # [B, T, H]
        with self.context():
            normed: Tensor = self._norm(hidden.to(self._device))
        return normed

    def logits(self, last: Tensor) -> Tensor:
        """The logits [..., V] of hidden states [..., H] from `last`; `Head.chunks` cuts these into parts that fit."""
        with self.context():
            return self.head(last)

    def _let_go(self, hidden: Tensor) -> None:
        """Lets the system reclaim the memory of hidden states that lie in a file and are not needed for a while."""
        if self.offload is not None:
            let_go([hidden])

    def _unknown(self, where: str) -> UserError:
        return UserError(
            f"Models of type {self.model.config.model_type!r} do something {where} that qpruner does not know, so "
            f"calibration text cannot pass through them block by block. Use another base."
        )


@contextmanager
def block_runner(model: Any, calibration: Calibration) -> Iterator[BlockRunner]:
    """A `BlockRunner` for a model, which is in evaluation mode inside the context."""
    with evaluating(model):
        yield BlockRunner(model, calibration)


def linears_within(block: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those of the given linears that belong to a block, by name."""
    members = set(block.modules())
    return {name: linear for name, linear in linears.items() if linear in members}


@contextmanager
def watching(linears: dict[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls a function with the inputs and outputs of linears whenever they run inside the context.

    Args:
        linears: linears to watch, by name.
        see: takes a linear's name, its inputs [B, T, in] (without gradients) and its output [B, T, out].
    """

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(name, inputs[0].detach(), output)

    with ExitStack() as handles:
        for name, linear in linears.items():
            handles.enter_context(linear.register_forward_hook(partial(hook, name)))
        yield


@contextmanager
def watching_gradients(linears: dict[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls a function with the inputs of linears and the gradients at their outputs, during a backward pass.

    Args:
        linears: linears to watch, by name.
        see: takes a linear's name, its inputs [B, T, in] and the gradient at its output [B, T, out].
    """

    def on_output(name: str, inputs: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(see, name, inputs))  # type: ignore[no-untyped-call]

    with watching(linears, on_output):
        yield


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Iterator[tuple[list[Tensor], list[BlockCall]]]:
    """Replaces blocks by ones that return their input, and records their inputs and other arguments, in order."""
    entered: list[Tensor] = []
    calls: list[BlockCall] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(hidden_states)
        calls.append(BlockCall(args, kwargs))
        return hidden_states

    hidden_by_record = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = record
    try:
        yield entered, calls
    finally:
        for block, forward in zip(blocks, hidden_by_record, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _equal(first: Any, second: Any) -> bool:
    """Whether two arguments are equal; tensors are compared by dtype and values."""
    match first:
        case Tensor():
            return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        case BlockCall():
            return _equal((first.args, first.kwargs), (second.args, second.kwargs))
        case dict():
            return first.keys() == second.keys() and all(_equal(value, second[key]) for key, value in first.items())
        case list() | tuple():
            return len(first) == len(second) and all(map(_equal, first, second))
    return first is second or bool(first == second)
