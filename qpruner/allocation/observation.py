"""How much each decoder block's output tells about the model's prediction, found in one pass over calibration text.

One token position is one sample: a number computed from the output of each block there, and the model's prediction
there. A process sees only its own micro-batches. It writes their samples to their own places among those of all
processes, so the sum over processes is the same everywhere, in the same order for any number of processes.

Shapes: L layers, S sequences over all processes, T tokens, B sequences of a micro-batch.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from qpruner.allocation.mutual_information import Estimate, MutualInformationConfig, estimate
from qpruner.calibration.blocks import BlockRunner, block_runner
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.seeds import derive_seed


def layer_information(model: Any, calibration: Calibration, config: MutualInformationConfig) -> list[float]:
    """Mutual information, in nats, of each layer's output and the prediction; the same on all processes.

    Warns if there are so few samples that most of what a histogram finds in some layer is chance.

    Args:
        model: causal language model of a supported family, on the device that computes; it is left unchanged.
        calibration: calibration text.
        config: what is observed, and how information is estimated.

    Raises:
        UserError: too little text, an output that is not finite, or an unsupported family.
    """  # [L]
    outputs, predictions = observe(model, calibration, config)
    estimates = [estimate(output, predictions, config) for output in outputs]
    if config.estimator == "histogram":
        _warn_of_chance(outputs, predictions, estimates, config)
    return [information.value for information in estimates]


def observe(model: Any, calibration: Calibration, config: MutualInformationConfig) -> tuple[Tensor, Tensor]:
    """The samples of all processes, on the CPU: sequence by sequence, every position of each.

    Returns:
        Samples of the blocks' outputs [L, S T], float64, and of predictions [S T], int64 for ``argmax`` and otherwise
        float64.

    Raises:
        UserError: too few samples; outputs or logits that are not finite, naming the first layer that has them.
    """
    processes = calibration.processes
    num_tokens = sum(batch.tokens.numel() for batch in calibration.batches)
    # A process without micro-batches does not know their length.
    count = int(processes.reduce(torch.tensor([num_tokens], dtype=torch.float64, device=processes.device)))
    config.check_samples(count)
    with block_runner(model, calibration) as runner:
        num_layers = len(runner.blocks)
        shape = num_layers + 1, calibration.num_sequences, count // calibration.num_sequences
        samples = torch.zeros(shape, dtype=torch.float64, device=processes.device)
        rows = [slice(batch.first, batch.first + len(batch.tokens)) for batch in calibration.batches]
        states = runner.embed()
        for number in range(num_layers):
            for place, output in enumerate(runner.outputs(number, states)):
                samples[number, rows[place]] = _summary(output, config).double()
                states[place] = runner.keep(output)
        for place, hidden in enumerate(states):
            samples[-1, rows[place]] = _predictions(runner, hidden, config)
    samples = processes.reduce(samples).flatten(1).cpu()
    finite = samples.isfinite().all(1)
    if not finite.all():
        first = int(finite.int().argmin())
        raise UserError(
            f"The {f'output of layer {first}' if first < num_layers else 'logits'} on the calibration text (counted "
            f"from 0) holds values that are not finite. Use --model.dtype bfloat16 or float32, or an undamaged model."
        )
    return samples[:-1], samples[-1].long() if config.prediction == "argmax" else samples[-1]


def _summary(output: Tensor, config: MutualInformationConfig) -> Tensor:
    """One number computed from the output of a block at each position, in float32."""  # [B, T]
    output = output.float()  # [B, T, hidden]
    match config.summary:
        case "mean":
            return output.mean(-1)
        case "norm":
            return torch.linalg.vector_norm(output, dim=-1)
        case "max":
            return output.amax(-1)


@torch.no_grad()
def _predictions(runner: BlockRunner, hidden: Tensor, config: MutualInformationConfig) -> Tensor:
    """The most probable token at each position, or its log-probability; nan where logits are not finite."""
    positions = runner.last(hidden).flatten(0, 1)
    parts = [_prediction(runner.logits(positions[part]), config) for part in runner.head.chunks(positions)]
    return torch.cat(parts).view(hidden.shape[:2])  # [B, T]


def _prediction(logits: Tensor, config: MutualInformationConfig) -> Tensor:
    if config.prediction == "argmax":
        highest, token = logits.max(-1)
        return token.double().where(highest.isfinite(), math.nan)
    return logits.float().log_softmax(-1).amax(-1).double()


def _warn_of_chance(
    outputs: Tensor, predictions: Tensor, estimates: list[Estimate], config: MutualInformationConfig
) -> None:
    """Measures chance with shuffled predictions: the estimate's own correction falls short where samples are few."""
    generator = torch.Generator().manual_seed(derive_seed("mutual information", "shuffled"))
    shuffled = predictions[torch.randperm(len(predictions), generator=generator)]
    chance = [estimate(output, shuffled, config).uncorrected for output in outputs]
    left = [information.uncorrected - by_chance for information, by_chance in zip(estimates, chance, strict=True)]
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
