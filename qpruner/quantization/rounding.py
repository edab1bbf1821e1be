"""Calibrated rounding: rounds the weight of a linear to a grid so that its outputs on real inputs change little.

With W the weight, Q the rounded one, X the inputs of the linear over tokens and H = X^T X, rounding leaves

    |X (W - Q)^T|^2 = tr (W - Q) H (W - Q)^T.

- ``nearest`` takes the nearest value of the grid for each weight: it minimises |W - Q|^2, regardless of H.
- ``gptq`` rounds column after column, and the remaining columns compensate for the error; see
  `qpruner.quantization.gptq`. In the plain order, the grid of a group is chosen from its weights at the time it is
  reached. If a format's stored scales depend on each other (because they are quantized themselves), the whole grid is
  known only at the end, and all columns are rounded once more on it. With ``act_order``, columns are rounded in order
  of decreasing H_qq, so that those that matter most are rounded while most other columns can still compensate, and the
  grid is chosen from the original weight. Afterwards grid and codes are improved in turn
  (`qpruner.quantization.refinement`).

**Upstream error** (QEP, NeurIPS 2025; GPTAQ, ICML 2025; see `corrected_weight`). With inputs Xq from a quantized prefix
and X from the dense model, the weight whose outputs on Xq are nearest to X W^T is W C (Xq^T Xq)^-1, C = X^T Xq.
Rounding this weight instead of W, with H = Xq^T Xq, lets each linear compensate for the errors of those before it.

**Output gradients** (GuidedQuant, ICML 2025). The rows are divided into g groups, each with its own matrix
H_k = X^T diag(d_k) X, where d_k is the squared gradient of the loss at the outputs, averaged over the rows of the
group. Errors then count by their effect on the loss. Each group of rows is rounded as a separate linear.

**Two segments.** If leading columns are held in another precision, each segment has its own grids, and all columns are
rounded in one pass, so that columns of one segment compensate for those of the other.

Shapes: O rows (outputs), I columns (inputs), M groups in a row, g row groups, as `torch.Tensor.tensor_split` cuts rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from qpruner.errors import UserError, check_ranges
from qpruner.plan import Precision
from qpruner.quantization.gptq import Choose, Factor, FixedGrid, FreshGrid, damped, gptq
from qpruner.quantization.grid import AnyGrid, GridStore, Span
from qpruner.quantization.grid_search import GridSearch, Segment, search_segments
from qpruner.quantization.refinement import losses, refitted, swept
from qpruner.quantization.segments import GridSegments, leading_of

Method = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class RoundingConfig:
    """How weights are rounded to their grid.

    Args:
        method: rounding method: ``nearest`` rounds each weight by itself; ``gptq`` lets the remaining columns
            compensate for each column that is rounded, judged by the calibration text.
        grid: search for the scale and minimum of each group of weights: ``minmax``, ``mse`` or ``neuqi``.
        act_order: whether gptq rounds the columns with the largest inputs first.
        damping: amount added to the diagonal of the Hessian, in units of its mean; above 0, at most 1.
        alpha: strength with which errors of earlier linears are compensated for, from 0 (each linear approximates its
            own weight) to 1 (each linear aims at the outputs of the dense model).
        refinements: maximum number of rounds after gptq, each of which fits scales and minima to the codes and then
            chooses new codes; at least 0. Rounds end when they no longer reduce the error on the calibration text.
        first_order: share of the remaining columns' deviation from the original weight that gptq undoes before it
            rounds each column, in [0, 1).

    Raises:
        UserError: an option outside its range.
    """

    method: Method = "gptq"
    grid: GridSearch = "neuqi"
    act_order: bool = False
    damping: float = 0.1
    alpha: float = 1.0
    refinements: int = 3
    first_order: float = 0.0

    def __post_init__(self) -> None:
        methods, grids = get_args(Method), get_args(GridSearch)
        check_ranges(
            self,
            "rounding",
            method=(f"one of {', '.join(methods)}", self.method in methods),
            grid=(f"one of {', '.join(grids)}", self.grid in grids),
            damping=("above 0 and at most 1", 0 < self.damping <= 1),
            alpha=("from 0 to 1", 0 <= self.alpha <= 1),
            refinements=("at least 0", self.refinements >= 0),
            first_order=("from 0 to below 1", 0 <= self.first_order < 1),
        )

    @property
    def is_plain(self) -> bool:
        """Whether weights are rounded to nearest on the grid that their format chooses by itself."""
        return self.method == "nearest" and self.grid == "minmax"


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Args:
        codes: codes on the grid, uint8 [O, I].
        grid: grid, as the format stores it.
    """

    codes: Tensor
    grid: AnyGrid

    @property
    def values(self) -> Tensor:
        """The rounded weight; float32 [O, I]."""
        return self.grid.values(self.codes)


