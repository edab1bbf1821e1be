"""Adapters that start as the best low-rank correction of what a quantized linear gives for real inputs.

**Idea.** LoftQ corrects the weight: its start is nearest to W in the Frobenius norm, every input counting alike. What
matters is the output. With X the inputs of the linear over tokens, H = X^T X and s = alpha / r, the start here is

    min |X (W - Q - s B A)^T|^2 = min |(W - Q - s B A) S|_F^2,    S = H^1/2 the symmetric root,

over all A, B of rank r (CLoQ, arXiv 2501.18475; EoRA, arXiv 2410.21271; QERA, arXiv 2410.06040).

**Formula.** S is invertible once H is damped, so (s B A) S is any matrix of rank r, and the best is that of Eckart and
Young: with U Sigma V^T the r leading terms of the SVD of (W - Q) S,

    s B A = U Sigma V^T S^-1.

Any other root of H gives the same product; the symmetric one is that of an eigendecomposition, which gives S^-1, too.

**The split** is that of `qpruner.adapters.loftq`: the rows of A have the norm that they have in plain LoRA, and B holds
the rest. The rows of V^T S^-1 are neither of one length nor orthogonal, so a row of A is one of them over its length,
and the column of B takes the length over. That leaves the product as it is.

**Trade-off.** An eigendecomposition of H, about 9 I^3 multiplications, beside the SVD. What the text does not tell of,
directions that its inputs hardly have, is corrected by noise, the larger the smaller the damping.
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
        quantization_error: ``|(W - Q) S| / |W S|``, what quantization alone leaves.
        error: ``|(W - Q - scale B A) S| / |W S|``, what is left at the start.
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
            the identity: the start that is nearest to the weight.
        name: name of the layer; its random draws depend on it and on ``seed`` only, so that all ranks agree.
        rank: r of the adapters.
        scale: what the forward pass multiplies ``B A`` by, ``alpha / r``, above 0.
        damping: what is added to the diagonal of the Hessian, in units of its mean; above 0.
        seed: seed of the run.

    Raises:
        UserError: the rank is above that of the layer, or a weight or the Hessian is not finite.
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
    root, inverse = (None, None) if hessian is None else roots(hessian, damping)

    def at_outputs(change: Tensor) -> Tensor:
        return change if root is None else change @ root

    wanted = at_outputs(residual)  # [out, in], what outputs lack
    generator = torch.Generator().manual_seed(derive_seed(seed, "calibrated", name))
    size = torch.linalg.vector_norm(at_outputs(weight)).clamp_min(torch.finfo(torch.float32).tiny)
    u, s, vh = truncated_svd(wanted, rank, generator=generator)
    rows = vh if inverse is None else vh @ inverse  # [r, in]
    lengths = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    negligible = torch.finfo(torch.float32).eps * size * lengths / scale
    lora_A, lora_B = split(u, s * lengths / scale, rows / lengths[:, None], negligible=negligible, generator=generator)
    left = at_outputs(torch.addmm(residual, lora_B, lora_A, alpha=-scale))
    error, before = (float(torch.linalg.vector_norm(lack) / size) for lack in (left, wanted))
    return CalibratedStart(lora_A, lora_B, before, error)


def roots(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The symmetric root of a Hessian [in, in] and its inverse, in units in which the mean of its diagonal is 1.

    Args:
        hessian: X^T X; that of inputs that are all zero counts as the identity.
        damping: what is added to its diagonal, in units of its mean; above 0.
    """  # float32, found in float64
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    relative = hessian / mean if mean > 0 else torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    relative.diagonal().add_(damping)
    values, vectors = torch.linalg.eigh(relative)
    del relative
    # Above the damping but for rounding errors, which a square root must not meet below zero.
    values = values.clamp_min(damping / 2).sqrt()
    return ((vectors * values) @ vectors.T).float(), ((vectors / values) @ vectors.T).float()
