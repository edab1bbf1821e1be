"""Sums that compensation and rounding of every pruned model need, collected once from the dense model.

``local`` compensation (see `qpruner.pruning.compensation`) needs what a linear of the dense model loses when some of
its inputs are removed. With K the inputs that stay, G those that are removed, and H = X^T D X of the dense inputs X
over tokens weighted by D, everything that the least squares needs follows from H and the sums s = X^T D 1, without the
text:

    X_K^T D X_K = H_KK,   X_K^T D E = H_KG W_G^T,   |E|^2 = tr(W_G H_GG W_G^T),   E^T D 1 = W_G s_G,

where E = X_G W_G^T is what the outputs lose. Without a ridge, the weight becomes W H_:K H_KK^-1. H_KK is also the
Hessian with which `qpruner.quantization.rounding` rounds the weights that stay.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qpruner.anatomy import decoder_layers
from qpruner.calibration.blocks import block_runner
from qpruner.calibration.regression import Change, Fit, Sums, fit_
from qpruner.calibration.text import Calibration
from qpruner.likelihood import causal_model
from qpruner.pruning.compensation import OutputLinears, SplitSums, Stream

PARTS = ("tokens", "gram", "inputs")
"""The parts of `Sums` that are kept; the others describe missing outputs, which do not exist before pruning."""


def gather_sums(model: Any, calibration: Calibration, consume: Callable[[int, dict[str, Tensor]], None]) -> None:
    """Passes text through a dense model and hands over the sums of its layers, one layer at a time.

    Args:
        model: dense causal language model, on the compute device.
        calibration: this process's share of the text.
        consume: called with the index of each layer and its sums over all processes, float32 on the CPU, named
            ``projection/split/part``: for ``o`` and ``down``, over the sequences that ``decide`` and those
            ``held_out``.
    """
    stream, processes = Stream.of(model), calibration.processes
    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number, layer in enumerate(decoder_layers(causal_model(model))):
            seeing = OutputLinears(runner, number, layer)
            sums = {name: SplitSums(linear.in_features, 0, processes.device) for name, linear in seeing.linears.items()}
            for place, (output, seen) in enumerate(seeing.work(states)):
                behind = stream.behind(states[place], seen)
                for name, of_linear in sums.items():
                    nothing = seen[name].outputs[..., :0]
                    of_linear.add(calibration.batches[place], seen[name].inputs, nothing, behind[name])
                states[place] = runner.keep(output)
            consume(
                number,
                {
                    f"{name}/{split}/{part}": getattr(total, part).float().cpu()
                    for name, of_linear in sums.items()
                    for split, total in of_linear.over(processes).items()
                    for part in PARTS
                },
            )


def fit_without(
    tensors: Mapping[str, Tensor], projection: str, weight: Tensor, stay: Tensor, *, bias: bool
) -> tuple[Change | None, Fit]:
    """The best change of a linear once some of its inputs are removed; as `compensate_` with ``local``.

    Args:
        tensors: sums of its layer, from `gather_sums`.
        projection: ``o`` or ``down``.
        weight: weight of the dense linear, [out, in].
        stay: indices of the inputs that stay, [n].
        bias: whether the linear has a bias, which is then changed, too.
    """
    stays = torch.zeros(weight.shape[1], dtype=torch.bool)
    stays[stay] = True
    go, lost = (~stays).nonzero().flatten(), weight.detach().cpu().double()[:, ~stays]
    decide, held_out = (
        _sums_without({part: tensors[f"{projection}/{split}/{part}"].double() for part in PARTS}, stay, go, lost)
        for split in ("decide", "held_out")
    )
    return fit_(decide, held_out, bias=bias)


def grams_among(tensors: Mapping[str, Tensor], projection: str, stay: Tensor) -> tuple[Tensor, Tensor]:
    """X_K^T D X_K of the inputs that stay, for the sequences that decide and for those that are held out, [n, n] each.

    Args:
        tensors: sums of its layer, from `gather_sums`.
        projection: ``o`` or ``down``.
        stay: indices of the inputs that stay, [n].
    """
    decide, held_out = (tensors[f"{projection}/{split}/gram"][stay][:, stay] for split in ("decide", "held_out"))
    return decide.double(), held_out.double()


def _sums_without(dense: Mapping[str, Tensor], stay: Tensor, go: Tensor, lost: Tensor) -> Sums:
    """Sums of a linear without some inputs; ``lost`` [out, gone] are the weights of the removed ones."""
    gram, inputs = dense["gram"], dense["inputs"]
    of_gone = gram[go]
    return Sums(
        dense["tokens"].clone(),  # the caller merges other sums into the returned ones
        gram[stay][:, stay],
        of_gone[:, stay].T @ lost.T,
        inputs[stay],
        lost @ inputs[go],
        ((lost @ of_gone[:, go]) * lost).sum(),
    )
