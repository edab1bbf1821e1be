"""Passes of calibration text through a model, and what its linears see: inputs, and gradients that are used at once.

No weight requires a gradient. A hook on the output of each linear turns the gradient there and the input into the
gradient of the weight, gives it away and forgets it, so that above weights and activations there is never more than the
gradient of one linear. The gradient of each sequence alone comes out of the same backward pass.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.errors import UserError, check_ranges
from qpruner.likelihood import hidden_states, token_nll


@dataclass(frozen=True)
class CalibrationConfig:
    """The text on which something is found out of a model, drawn from the training split.

    Args:
        num_sequences: over all devices, at least 1.
        length: tokens in each, at least 2.
        batch_size: sequences that pass through the model together; default all of them. With ``param_first`` and
            ``param_mix`` part of the result, see `qpruner.pruning.criteria`.
    """

    num_sequences: int = 10
    length: int = 64
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "calibration",
            num_sequences=("at least 1", self.num_sequences >= 1),
            length=("at least 2", self.length >= 2),
            batch_size=("at least 1", self.batch_size is None or self.batch_size >= 1),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Calibration sequences that pass through the model together.

    Args:
        first: number of the first sequence among all.
        tokens: [B, T].
    """

    first: int
    tokens: Tensor


@dataclass(frozen=True)
class Calibration:
    """The calibration text of one process.

    Args:
        batches: this process's micro-batches.
        num_sequences: over all processes.
        forward_context: in which the model computes, such as autocast.
        reduce: sums a tensor over all processes.
    """

    batches: Sequence[MicroBatch]
    num_sequences: int
    forward_context: Callable[[], AbstractContextManager[Any]]
    reduce: Callable[[Tensor], Tensor]


def micro_batches(tokens: Tensor, size: int | None) -> list[MicroBatch]:
    """Cuts sequences [N, T] into micro-batches, before these are dealt to processes.

    Args:
        tokens: all sequences.
        size: of a micro-batch; None for all at once.
    """
    starts = range(0, len(tokens), size or len(tokens))
    return [MicroBatch(start, tokens[start : start + (size or len(tokens))]) for start in starts]


def input_norms(model: Any, linears: dict[str, nn.Linear], calibration: Calibration) -> dict[str, Tensor]:
    """L2 norm of each input channel of some linears, over all calibration tokens of all processes."""  # name: [in]
    device = next(model.parameters()).device
    sums = {
        name: torch.zeros(linear.in_features, dtype=torch.float64, device=device) for name, linear in linears.items()
    }

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sums[name] += inputs[0].detach().flatten(0, -2).double().square().sum(0)

    with _hooks(linears, add), torch.no_grad():
        for batch in calibration.batches:
            with calibration.forward_context():
                hidden_states(model, batch.tokens.to(device))
    return {name: calibration.reduce(total).sqrt() for name, total in sums.items()}


def gradient_sums(
    model: Any,
    linears: dict[str, nn.Linear],
    calibration: Calibration,
    consume: Callable[[str, Tensor, Tensor | None], Tensor],
    *,
    sizes: dict[str, int],
    per_sequence: bool,
) -> dict[str, Tensor]:
    """Sums, over all micro-batches of all processes, what is made of the gradient of each linear's weight.

    Args:
        model: its weights stay frozen.
        linears: by name.
        calibration: the text.
        consume: from a linear's name, the gradient of its weight [out, in] in float32 (of the micro-batch's share of
            the mean loss over all sequences) and the sum of its sequences' squared gradients [out, in] (divided by the
            number of all sequences; None unless ``per_sequence``) to a tensor [size] to sum up, in float64.
        sizes: of these tensors, by linear.
        per_sequence: whether squared gradients are wanted.

    Raises:
        UserError: a gradient is not finite; the sequence is named.
    """
    device = next(model.parameters()).device
    sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
    for batch in calibration.batches:
        for name, value in _backward(model, linears, calibration, batch, consume, per_sequence).items():
            sums[name] += value
    sums = {name: calibration.reduce(total) for name, total in sums.items()}
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        _complain_of_gradients(model, linears, calibration, consume, per_sequence)
    return sums


def _backward(
    model: Any,
    linears: dict[str, nn.Linear],
    calibration: Calibration,
    batch: MicroBatch,
    consume: Callable[[str, Tensor, Tensor | None], Tensor],
    per_sequence: bool,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def on_gradient(name: str, inputs: Tensor, at_output: Tensor) -> None:
        gradient, squared = weight_gradient(at_output, inputs, per_sequence)
        share = calibration.num_sequences
        found[name] = consume(name, gradient.div_(share), None if squared is None else squared.div_(share))

    def on_forward(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # not in the first of the two passes of gradient checkpointing
            output.register_hook(partial(on_gradient, name, inputs[0].detach()))  # type: ignore[no-untyped-call]

    tokens = batch.tokens.to(next(model.parameters()).device)
    with _hooks(linears, on_forward), _gradients_from_embeddings(model), torch.enable_grad():
        with calibration.forward_context():
            # Each sequence's own mean loss, so that the gradient at its tokens is that of the sequence.
            nll = token_nll(model, tokens, tokens).mean(1).sum()
        nll.backward()  # type: ignore[no-untyped-call]
    return found


def weight_gradient(at_output: Tensor, inputs: Tensor, per_sequence: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of a linear's weight, and the sum over sequences of its square, in float32."""  # [out, in]
    at_output, inputs = at_output.float(), inputs.float()  # [B, T, out], [B, T, in]
    if not per_sequence:
        return at_output.flatten(0, 1).T @ inputs.flatten(0, 1), None
    gradient = torch.zeros(at_output.shape[-1], inputs.shape[-1], device=inputs.device)
    squared = torch.zeros_like(gradient)
    for one_output, one_input in zip(at_output, inputs, strict=True):
        one = one_output.T @ one_input
        gradient += one
        squared += one.square_()
    return gradient, squared


def _complain_of_gradients(
    model: Any,
    linears: dict[str, nn.Linear],
    calibration: Calibration,
    consume: Callable[[str, Tensor, Tensor | None], Tensor],
    per_sequence: bool,
) -> None:
    """Runs the sequences of this process one by one, to name the first whose gradient is not finite."""
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    remedy = (
        f"{broken[0]} of the base model holds values that are not finite. Load an undamaged model."
        if broken
        else "use --model.dtype bfloat16 or float32, or leave its text out."
    )
    for batch in calibration.batches:
        for offset, sequence in enumerate(batch.tokens):
            alone = MicroBatch(batch.first + offset, sequence[None])
            values = _backward(model, linears, calibration, alone, consume, per_sequence).values()
            if not all(bool(value.isfinite().all()) for value in values):
                raise UserError(
                    f"The gradient of calibration sequence {alone.first} (counted from 0) is not finite: {remedy}"
                )
    raise UserError(
        "The gradient of a calibration sequence of another process, or the sum of several, is not finite: "
        "use --model.dtype bfloat16 or float32."
    )


@contextmanager
def _hooks(linears: dict[str, nn.Linear], hook: Callable[..., None]) -> Iterator[None]:
    handles = [linear.register_forward_hook(partial(hook, name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradients_from_embeddings(model: Any) -> Iterator[None]:
    """Makes the embedded tokens require gradients: with every weight frozen, nothing else starts a backward pass."""
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
