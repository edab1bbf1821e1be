"""What each decoder block's output tells about the model's prediction, found in one pass over calibration text.

One token position is one sample: a number made of the output of each block there, and what the model predicts there.
A process sees its own micro-batches only. It writes their samples at their own place among those of all processes,
whose sum is then the same everywhere, in the same order for any number of processes.

Shapes: L layers, S sequences over all processes, T tokens, B sequences of a micro-batch.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.allocation.mutual_information import Estimate, MutualInformationConfig, estimate
from qpruner.anatomy import decoder_blocks
from qpruner.errors import UserError
from qpruner.likelihood import Head, hidden_states
from qpruner.pruning.calibration import Calibration
from qpruner.seeds import derive_seed


def layer_information(model: Any, calibration: Calibration, config: MutualInformationConfig) -> list[float]:
    """Mutual information, in nats, of each layer's output and the prediction; the same on all processes.

    Warns when there are so few samples that most of what a histogram finds in some layer is chance.

    Args:
        model: causal language model of a supported family, on the device that computes; it is left as it was.
        calibration: the text.
        config: what is observed, and how information is estimated.

    Raises:
        UserError: too little text, an output that is not finite, or an unsupported family.
    """  # [L]
    outputs, predictions = observe(model, calibration, config)
    estimates = [estimate(output, predictions, config) for output in outputs]
    if config.estimator == "histogram":
        _warn_of_chance(outputs, predictions, estimates, config)
    return [one.value for one in estimates]


def observe(model: Any, calibration: Calibration, config: MutualInformationConfig) -> tuple[Tensor, Tensor]:
    """The samples of all processes, on the CPU: sequence by sequence, every position of each.

    Returns:
        Of the blocks' outputs [L, S T], float64; and of predictions [S T], int64 for ``argmax`` and float64 else.

    Raises:
        UserError: too few samples; outputs or logits that are not finite, with the first layer that has them.
    """
    blocks = decoder_blocks(model)
    device = next(model.parameters()).device
    own = sum(batch.tokens.numel() for batch in calibration.batches)
    # A process without micro-batches does not know their length.
    count = int(calibration.reduce(torch.tensor([own], dtype=torch.float64, device=device)))
    config.check_samples(count)
    shape = len(blocks) + 1, calibration.num_sequences, count // calibration.num_sequences
    samples = torch.zeros(shape, dtype=torch.float64, device=device)

    def keep(place: Tensor, module: nn.Module, inputs: Any, output: Any) -> None:
        place.copy_(_summary(output[0] if isinstance(output, tuple) else output, config))

    with _evaluating(model), torch.no_grad():
        for batch in calibration.batches:
            places = samples[:, batch.first : batch.first + len(batch.tokens)]  # [L + 1, B, T]
            with ExitStack() as hooks, calibration.forward_context():
                for place, block in zip(places, blocks, strict=False):
                    hooks.enter_context(block.register_forward_hook(partial(keep, place)))
                hidden = hidden_states(model, batch.tokens.to(device))
                places[-1] = _predictions(Head.of(model), hidden, config)
    samples = calibration.reduce(samples).flatten(1).cpu()
    finite = samples.isfinite().all(1)
    if not finite.all():
        first = int(finite.int().argmin())
        raise UserError(
            f"The {f'output of layer {first}' if first < len(blocks) else 'logits'} on the calibration text (counted "
            f"from 0) holds values that are not finite. Use --model.dtype bfloat16 or float32, or an undamaged model."
        )
    return samples[:-1], samples[-1].long() if config.prediction == "argmax" else samples[-1]


def _summary(output: Tensor, config: MutualInformationConfig) -> Tensor:
    """One number of what a block gives at each position, in float32."""  # [B, T]
    output = output.float()  # [B, T, hidden]
    match config.summary:
        case "mean":
            return output.mean(-1)
        case "norm":
            return torch.linalg.vector_norm(output, dim=-1)
        case "max":
            return output.amax(-1)


def _predictions(head: Head, hidden: Tensor, config: MutualInformationConfig) -> Tensor:
    """The most probable token at each position, or the logarithm of its probability; nan where logits are broken."""
    positions = hidden.flatten(0, 1)
    parts = [_prediction(head(positions[part]), config) for part in head.chunks(positions)]
    return torch.cat(parts).view(hidden.shape[:2])  # [B, T]


def _prediction(logits: Tensor, config: MutualInformationConfig) -> Tensor:
    if config.prediction == "argmax":
        highest, token = logits.max(-1)
        return token.double().where(highest.isfinite(), math.nan)
    return logits.float().log_softmax(-1).amax(-1).double()


def _warn_of_chance(
    outputs: Tensor, predictions: Tensor, estimates: list[Estimate], config: MutualInformationConfig
) -> None:
    """Measures chance by shuffled predictions: the estimate's own correction falls short where samples are few."""
    generator = torch.Generator().manual_seed(derive_seed("mutual information", "shuffled"))
    shuffled = predictions[torch.randperm(len(predictions), generator=generator)]
    chance = [estimate(output, shuffled, config).found for output in outputs]
    left = [one.found - by_chance for one, by_chance in zip(estimates, chance, strict=True)]
    doubtful = [number for number, by_chance in enumerate(chance) if by_chance > left[number]]
    if doubtful:
        worst = min(doubtful, key=lambda number: left[number])
        warnings.warn(
            f"In {len(doubtful)} of {len(outputs)} layers most of the mutual information is chance, such as layer "
            f"{worst}: {len(predictions)} samples give an estimate of {estimates[worst].value:.2g} nats after a "
            f"correction of {estimates[worst].correction:.2g} for bias, and {chance[worst]:.2g} before it with "
            f"predictions shuffled. Raise num_sequences or length of the calibration, lower bins, or choose the "
            f"estimator neighbours.",
            stacklevel=3,
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which each module is in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
