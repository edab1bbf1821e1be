"""LoftQ: adapters that start as the best low-rank correction of the quantized weight (Li et al. 2023).

**Idea.** Plain LoRA starts from ``Q + s B A`` with ``B = 0``: the quantized model, error and all. LoftQ chooses Q, A
and B together so that the start is as close to the weight W as a quantized matrix plus a rank-r term can be,

    min |W - Q - s B A|_F,    Q in the range of the format,  s = alpha / r.

**Formula** (arXiv 2310.08659, algorithm 1). With ``B_0 A_0 = 0``, for t = 1, ..., T

    Q_t       = q(W - s B_{t-1} A_{t-1})
    s B_t A_t = the r leading terms U S V^T of the SVD of W - Q_t.

The second step minimizes the error for its Q_t. The first minimizes nothing: a format chooses its scales by a rule, not
by the Frobenius norm. The error may therefore rise with T, and the iterate with the smallest error is returned.

**The scale.** The paper has s = 1. The forward pass of LoRA multiplies ``B A`` by ``alpha / r``; unscaled factors of
the residual would be applied ``alpha / r`` times over, and at alpha = 2 r the error would keep its size and only change
its sign.

**The split.** The product alone fixes neither factor. The paper's ``A = sqrt(S) V^T``, ``B = U sqrt(S)`` makes both
tiny where rounding errors are tiny, and the gradient of each is proportional to the other, so that training starts
slowly: a small Llama, half pruned and in 8 bits, reached a perplexity of 181 in the steps in which plain LoRA reached
161 (benchmarks/quantization.py, seed 0). Here the rows of A have the norm that they have in plain LoRA, and B holds the
rest, small as plain LoRA's zeros: 165.

**Trade-off.** Rounding errors are nearly noise, and r directions hold only a share of the energy of noise, about ``r (1
/ sqrt(in) + 1 / sqrt(out))^2``: 0.8 % for rank 8 at 4096 by 4096, more in smaller (pruned) layers and wherever errors
follow a pattern. Each of the T iterations costs a quantization and a factorisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qpruner.adapters.low_rank import truncated_svd
from qpruner.errors import UserError
from qpruner.seeds import derive_seed

T = TypeVar("T")
ROW_NORM = 3**-0.5
"""The norm of a row of A in plain LoRA, whose entries are uniform in +-1 / sqrt(in)."""


@dataclass(frozen=True)
class LoftQResult(Generic[T]):
    """A quantized weight and the adapters that start from its residual, ``W ~ Q + scale * lora_B @ lora_A``.

    Args:
        quantized: weight in the number format.
        lora_A: factor A, [r, in], float32.
        lora_B: factor B, [out, r], float32.
        quantization_error: ``|W - q(W)| / |W|`` in the Frobenius norm, of quantization alone.
        errors: ``|W - Q_t - scale * B_t A_t| / |W|`` of every iteration; the result is the iterate with the smallest.
    """

    quantized: T
    lora_A: Tensor
    lora_B: Tensor
    quantization_error: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative error of the result, at most `quantization_error`."""
        return min(self.errors)


def loftq(
    weight: Tensor,
    quantize: Callable[[Tensor], T],
    dequantize: Callable[[T], Tensor],
    *,
    name: str,
    rank: int,
    scale: float,
    num_iterations: int,
    seed: int,
) -> LoftQResult[T]:
    """Quantizes a weight and initialises its adapters together, in float32 on the weight's device.

    Besides the weight, this holds three float32 matrices of its size and two quantized copies in memory.

    Args:
        weight: weight W to approximate, [out, in], of any float dtype.
        quantize: number format; takes a weight [out, in] in float32.
        dequantize: inverse of ``quantize``, up to rounding; returns [out, in] in float32 or half precision.
        name: name of the layer; its random draws depend on it and on ``seed`` only, so that all ranks agree.
        rank: rank r of the adapters.
        scale: factor by which the forward pass multiplies ``B A``, ``alpha / r``, above 0.
        num_iterations: number T of iterations, at least 1.
        seed: seed of the run.

    Raises:
        UserError: the rank is above that of the layer, or the weight holds an infinity or a nan.
    """
    assert num_iterations >= 1 and scale > 0
    out_features, in_features = weight.shape
    if rank > min(weight.shape):
        raise UserError(
            f"LoRA rank {rank} is too high for {name}, which maps {in_features} inputs to {out_features} outputs: "
            f"the highest is {min(weight.shape)}. Lower --model.lora.r or prune this layer less."
        )
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise UserError(f"The weight of {name} holds values that are not finite. Load an undamaged model.")
    norm = torch.linalg.vector_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    generator = torch.Generator().manual_seed(derive_seed(seed, "loftq", name))

    lora_A, lora_B = weight.new_zeros(rank, in_features), weight.new_zeros(out_features, rank)
    errors: list[float] = []
    for _ in range(num_iterations):
        quantized = quantize(torch.addmm(weight, lora_B, lora_A, alpha=-scale))
        residual = weight - dequantize(quantized)
        if not errors:
            quantization_error = float(torch.linalg.vector_norm(residual) / norm)
        u, s, vh = truncated_svd(residual, rank, generator=generator)
        lora_A, lora_B = split(
            u, s / scale, vh, negligible=torch.finfo(s.dtype).eps * norm / scale, generator=generator
        )
        error = float(torch.linalg.vector_norm(torch.addmm(residual, lora_B, lora_A, alpha=-scale)) / norm)
        if not errors or error < min(errors):
            best = quantized, lora_A, lora_B
        errors.append(error)
    return LoftQResult(*best, quantization_error, tuple(errors))


def split(u: Tensor, s: Tensor, vh: Tensor, *, negligible: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors ``A = c V^T`` and ``B = U S / c``, c being the norm of a row of A in plain LoRA.

    Where there is nothing to correct (a lossless format, a residual of lower rank), both factors would be zero, and no
    gradient would ever move them; such a direction starts as in plain LoRA, with A drawn at random and B zero.

    Args:
        u: left singular vectors, [out, r].
        s: singular values, [r].
        vh: right singular vectors, [r, in].
        negligible: value up to which a singular value counts as zero.
        generator: source of random draws, on the CPU.

    Returns:
        Factors A [r, in] and B [out, r].
    """
    drawn = torch.nn.init.kaiming_uniform_(torch.empty(vh.shape), a=5**0.5, generator=generator).to(vh.device)
    kept = s.where(s > negligible, 0)  # [r]
    return torch.where(kept[:, None] > 0, vh * ROW_NORM, drawn), u * (kept / ROW_NORM)
