"""The best approximation of a matrix at a given rank, exact where that is cheap and by a randomized method elsewhere.

**Idea.** ``A ~ U S V^T`` keeps the r largest singular values (Eckart and Young 1936) and with them the energy ``|A|^2 -
|A - U S V^T|^2 = s_1^2 + ... + s_r^2``. An exact SVD finds all ``min(m, n)`` of them, at a cost of O(m n min(m, n)). A
randomized method (Halko, Martinsson and Tropp 2011) looks for them in a subspace of k directions, which costs a few
products with A and a k by k eigenproblem.

**Which subspace.** The residual of quantization is nearly noise, and the singular values of noise crowd at the upper
edge: the 64th of a 4096 by 4096 NF4 residual is 94 % of the first. Subspace iteration, which keeps only the last power
``(A A^T)^q A G`` of a Gaussian block G, separates neighbours at a rate of ``(s_j / s_i)^(2 q)`` and makes hardly any
progress. Block Krylov iteration (Musco and Musco 2015, algorithm 2) keeps every power on the way,

    K = span(A G, (A A^T) A G, ..., (A A^T)^(q-1) A G),

at the cost of the last one alone; its span thereby contains the best polynomial in A A^T, a Chebyshev one, and it needs
the square root of the number of products for the same accuracy, whatever the gaps. The approximation is then ``Q Q^T
A``, cut to rank r, for an orthonormal basis Q of K.

**Trade-off.** Memory for the basis, ``k (m + n)`` numbers, and time to make it orthonormal, O(k^2 min(m, n)); both are
small against A for the ranks of adapters. The result never overstates itself: the returned singular values are the
energy that the returned factors capture. `benchmarks/loftq.py` measures that energy, and the time, against the exact
SVD.
"""

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Columns of the block beyond the rank; they catch what r random columns miss, and keep narrow products efficient."""
STEPS = 8
"""Powers of ``A A^T`` in the subspace, two products with A each. Eight capture 98.7 % on the flattest of spectra."""


def truncated_svd(matrix: Tensor, rank: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular values and vectors, in float32 on the matrix's device.

    Exact where the Krylov basis would span half of the smaller side or more. Elsewhere the energy is 98 % or more of
    the exact one on quantization noise, and practically all of it where singular values decay.

    Args:
        matrix: matrix to approximate, [m, n], finite, of any float dtype.
        rank: rank r of the approximation, from 1 to ``min(m, n)``.
        generator: source of random draws, on the CPU, so that they are the same for every device.

    Returns:
        U [m, r], S [r] (descending, up to rounding) and V^T [r, n]. A row of V^T whose singular value is 0 may be 0.
    """
    assert 1 <= rank <= min(matrix.shape)
    matrix = matrix.float()
    if min(matrix.shape) <= 2 * STEPS * (rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    if matrix.shape[0] > matrix.shape[1]:  # the basis lives on the smaller side
        u, s, vh = truncated_svd(matrix.T, rank, generator=generator)
        return vh.T, s, u.T
    basis = krylov_basis(matrix, rank + OVERSAMPLING, STEPS, generator=generator)  # [m, k]
    image = basis.T @ matrix  # [k, n]
    # The SVD of the wide image [k, n] by its Gram matrix [k, k], many times cheaper. Squaring blurs only values below
    # 1e-3 of the largest, which carry no energy; those returned are norms of the true projections and do not suffer.
    _, vectors = torch.linalg.eigh(image @ image.T)  # ascending
    leading = vectors[:, -rank:].flip(1)  # [k, r]
    projection = leading.T @ image  # [r, n], U^T A
    s = torch.linalg.vector_norm(projection, dim=1)
    return basis @ leading, s, projection / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]


def krylov_basis(matrix: Tensor, width: int, steps: int, *, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of ``span(A G, (A A^T) A G, ..., (A A^T)^(steps-1) A G)``, its vectors as columns.

    Each block is made orthonormal before the next is computed from it: the span is the same, and the powers neither
    overflow nor collapse into one direction. Where blocks overlap, as for a matrix of low rank, the QR of all of them
    completes the basis with arbitrary orthonormal columns, which do no harm.

    Args:
        matrix: matrix A, [m, n] with ``m <= n``.
        width: number of columns of the Gaussian block G.
        steps: number of blocks, ``width * steps <= m``.
        generator: source of the draws of G, on the CPU.
    """  # [m, width * steps]
    gaussian = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    blocks = [torch.linalg.qr(matrix @ gaussian).Q]  # each [m, width]
    for _ in range(steps - 1):
        blocks.append(torch.linalg.qr(matrix @ (matrix.T @ blocks[-1])).Q)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q