def round_weight(
    weight: Tensor,
    number_format: GridStore,
    precision: Precision,
    hessian: Tensor,
    config: RoundingConfig,
    *,
    name: str = "a linear",
) -> Rounded:
    """Rounds a weight, on its device; see the docstring of the module.

    Args:
        weight: weight, [O, I], of any float dtype.
        number_format: format that will store the rounded weight.
        precision: precision within the format.
        hessian: X^T X, [I, I], or one matrix for each row group, [g, I, I]; preferably in float64.
        config: options of the rounding; ``alpha`` has no effect here, see `corrected_weight`.
        name: name of the linear, for error messages.

    Raises:
        UserError: the weight or the Hessian is not finite, the Hessian is not positive definite even with damping, or
            the weight has no columns beside the leading ones.
    """
    weight = weight.detach().float()
    check_finite(name, weight, hessian)
    hessians = damped(hessian, config.damping).view(-1, *hessian.shape[-2:])
    segments = segments_of(number_format, precision, weight.shape[1])
    linear = _Linear(weight, hessians, number_format, precision, segments, config)
    if config.method == "nearest":
        grid = linear.grid_of_all()
        return Rounded(grid.round(weight), grid)
    rounded = linear.rounded_by_gptq([Factor.of(matrix, act_order=config.act_order, name=name) for matrix in hessians])
    return linear.refined(rounded)


def segments_of(number_format: GridStore, precision: Precision, columns: int) -> tuple[Segment, ...]:
    """The segments of a linear with a number of input columns: one, or two if columns lead.

    Raises:
        UserError: the linear has no columns beside the leading ones.
    """
    if not isinstance(number_format, GridSegments):
        return (Segment(number_format, precision, 0, columns),)
    leading = leading_of(precision, columns)
    return (
        Segment(number_format.leading, leading.precision, 0, leading.columns),
        Segment(number_format.rest, precision.rest, leading.columns, columns),
    )


