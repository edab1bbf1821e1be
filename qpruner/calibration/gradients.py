"""Gradients of the loss on calibration text for the weights within the blocks of a model, one block at a time.

No weight requires a gradient. While a block runs backward, the inputs of each linear and the gradient at its output
give the gradient that is needed: that of its weight, or that of gates on its inputs (see `qpruner.calibration.gates`).
Gradients are summed over all micro-batches and then over all processes, handed over when the block is done, and freed.
Besides the weights, the kept hidden states and the activations of one block, memory thus holds the gradients of one
block at most, and the results do not depend on how the text is cut into micro-batches. The same pass can also give the
gradient of each single sequence.

Shapes: B sequences of a micro-batch, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import decoder_layers
from qpruner.calibration.blocks import BlockRunner, block_runner, linears_within, watching_gradients
from qpruner.calibration.text import Calibration, micro_batches
from qpruner.errors import UserError
from qpruner.likelihood import causal_model, nll_of_targets
from qpruner.processes import Processes

Consume = Callable[[str, Tensor, Tensor | None], Tensor]


def gradient_sums(
    model: Any,
    linears: dict[str, nn.Linear],
    calibration: Calibration,
    consume: Consume,
    *,
    sizes: dict[str, int],
    per_sequence: bool,
) -> dict[str, Tensor]:
    """Results computed from the gradient of each linear's weight; the same on all processes.

    Args:
        model: model whose weights stay frozen.
        linears: linears within the model's blocks, by name.
        calibration: this process's share of the text.
        consume: computes a tensor [size], in float64, from a linear's name, the gradient of its weight [out, in] in
            float32 (of the loss averaged over all sequences of all processes), and the average over these sequences of
            the squared gradient of each one's loss, [out, in] (None unless ``per_sequence``). It is called once for
            each linear, from the last block to the first.
        sizes: number of elements of the tensor that ``consume`` returns for each linear, by name of the linear.
        per_sequence: whether ``consume`` needs squared gradients.

    Returns:
        The tensor from ``consume`` for each linear, by name.

    Raises:
        UserError: a result is not finite; the message names the sequence that causes this, if this process has it.
    """

    def find(share: Calibration) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        gradients = _BlockGradients(per_sequence)
        for members in blocks_backward(model, linears, share, gradients.add):
            for name, linear in members.items():
                results[name] = consume(name, *gradients.take(name, linear, share))
        return {name: results[name] for name in linears}

    results = only_finite(find, model, calibration)
    assert all(results[name].shape == (size,) for name, size in sizes.items())
    return results


def blocks_backward(
    model: Any, linears: dict[str, nn.Linear], calibration: Calibration, see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[dict[str, nn.Linear]]:
    """Sends text forward through a model and backward, from the last block to the first.

    Args:
        model: model whose weights stay frozen.
        linears: linears within the model's blocks, by name.
        calibration: this process's share of the text.
        see: takes a linear's name, its inputs [B, T, in] and the gradient at its output [B, T, out], of the sum over
            sequences of each one's mean loss. In a model with experts, B is 1.

    Yields:
        The linears of each block by name, on the compute device, once all text has passed backward through the block.
    """
    if any(layer.experts for layer in decoder_layers(causal_model(model))):
        # The tokens that reach an expert come without the number of their sequence, so sequences pass one by one.
        sequences = [
            sequence for batch in calibration.batches for sequence in micro_batches(batch.tokens, 1, batch.first)
        ]
        calibration = replace(calibration, batches=sequences)
    with block_runner(model, calibration) as runner:
        entering = [runner.embed()]
        for number in range(len(runner.blocks) - 1):
            entering.append([runner.keep(output) for output in runner.outputs(number, entering[-1])])
        slope: Callable[[int, Tensor], Tensor] = partial(_slope_of_loss, runner)
        for number in reversed(range(len(runner.blocks))):
            members = linears_within(runner.blocks[number], linears)
            with runner.working(number):
                with watching_gradients(members, see):
                    slopes = [runner.keep(at_input) for at_input in runner.backward(number, entering.pop(), slope)]
                slope = partial(_slope_after, slopes)
                yield members


def _slope_of_loss(runner: BlockRunner, place: int, output: Tensor) -> Tensor:
    """The gradient of the sum over sequences of each one's mean loss, at the output of the last block."""  # [B, T, H]
    with torch.enable_grad():
        leaf = output.requires_grad_()
        before_targets = runner.last(leaf)[:, :-1]
        targets = runner.batches[place].tokens[:, 1:].to(output.device)
        with runner.context():
            nll = nll_of_targets(runner.head, before_targets.flatten(0, 1), targets.flatten())
        (slope,) = torch.autograd.grad(nll.view(targets.shape).mean(1).sum(), leaf)
    return slope


