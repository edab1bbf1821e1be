"""Refinement of GPTQ's result: grid and codes are improved in turn, each for the current state of the other.

With W the weight, Q the rounded weight and H = X^T X for the linear's inputs X, the output error due to a row w of W is
E = (w - q) H (w - q)^T, with q the row of Q.

**Grid for given codes.** A row is q = B p: p holds its scales s_1 ... s_M and minima m_1 ... m_M; column m of B holds
the codes of group m, and column M + m ones for the weights of group m, with zeros elsewhere. E is quadratic in p, and
least where

    (B^T H B) p = B^T H w.

For a symmetric format, p holds only the scales, and B the codes minus the code of zero. While GPTQ goes through the
columns, a grid can depend only on the weights of its own group; here all groups compensate for each other.

**Codes for a given grid.** Coordinate descent (QuantEase, arXiv 2309.01885): with all other columns fixed, E as a
function of column j is least at

    q_j + [(w - q) H]_j / H_jj,

so the best value of the grid is the one nearest to that. One sweep goes through all columns; those outside a block are
updated once per block. GPTQ rounds a column while the ones after it are still free; a sweep sees their final values.

Neither step raises E, except where the format rounds the grid, or where a scale is kept because it would change sign.

Shapes: O rows (outputs), I columns (inputs), G columns in a group, M groups in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qpruner.quantization.gptq import BLOCK, numbers_of
from qpruner.quantization.grid import AnyGrid, Span, inverse

CHUNK = 1 << 24
"""Maximum number of elements [n, M, I] of the products that are in memory while grids are fitted."""
RIDGE = 1e-5
"""Share of the diagonal of B^T H B added to it, which keeps scales and minima unchanged where codes do not determine
them."""


def losses(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """The output error E due to each row.

    Args:
        weight: weight, [O, I], in float32.
        values: its rounded values, [O, I].
        hessian: X^T X, damped, [I, I].
    """  # [O], float32
    away = weight - values
    return ((away @ hessian.float()) * away).sum(1)


def refitted(
    weight: Tensor, codes: Tensor, hessian: Tensor, grid: AnyGrid, spans: Sequence[Span]
) -> tuple[Tensor, Tensor]:
    """The scales and minima [O, M] with the least error for fixed codes, before a format stores them.

    Args:
        weight: weight, [O, I], in float32.
        codes: codes, [O, I].
        hessian: X^T X, damped, [I, I].
        grid: current grid of the codes.
        spans: groups of all columns, in their order.
    """
    whole = hessian.float()
    away = (weight - grid.values(codes)) @ whole
    offsets = torch.tensor([span.offset or 0.0 for span in spans], device=weight.device)  # [M]
    steps = codes.float() + offsets[numbers_of(spans, weight.device)]
    together = max(1, CHUNK // (len(spans) * weight.shape[1]))
    parts = [
        _fit(*chunk, whole, spans)
        for chunk in zip(torch.split(away, together), torch.split(steps, together), strict=True)
    ]
    change = torch.cat(parts).float()
    scales, minima = grid.scales, grid.minima
    changed = scales + change[:, : len(spans)]
    scales = torch.where(changed * scales > 0, changed, scales)  # otherwise the order of the values would reverse
    free = torch.tensor([span.offset is None for span in spans], device=weight.device)
    minima = torch.where(free, minima, offsets * scales)
    minima[:, free] += change[:, len(spans) :]
    return scales, minima


def _fit(away: Tensor, steps: Tensor, hessian: Tensor, spans: Sequence[Span]) -> Tensor:
    """The changes of the scales of all groups in some rows, followed by those of the free minima.

    Args:
        away: (w - q) H, [n, I].
        steps: codes, minus the code of zero where minima are not free, [n, I].
        hessian: H, [I, I].
        spans: groups of all columns, F of which have free minima.
    """  # [n, M + F], float64
    every = [slice(span.first, span.last) for span in spans]
    free = [slice(span.first, span.last) for span in spans if span.offset is None]
    products = torch.stack([steps[:, group] @ hessian[group] for group in every], 1)  # [n, M, I]
    normal = torch.cat([products[..., group] @ steps[:, group, None] for group in every], 2)
    slope = _sums(away * steps, every)
    if free:
        mixed, ones = _sums(products, free), _sums(_sums(hessian, free).T, free).expand(len(steps), -1, -1)
        normal = torch.cat([torch.cat([normal, mixed], 2), torch.cat([mixed.transpose(1, 2), ones], 2)], 1)
        slope = torch.cat([slope, _sums(away, free)], 1)
    normal = normal.double()
    held = (normal.diagonal(dim1=1, dim2=2) * RIDGE).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(normal + torch.diag_embed(held), slope.double())


def _sums(values: Tensor, groups: Sequence[slice]) -> Tensor:
    """The sums [..., M] of values [..., I] over groups of columns."""
    return torch.stack([values[..., group].sum(-1) for group in groups], -1)


def swept(weight: Tensor, codes: Tensor, hessian: Tensor, grid: AnyGrid, spans: Sequence[Span]) -> Tensor:
    """The codes after one sweep of coordinate descent; uint8 [O, I].

    Args:
        weight: weight, [O, I], in float32.
        codes: codes, [O, I].
        hessian: X^T X, damped, [I, I].
        grid: grid of the codes, which does not change.
        spans: groups of all columns, in their order.
    """
    columns, numbers = weight.shape[1], numbers_of(spans, weight.device).tolist()
    whole, pivots = hessian.float(), hessian.diagonal().tolist()
    scales, minima = grid.scales.T.contiguous(), grid.minima.T.contiguous()  # [M, O]
    inverses = inverse(scales)
    # Transposed, so that the weights of a column are contiguous in memory.
    values = grid.values(codes).T.contiguous()
    now = codes.T.float().contiguous()
    slopes = whole @ (weight.T - values)  # [I, O], (w - q) H
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        changes = torch.empty_like(values[first:last])
        for j in range(first, last):
            scale, minimum = scales[numbers[j]], minima[numbers[j]]
            wanted = torch.add(values[j], slopes[j], alpha=1 / pivots[j])
            torch.mul(wanted - minimum, inverses[numbers[j]], out=now[j])
            now[j].add_(0.5).floor_().clamp_(0, spans[numbers[j]].top)
            torch.sub(torch.addcmul(minimum, scale, now[j]), values[j], out=changes[j - first])
            slopes[first:last].addr_(whole[first:last, j], changes[j - first], alpha=-1)
        slopes[:first].addmm_(whole[:first, first:last], changes, alpha=-1)
        slopes[last:].addmm_(whole[last:, first:last], changes, alpha=-1)
    return now.T.to(torch.uint8).contiguous()
