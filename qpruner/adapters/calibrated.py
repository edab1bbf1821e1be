"""Adapters that start as the best low-rank correction of a quantized linear's outputs on real inputs.

**Idea.** LoftQ corrects the weight: its start is nearest to W in the Frobenius norm, where every input counts alike.
What matters is the output. With X the inputs of the linear over tokens, H = X^T X and s = alpha / r, the start here is

    min |X (W - Q - s B A)^T|^2 = min |(W - Q - s B A) L|_F^2,    H = L L^T,

over all A and B of rank r (CLoQ, arXiv 2501.18475; EoRA, arXiv 2410.21271; QERA, arXiv 2410.06040).

**Formula.** L is invertible once H is damped, so (s B A) L can be any matrix of rank r, and the Eckart-Young theorem
gives the best one: with U Sigma V^T the r leading terms of the SVD of (W - Q) L,

    s B A = U Sigma V^T L^-1.

Every root of H gives the same product. That of Cholesky is the cheapest, a third of I^3 multiplications where an
eigendecomposition takes nine, and r rows are multiplied by its inverse without computing it.

**The split** is that of `qpruner.adapters.loftq`: the rows of A have the norm that they have in plain LoRA, and B holds
the rest. The rows of V^T L^-1 are neither of equal length nor orthogonal, so each row of A is one of them divided by
its length, and the matching column of B is multiplied by that length, which leaves the product unchanged.

**Trade-off.** In directions that the calibration inputs hardly cover, the correction is noise, which is larger the
smaller the damping.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.adapters.loftq import split
from qpruner.adapters.low_rank import truncated_svd
from qpruner.errors import UserError
from qpruner.seeds import derive_seed


@dataclass(frozen=True)
class CalibratedStart:
    """Adapters that start from the error at the outputs of a linear, ``W ~ Q + scale * lora_B @ lora_A``.

    Args:
        lora_A: factor A, [r, in], float32.
        lora_B: factor B, [out, r], float32.
        quantization_error: ``|(W - Q) L| / |W L|``, the relative error of quantization alone.
        error: ``|(W - Q - scale B A) L| / |W L|``, the relative error at the start.
    """

    lora_A: Tensor
    lora_B: Tensor
    quantization_error: float
    error: float


def calibrated_start(
    weight: Tensor,
    quantized: Tensor,
    hessian: Tensor | None,
    *,
    name: str,
    rank: int,
    scale: float,
    damping: float,
    seed: int,
) -> CalibratedStart:
    """The adapters that leave the least error at the outputs of a quantized linear, on the weight's device.

    Args:
        weight: weight W to approximate, [out, in], of any float dtype.
        quantized: values Q of the quantized weight, [out, in].
        hessian: X^T X, the sum over tokens of the products of the linear's inputs, [in, in]; best in float64. None for
            the identity, which gives the start nearest to the weight.
        name: name of the layer; its random draws depend on it and on ``seed`` only, so that all ranks agree.
        rank: rank r of the adapters.
        scale: factor by which the forward pass multiplies ``B A``, ``alpha / r``, above 0.
        damping: addition to the diagonal of the Hessian, in units of its mean; above 0.
        seed: seed of the run.

    Raises:
        UserError: the rank is above that of the layer, a weight or the Hessian is not finite, or the damped Hessian is
            not positive definite.
    """
    assert scale > 0 and damping > 0
    if rank > min(weight.shape):
        raise UserError(
            f"LoRA rank {rank} is too high for {name}, which maps {weight.shape[1]} inputs to {weight.shape[0]} "
            f"outputs: the highest is {min(weight.shape)}. Lower --model.lora.r or prune this layer less."
        )
    if not (weight.isfinite().all() and quantized.isfinite().all()):
        raise UserError(f"The weight of {name} holds values that are not finite. Load an undamaged model.")
    if hessian is not None and not hessian.isfinite().all():
        raise UserError(
            f"What reaches {name} from the calibration text is not finite. Use --model.dtype bfloat16 or float32, "
            f"another base model, or a start of the adapters without calibration."
        )
    weight = weight.detach().float()
    residual = weight - quantized.detach().float()
    lower = None if hessian is None else root(hessian, damping, name=name)
    at_inputs = None if lower is None else lower.float()

    def at_outputs(change: Tensor) -> Tensor:
        return change if at_inputs is None else change @ at_inputs

    wanted = at_outputs(residual)  # [out, in], error at the outputs
    generator = torch.Generator().manual_seed(derive_seed(seed, "calibrated", name))
    size = torch.linalg.vector_norm(at_outputs(weight)).clamp_min(torch.finfo(torch.float32).tiny)
    u, s, vh = truncated_svd(wanted, rank, generator=generator)
    rows = vh if lower is None else torch.linalg.solve_triangular(lower, vh.double(), upper=False, left=False).float()
    lengths = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    negligible = torch.finfo(torch.float32).eps * size * lengths / scale
    lora_A, lora_B = split(u, s * lengths / scale, rows / lengths[:, None], negligible=negligible, generator=generator)
    left = at_outputs(torch.addmm(residual, lora_B, lora_A, alpha=-scale))
    error, before = (float(torch.linalg.vector_norm(lack) / size) for lack in (left, wanted))
    return CalibratedStart(lora_A, lora_B, before, error)


def root(hessian: Tensor, damping: float, *, name: str) -> Tensor:
    """The Cholesky root of a damped Hessian [in, in], in units in which the mean of its diagonal was 1.

    Args:
        hessian: X^T X, [in, in]; if all inputs are zero, the identity is used instead.
        damping: addition to its diagonal, in units of the diagonal's mean; above 0.
        name: name of the layer, for errors.

    Raises:
        UserError: the damped Hessian is not positive definite.
    """  # lower triangular, float64
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    relative = hessian / mean if mean > 0 else torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    relative.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(relative)
    if failed:
        raise UserError(
            f"The Hessian of {name} is not positive, although damping ({damping:g}) was added to its diagonal. "
            f"Raise rounding.damping, or give more calibration text."
        )
    return lower