def _slope_after(slopes: list[Tensor], place: int, output: Tensor) -> Tensor:
    """The gradient at the output of a block, as computed by the block after it."""  # [B, T, H]
    return slopes[place]


class _BlockGradients:
    """Gradients of the weights of one block's linears, summed over micro-batches."""

    def __init__(self, per_sequence: bool) -> None:
        self._per_sequence = per_sequence
        self._sums: dict[str, tuple[Tensor, Tensor | None]] = {}

    def add(self, name: str, inputs: Tensor, at_output: Tensor) -> None:
        gradient, squared = weight_gradient(at_output, inputs, self._per_sequence)
        if name in self._sums:
            earlier, earlier_squared = self._sums[name]
            gradient += earlier
            if squared is not None and earlier_squared is not None:
                squared += earlier_squared
        self._sums[name] = gradient, squared

    def take(self, name: str, linear: nn.Linear, calibration: Calibration) -> tuple[Tensor, Tensor | None]:
        """The averages over all sequences of all processes of the gradient and of the squared gradient."""
        processes = calibration.processes
        if name in self._sums:
            gradient, squared = self._sums.pop(name)
        else:  # this process has no micro-batch
            gradient = torch.zeros(linear.out_features, linear.in_features, device=processes.device)
            squared = torch.zeros_like(gradient) if self._per_sequence else None
        share = calibration.num_sequences
        return processes.reduce(gradient) / share, None if squared is None else processes.reduce(squared) / share


def weight_gradient(at_output: Tensor, inputs: Tensor, per_sequence: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of a linear's weight, and the sum over sequences of its square, in float32.

    Products are computed in the dtype of the inputs, as in an ordinary backward pass, but in float32 for float16, which
    would overflow. Sums over sequences are always in float32.

    Args:
        at_output: gradient at the output of the linear, [B, T, out].
        inputs: inputs of the linear, [B, T, in].
        per_sequence: whether squares are computed; without them the second result is None.
    """  # [out, in]
    inputs = inputs.float() if inputs.dtype is torch.float16 else inputs  # [B, T, in]
    at_output = at_output.to(inputs.dtype)  # [B, T, out]
    if not per_sequence:
        return (at_output.flatten(0, 1).T @ inputs.flatten(0, 1)).float(), None
    gradient = torch.zeros(at_output.shape[-1], inputs.shape[-1], device=inputs.device)
    squared = torch.zeros_like(gradient)
    for sequence_at_output, sequence_inputs in zip(at_output, inputs, strict=True):
        of_sequence = (sequence_at_output.T @ sequence_inputs).float()
        gradient += of_sequence
        squared += of_sequence.square_()
    return gradient, squared


def only_finite(
    find: Callable[[Calibration], dict[str, Tensor]], model: Any, calibration: Calibration
) -> dict[str, Tensor]:
    """Results on calibration text, after checking that they are finite.

    Args:
        find: computes tensors by name from calibration text.
        model: model that the text passes through.
        calibration: this process's share of the text.

    Raises:
        UserError: a tensor is not finite. To name the first sequence that causes this, those of this process are tried
            one by one.
    """
    results = find(calibration)
    if _finite(results):
        return results
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    remedy = (
        f"{broken[0]} of the base model holds values that are not finite. Load an undamaged model."
        if broken
        else "use --model.dtype bfloat16 or float32, or leave its text out."
    )
    alone = Processes.alone(calibration.processes.device, calibration.processes.forward_context)
    for batch in calibration.batches:
        for sequence in micro_batches(batch.tokens, 1, batch.first):
            if not _finite(find(replace(calibration, batches=[sequence], processes=alone))):
                raise UserError(
                    f"The gradient of calibration sequence {sequence.first} (counted from 0) is not finite: {remedy}"
                )
    raise UserError(
        "The gradient of a calibration sequence of another process, or the sum of several, is not finite: "
        "use --model.dtype bfloat16 or float32."
    )


def _finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())
