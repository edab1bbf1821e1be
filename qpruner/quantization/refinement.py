"""What GPTQ rounded gets better: codes and grid in turn, each to the least error that the other allows.

With W the weight, Q the rounded one and H = X^T X of the linear's inputs, the error at its outputs is, for each row
alone, E = (w - q) H (w - q)^T.

**Grid for given codes.** A row is q = B p: p holds its scales s_1 ... s_M and minima m_1 ... m_M, and column m of B the
codes of group m, column M + m ones in its place, zero elsewhere. E is quadratic in p, least at

    (B^T H B) p = B^T H w.

Of a symmetric format p holds the scales alone, and B codes less those of zero. While GPTQ goes through the columns a
grid can know only of the weights of its own group; here all groups make up for each other.

**Codes for a given grid.** Coordinate descent (QuantEase, arXiv 2309.01885): with all other columns as they are, E is
least in column j at

    q_j + [(w - q) H]_j / H_jj,

and of the values of the grid at the nearest to that. One sweep goes through all columns, of which those beyond a block
hear once a block. GPTQ rounds a column when those behind it are still free; a sweep sees what they became.

Neither raises E, but for how the format stores the grid.

Shapes: O rows (outputs), I columns (inputs), G columns in a group, M groups in a row.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpruner.plan import ROW
from qpruner.quantization.gptq import BLOCK
from qpruner.quantization.grid import Grid, inverse

CHUNK = 1 << 24
"""Numbers that are held beside the sums while a grid is fitted."""
RIDGE = 1e-5
"""Share of the diagonal of B^T H B that holds scales and minima where they are, if the codes do not tell."""


def losses(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """The error of each row at the outputs.

    Args:
        weight: weight, [O, I], in float32.
        values: its rounded values, [O, I].
        hessian: X^T X, damped, [I, I].
    """  # [O], float32
    away = weight - values
    return ((away @ hessian.float()) * away).sum(1)


def refitted(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, offset: float | None) -> tuple[Tensor, Tensor]:
    """The scales and minima [O, M] that leave the least error with the codes as they are.

    Args:
        weight: weight, [O, I], in float32.
        codes: codes, [O, I].
        hessian: X^T X, damped, [I, I].
        grid: grid of the codes.
        offset: minimum in units of the scale, of a symmetric format; None where it is free.
    """
    rows, groups = grid.scales.shape
    group = grid.group if groups > 1 else weight.shape[1]
    missing = groups * group - weight.shape[1]
    whole = pad(hessian.float(), (0, missing, 0, missing)).view(groups, group, groups, group)
    # Zeros beyond the last column: what is there has no part in any product.
    away = pad((weight - grid.values(codes)) @ hessian.float(), (0, missing)).view(rows, groups, group)
    steps = pad(codes.float() + (offset or 0.0), (0, missing)).view(rows, groups, group)
    together = max(1, CHUNK // (groups * weight.shape[1]))
    parts = [
        _fit(*chunk, whole, free=offset is None)
        for chunk in zip(torch.split(away, together), torch.split(steps, together), strict=True)
    ]
    change = torch.cat(parts).float()
    scales = grid.scales + change[:, :groups]
    scales = torch.where(scales * grid.scales > 0, scales, grid.scales)  # codes would run the other way
    return scales, grid.minima + change[:, groups:] if offset is None else offset * scales


def _fit(away: Tensor, steps: Tensor, hessian: Tensor, *, free: bool) -> Tensor:
    """How scales, and minima where they are free, change in some rows.

    Args:
        away: (w - q) H, [n, M, G].
        steps: codes, less those of zero, [n, M, G].
        hessian: H, [M, G, M, G].
        free: whether minima are free.
    """  # [n, 2 M] or [n, M], float64
    products = torch.einsum("nag,agbk->nabk", steps, hessian)  # [n, M, M, G]
    normal = torch.einsum("nabk,nbk->nab", products, steps)
    slope = (away * steps).sum(-1)
    if free:
        mixed, ones = products.sum(-1), hessian.sum((1, 3)).expand(len(steps), -1, -1)
        normal = torch.cat([torch.cat([normal, mixed], 2), torch.cat([mixed.transpose(1, 2), ones], 2)], 1)
        slope = torch.cat([slope, away.sum(-1)], 1)
    normal = normal.double()
    held = (normal.diagonal(dim1=1, dim2=2) * RIDGE).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(normal + torch.diag_embed(held), slope.double())


def swept(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """The codes after one sweep of coordinate descent; uint8 [O, I].

    Args:
        weight: weight, [O, I], in float32.
        codes: codes, [O, I].
        hessian: X^T X, damped, [I, I].
        grid: grid that they stay on.
    """
    columns = weight.shape[1]
    group = columns if grid.group == ROW else grid.group
    whole, pivots = hessian.float(), hessian.diagonal().tolist()
    scales, minima = grid.scales.T.contiguous(), grid.minima.T.contiguous()  # [M, O]
    # A column is a row of what follows: its weights lie side by side in memory.
    values = grid.values(codes).T.contiguous()
    now = codes.T.float().contiguous()
    slopes = whole @ (weight.T - values)  # [I, O], (w - q) H
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        changes = torch.empty_like(values[first:last])
        for j in range(first, last):
            scale, minimum = scales[j // group], minima[j // group]
            wanted = torch.add(values[j], slopes[j], alpha=1 / pivots[j])
            torch.mul(wanted - minimum, inverse(scale), out=now[j])
            now[j].add_(0.5).floor_().clamp_(0, grid.levels - 1)
            torch.sub(torch.addcmul(minimum, scale, now[j]), values[j], out=changes[j - first])
            slopes[first:last].addr_(whole[first:last, j], changes[j - first], alpha=-1)
        slopes[:first].addmm_(whole[:first, first:last], changes, alpha=-1)
        slopes[last:].addmm_(whole[last:, first:last], changes, alpha=-1)
    return now.T.to(torch.uint8).contiguous()
