"""Calibration text passes through a model block by block: all of it through one block, then all through the next.

At any time only one block works, on one micro-batch. Between blocks a micro-batch is its hidden states [B, T, H], kept
in host memory; whatever is wanted of a block is seen by hooks while it works, or made of what it gives:

    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number, block in enumerate(runner.blocks):
            with watching(linears_within(block, linears), see):
                for place, output in enumerate(runner.outputs(number, states)):
                    states[place] = runner.keep(output)

A block may be changed and its outputs computed again before the text goes on. Whatever reads or changes its weights
does so inside ``runner.working(number)``: of a model that is offloaded (`qpruner.offload`) they are on the device that
computes only there, and hidden states that ``runner.keep`` keeps lie in files, too.

Backward it goes from the last block to the first, with the states that entered each of them kept: a block works again,
now with gradients, and is given the gradient at its outputs.

How a block is called (masks, rotary embeddings, which of them for which layer) is the model's business and is not
repeated here: the model's own trunk runs once for each micro-batch with blocks that only remember their arguments.

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
from qpruner.offload import at_work, let_go, offload_of


@dataclass(frozen=True)
class BlockCall:
    """What a model gives to one of its blocks beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockRunner:
    """Runs the blocks of a model one at a time on calibration text. Made by `block_runner`.

    Hidden states and their gradients come in lists, one tensor [B, T, H] for each micro-batch of this process, on any
    device; what is given back is on the device that computes.

    Args:
        model: causal language model of a supported family, perhaps with adapters, on the device that computes.
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
        """The hidden states that enter the first block; how blocks are called is remembered from here on.

        Raises:
            UserError: the model does something between its blocks, or after them, that is not known.
        """
        states: list[Tensor] = []
        self._calls = []
        for batch in self.batches:
            with _recording(self.blocks) as (entered, calls), self.context():
                left = hidden_states(self.model, batch.tokens.to(self._device))
            # The recording blocks give what they get, so that each of them must have got the same tensor.
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
        """A block on the device that computes, with what it is given; of a model that is whole it always is there."""
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
        """A tensor off the device until it is wanted again: in host memory, or of an offloaded model in a file."""
        return tensor.detach().cpu() if self.offload is None else self.offload.shelve(tensor.detach().cpu())

    def call(self, number: int, place: int, hidden: Tensor) -> Tensor:
        """What a block makes of hidden states, with gradients if the caller has them.

        Args:
            number: place of the block among all.
            place: place of the micro-batch that the states are of.
            hidden: hidden states that enter the block, [B, T, H].
        """  # [B, T, H]
        call = self._calls[place][number]
        with self.working(number) as block, self.context():
            output: Tensor = block(hidden.to(self._device), *call.args, **call.kwargs)
        return output

    @torch.no_grad()
    def outputs(self, number: int, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """What a block gives for the states that enter it, one micro-batch after the other.

        A state is read when its turn comes, so that its output may take its place.
        """
        with self.working(number):
            for place in range(len(states)):
                hidden = states[place]
                yield self.call(number, place, hidden)
                self._let_go(hidden)

    def backward(
        self, number: int, states: Sequence[Tensor], slope: Callable[[int, Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """The gradient at what enters a block, one micro-batch after the other.

        Args:
            number: place of the block among all.
            states: hidden states that enter the block.
            slope: gives the gradient of a loss at what the block gives, from the place of the micro-batch and this
                output [B, T, H]; so the last block, where it is that of the loss itself, need not have worked before.
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
        """What the head gets when the last block gives hidden states [B, T, H]."""  # [B, T, H]
        with self.context():
            normed: Tensor = self._norm(hidden.to(self._device))
        return normed

    def logits(self, last: Tensor) -> Tensor:
        """What the head says of hidden states [..., H] that `last` gave; `Head.chunks` says of how many at a time."""
        with self.context():
            return self.head(last)

    def _let_go(self, hidden: Tensor) -> None:
        """Lets the memory go that holds a copy of kept states, which are not wanted for a while."""
        if self.offload is not None:
            let_go([hidden])

    def _unknown(self, where: str) -> UserError:
        return UserError(
            f"Models of type {self.model.config.model_type!r} do something {where} that qpruner does not know, so that "
            f"calibration text cannot pass block by block. Use another base."
        )


@contextmanager
def block_runner(model: Any, calibration: Calibration) -> Iterator[BlockRunner]:
    """A runner on a model that is in evaluation mode meanwhile; see `BlockRunner`."""
    with evaluating(model):
        yield BlockRunner(model, calibration)


def linears_within(block: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The linears, of those given by name, that are part of a block."""
    members = set(block.modules())
    return {name: linear for name, linear in linears.items() if linear in members}


@contextmanager
def watching(linears: dict[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Shows what linears get and give, while they work.

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
    """Shows what linears got and the gradient at what they gave, while a backward pass goes through them.

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
    """Blocks that give back the hidden states they get, and what each of them was called with, in order."""
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
    """Whether two arguments are the same, tensors by what they hold."""
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which each module is in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