@dataclass(frozen=True)
class _Linear:
    """A weight to round, with everything needed to round it.

    Args:
        weight: weight, [O, I], in float32.
        hessians: damped Hessian of each row group, [g, I, I].
        store: format that will store the rounded weight.
        precision: precision within the format.
        segments: segments of the columns.
        config: options of the rounding.
    """

    weight: Tensor
    hessians: Tensor
    store: GridStore
    precision: Precision
    segments: tuple[Segment, ...]
    config: RoundingConfig

    @cached_property
    def spans(self) -> list[Span]:
        """The groups of all columns."""
        return [span for segment in self.segments for span in segment.spans]

    @property
    def importance(self) -> Tensor:
        """The weight of a squared error in each column, for each row group, [g, I]."""
        return self.hessians.diagonal(dim1=1, dim2=2).float()

    def cut(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows of each row group."""
        return tensor.tensor_split(len(self.hessians))

    def cut_grid(self, grid: AnyGrid) -> Sequence[AnyGrid]:
        return grid.cut(len(self.hessians))

    def grid_of_all(self) -> AnyGrid:
        """The grid for the original weight."""
        grouped = zip(self.cut(self.weight), self.importance, strict=True)
        return self.stored(search_segments(part, self.segments, self.config.grid, counts) for part, counts in grouped)

    def stored(self, grids: Iterable[tuple[Tensor, Tensor]]) -> AnyGrid:
        """The grid that the format stores for the scales and minima of each row group."""
        scales, minima = (torch.cat(parts) for parts in zip(*grids, strict=True))
        return self.store.storable(scales, minima, self.precision)

    def rounded_by_gptq(self, factors: Sequence[Factor]) -> Rounded:
        """The result of GPTQ for each row group, on one grid."""
        if self.config.act_order:
            grid = self.grid_of_all()
            return Rounded(self.codes_on(grid, factors), grid)
        fresh = [FreshGrid(self.segments, self.config.grid, counts) for counts in self.importance]
        codes = self._codes([grid.choose for grid in fresh], factors)
        chosen = [grid.chosen for grid in fresh]
        grid = self.stored(chosen)
        scales, minima = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        if not (torch.equal(grid.scales, scales) and torch.equal(grid.minima, minima)):
            # Stored scales depend on each other, and no group knew those of the later groups.
            codes = self.codes_on(grid, factors)
        return Rounded(codes, grid)

    def codes_on(self, grid: AnyGrid, factors: Sequence[Factor]) -> Tensor:
        """The codes of GPTQ on a given grid."""
        return self._codes([FixedGrid(part).choose for part in self.cut_grid(grid)], factors)

    def _codes(self, chosen: Sequence[Choose], factors: Sequence[Factor]) -> Tensor:
        grouped = zip(self.cut(self.weight), factors, chosen, strict=True)
        return torch.cat(
            [
                gptq(part, factor, self.spans, choose, first_order=self.config.first_order)
                for part, factor, choose in grouped
            ]
        )

    def refined(self, rounded: Rounded) -> Rounded:
        """The result after the last round of refinement that reduced the error."""
        least = self.loss(rounded)
        for _ in range(self.config.refinements):
            parts = list(zip(self.cut(self.weight), self.cut(rounded.codes), self.hessians, strict=True))
            grids = zip(parts, self.cut_grid(rounded.grid), strict=True)
            grid = self.stored(refitted(*part, grid, self.spans) for part, grid in grids)
            grids = zip(parts, self.cut_grid(grid), strict=True)
            better = Rounded(torch.cat([swept(*part, grid, self.spans) for part, grid in grids]), grid)
            loss = self.loss(better)
            if not loss < least:
                break
            rounded, least = better, loss
        return rounded

    def loss(self, rounded: Rounded) -> float:
        grouped = zip(self.cut(self.weight), self.cut(rounded.values), self.hessians, strict=True)
        return sum(float(losses(*group).sum()) for group in grouped)


def corrected_weight(weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float, damping: float) -> Tensor:
    """The weight that compensates, on inputs Xq of a quantized prefix, for their deviation from the dense inputs X.

        W' = W + alpha W (C - H) (H + damping mean(diag H) I)^-1,    H = Xq^T Xq,  C = X^T Xq.

    At alpha = 1 and without damping W' minimises |X W^T - Xq W'^T|^2; at alpha = 0 it is W.

    Args:
        weight: weight W, [O, I].
        hessian: H, [I, I], or one matrix for each row group, [g, I, I].
        cross: C, of the same shape; its rows belong to the dense inputs.
        alpha: strength of the correction, from 0 to 1.
        damping: amount added to the diagonal of H, in units of its mean; above 0.
    """  # [O, I], float32
    if alpha == 0:
        return weight.detach().float()
    hessians, crosses = (sums.double().view(-1, *sums.shape[-2:]) for sums in (hessian, cross))
    parts = []
    rows = weight.detach().double().tensor_split(len(hessians))
    for part, matrix, cross_matrix in zip(rows, hessians, crosses, strict=True):
        change = torch.linalg.solve(damped(matrix, damping), (part @ (cross_matrix - matrix)).T).T
        parts.append(part + alpha * change)
    return torch.cat(parts).float()


def error(
    weight: Tensor, values: Tensor, hessian: Tensor, cross: Tensor | None = None, dense_gram: Tensor | None = None
) -> float:
    """The squared error of a linear's outputs with other values on the calibration text, from sums alone.

    With ``cross`` and ``dense_gram``, the error is |X W^T - Xq Q^T|^2 = tr W G W^T - 2 tr W C Q^T + tr Q H Q^T, X being
    the dense inputs; without them it is |Xq (W - Q)^T|^2 = tr (W - Q) H (W - Q)^T.

    Args:
        weight: weight W of the dense linear, [O, I].
        values: values Q that replace it, [O, I].
        hessian: H = Xq^T Xq, [I, I], or one matrix for each row group, [g, I, I].
        cross: C = X^T Xq, of the same shape; None together with ``dense_gram``.
        dense_gram: G = X^T X, of the same shape; None together with ``cross``.
    """
    assert (cross is None) == (dense_gram is None)
    rows = 1 if hessian.dim() == 2 else len(hessian)
    dense, rounded = (tensor.detach().double().tensor_split(rows) for tensor in (weight, values))

    def products(left: tuple[Tensor, ...], sums: Tensor, right: tuple[Tensor, ...]) -> float:
        matrices = sums.double().view(-1, *sums.shape[-2:])
        return float(sum(((a @ matrix) * b).sum() for a, matrix, b in zip(left, matrices, right, strict=True)))

    if cross is None or dense_gram is None:
        change = tuple(a - b for a, b in zip(dense, rounded, strict=True))
        return products(change, hessian, change)
    return (
        products(dense, dense_gram, dense) - 2 * products(dense, cross, rounded) + products(rounded, hessian, rounded)
    )


def check_finite(name: str, weight: Tensor, *sums: Tensor) -> None:
    """Makes sure that a linear can be rounded by text.

    Args:
        name: name of the linear, for the message.
        weight: weight of the linear.
        sums: sums over the inputs of the linear.

    Raises:
        UserError: the weight, or what reaches the linear, is not finite.
    """
    if not weight.isfinite().all():
        raise UserError(f"The weight of {name} holds values that are not finite. Load an undamaged model.")
    if not all(bool(part.isfinite().all()) for part in sums):
        raise UserError(
            f"What reaches {name} from the calibration text is not finite. Use --model.dtype bfloat16 or float32, "
            f"another base model, or rounding.method nearest."
        )
