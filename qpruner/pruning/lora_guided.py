"""Importance of units from the weights and gradients of LoRA adapters alone (LoRAPrune, arXiv 2305.18403).

A linear of weight W with an adapter computes with W + s B A, s = alpha / r. Removing the weight means s B A = -W, so
the importance of an element is dL/d(s B A) times (W + s B A) (equation 6). The gradient is not computed but
approximated from the gradients dA and dB of the adapter's factors, by what a step of gradient descent does to their
product (equation 10):

    g = s (dB A + B dA - eta dB dA),  eta = 1

Its first two terms are s^2 (G A^T A + B B^T G) with G the gradient of the merged weight: G seen through the rows of A
and the columns of B. There are two ways to turn it into a score:

    paper    the sum over the unit of (g (W + s B A))^2
    code     the sum over the unit of |g (W + s B A)|, divided by the L2 norm of a projection's sums

The scores of coupled projections are added; where several are stacked in one linear, each contributes its own rows.
Scores are averaged over the steps of the fit, G_t = 0.9 G_{t-1} + 0.1 I_t (equation 11).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from qpruner.adapters.lora import Adapter, adapter_on
from qpruner.anatomy import Coupled, decoder_layers
from qpruner.pruning.scores import LayerScores
from qpruner.quantization.formats import dequantize
from qpruner.quantization.packed import PackedLinear

Variant = Literal["paper", "code"]
ELEMENTS_AT_ONCE = 1 << 17
"""Elements of a weight that a CPU scores at once; few enough that intermediate values stay in a core's cache."""
TIMES_ON_CUDA = 64
"""Factor by which CUDA scores more elements at once, as launching kernels takes longer than computing a small piece."""


@dataclass(frozen=True)
class AdapterGradients:
    """The factors of a linear's adapter with their gradients.

    Args:
        lora_A: factor A of the adapter, [r, in].
        lora_B: factor B of the adapter, [out, r].
        grad_A: gradient of A, [r, in].
        grad_B: gradient of B, [out, r].
        scale: factor s by which the forward pass multiplies B A.
    """

    lora_A: Tensor
    lora_B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scale: float

    @classmethod
    def of(cls, adapter: Adapter) -> Self:
        """The gradients that a backward pass left on an adapter; zero where it did not reach it."""
        lora_A, lora_B = adapter.lora_A, adapter.lora_B
        grad_A, grad_B = (torch.zeros_like(part) if part.grad is None else part.grad for part in (lora_A, lora_B))
        return cls(lora_A.float(), lora_B.float(), grad_A.float(), grad_B.float(), adapter.scale)

    def gradient(self, rows: slice, eta: float = 1.0) -> Tensor:
        """Some rows of g, equation 10."""  # [rows, in]
        # Both terms with dA are combined, so that g is one product of inner dimension 2 r.
        left = torch.cat([self.grad_B[rows], self.lora_B[rows] - eta * self.grad_B[rows]], dim=1)
        return (self.scale * left) @ torch.cat([self.lora_A, self.grad_A])

    def merged(self, weight: Tensor, rows: slice) -> Tensor:
        """Some rows of W + s B A."""  # [rows, in]
        return torch.addmm(weight[rows].float(), self.lora_B[rows], self.lora_A, alpha=self.scale)


def unit_scores(
    coupled: Coupled, weight: Tensor, adapter: AdapterGradients, gradient: Tensor | None, variant: Variant
) -> Tensor:
    """The importance of each unit by the weight of one projection.

    Args:
        coupled: projection whose units are scored.
        weight: weight W of the linear that holds it, [out, in].
        adapter: adapter of that linear, with its gradients.
        gradient: gradient of W + s B A, [out, in], to use in place of g; None to use g.
        variant: ``paper`` or ``code``.
    """  # [units] float64
    _, in_features = weight.shape
    by_rows = coupled.axis == 0
    first, end = (coupled.block.start, coupled.block.stop) if by_rows else (0, len(weight))
    sums = torch.zeros(end - first if by_rows else in_features, dtype=torch.float64, device=weight.device)
    step = max(1, ELEMENTS_AT_ONCE * (TIMES_ON_CUDA if weight.is_cuda else 1) // in_features)
    for start in range(first, end, step):
        rows = slice(start, min(start + step, end))
        value = adapter.merged(weight, rows)
        value *= adapter.gradient(rows) if gradient is None else gradient[rows]
        value = value.square_() if variant == "paper" else value.abs_()
        if by_rows:
            sums[rows.start - first : rows.stop - first] = value.sum(1).double()
        else:
            sums += value.sum(0)
    scores = sums.view(-1, coupled.width).sum(1)
    return scores if variant == "paper" else scores / scores.norm().clamp(min=torch.finfo(torch.float64).tiny)


@dataclass
class MovingAverage:
    """The moving average of scores over steps (equation 11), and how many steps had to be skipped.

    Args:
        decay: share of the average that is kept at each step, in [0, 1).
        scores: [layers], average scores; zero before the first step.
        steps: number of steps whose scores were added.
        skipped: number of steps whose scores were not finite.
    """

    decay: float
    scores: list[LayerScores]
    steps: int = 0
    skipped: int = 0

    def add(self, scores: Sequence[LayerScores]) -> None:
        """Adds the scores of a step, unless any of them is not finite."""
        total = torch.stack([layer.kv_groups.sum() + layer.ffn_channels.sum() for layer in scores]).sum()
        if not bool(total.isfinite()):  # no score is below 0, so that nothing cancels
            self.skipped += 1
            return
        self.steps += 1
        self.scores = [
            LayerScores(
                old.kv_groups.to(new.kv_groups).lerp(new.kv_groups, 1 - self.decay),
                old.ffn_channels.to(new.ffn_channels).lerp(new.ffn_channels, 1 - self.decay),
            )
            for old, new in zip(self.scores, scores, strict=True)
        ]


@torch.no_grad()
def score_adapted(model: Any, variant: Variant, gradients: Mapping[nn.Module, Tensor] | None) -> list[LayerScores]:
    """Scores the units of every layer from the gradients of its adapters.

    Linears without an adapter do not contribute; units without any have a score of 0. Base layers are unpacked one
    linear at a time.

    Args:
        model: model below PEFT.
        variant: ``paper`` or ``code``.
        gradients: gradients of W + s B A by linear, [out, in] each, to use in place of those made from the adapters'
            gradients; None to use the latter.

    Returns:
        Scores on the model's device; not finite where a gradient is not.
    """

    def together(parts: Sequence[Coupled], number: int) -> Tensor:
        scores = [torch.zeros(number, dtype=torch.float64, device=parts[0].linear.weight.device)]
        for part in parts:
            if (adapter := adapter_on(part.linear)) is not None:
                base: Any = adapter.base
                weight = dequantize(base) if isinstance(base, PackedLinear) else base.weight
                gradient = None if gradients is None else gradients[part.linear]
                scores.append(unit_scores(part, weight, AdapterGradients.of(adapter), gradient, variant))
        return torch.stack(scores).sum(0)

    return [
        LayerScores(together(layer.group_weights, layer.kv_groups), together(layer.channel_weights, layer.ffn_channels))
        for layer in decoder_layers(model)
    ]
