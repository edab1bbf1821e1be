"""Polishing: the grids of packed linears are trained by gradient descent while their codes stay fixed.

A weight is ``scale * code + minimum``, so the gradients of a loss E for the scale and the minimum of a group are

    dE/dscale = sum over the group of dE/dweight * code,    dE/dminimum = sum over the group of dE/dweight.

The trained parameters measure how far a grid has moved from its start, in units that are comparable between groups, so
that one learning rate suits all: the logarithm a of the factor by which the spacing of the values has grown, and the
shift b of the middle of the values, in units of the distance between the outermost values. With L = 2^bits values,

    scale = scale_0 exp(a),    minimum = minimum_0 + (L - 1) (|scale_0| b + (scale_0 - scale) / 2).

A symmetric format has only a, and its minimum is scaled like its scale. A group whose scale is 0 does not change.

Source: EfficientQAT, Chen et al., 2024 (arXiv:2407.11062), section 3.3, trains scales alone, end to end; adding the
error of the last hidden state to the cross entropy is the loss of RILQ (arXiv:2412.01129). Training minima, and the
parameters a and b, are our own.

Shapes: O rows (outputs), I columns (inputs), M groups in a row, N positions of a batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qpruner.modeling_compressed import CHUNK
from qpruner.quantization.formats import GridFormat, format_for, rebuild
from qpruner.quantization.grid import AnyGrid
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.segments import GridSegments


def moved(grid: AnyGrid, growths: Tensor, ways: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales and minima [O, M] of a grid that has moved; exactly the original ones where all parameters are 0.

    Args:
        grid: original grid.
        growths: logarithms a of the factors by which the scales have grown, [O, M].
        ways: shifts b of the middles, [O, M]; None for a symmetric format.
    """
    factors = growths.float().exp()
    scales = grid.scales * factors
    if ways is None:
        return scales, grid.minima * factors
    return scales, grid.minima + (grid.levels - 1) * (grid.scales.abs() * ways.float() + (grid.scales - scales) / 2)


def gradients_of_grid(gradient: Tensor, inputs: Tensor, codes: Tensor, grid: AnyGrid) -> tuple[Tensor, Tensor]:
    """The gradients of a loss for the scales and for the minima of a linear, float32 [O, M] each.

    Args:
        gradient: gradient of the loss at the outputs of the linear, [N, O].
        inputs: inputs of the linear, [N, I], in the dtype of ``gradient``.
        codes: codes of the weight, [O, I].
        grid: grid of the codes, which defines the groups.
    """
    of_scales, of_minima = [], []
    size = max(1, CHUNK // codes.shape[1])  # bounds the memory for gradients of weights
    for rows in (slice(first, first + size) for first in range(0, len(codes), size)):
        of_weight = (gradient[:, rows].T @ inputs).float()
        of_minima.append(grid.sums(of_weight))
        of_scales.append(grid.sums(of_weight.mul_(codes[rows])))
    return torch.cat(of_scales), torch.cat(of_minima)


class PolishedLinear(PackedLinear):
    """A packed linear whose grid is trained while its codes stay fixed.

    It shares the tensors of the packed linear, which do not change, and has additional parameters, float32 [O, M]:
    ``growths`` and, unless the format is symmetric, ``ways``. These start at 0, where both linears compute the same. No
    dense weight is kept between the forward and the backward pass.

    Args:
        packed: packed linear.
        number_format: format of the packed linear.
    """

    ways: nn.Parameter | None

    def __init__(self, packed: PackedLinear, number_format: GridFormat) -> None:
        shape = packed.out_features, packed.in_features
        super().__init__(packed.packed(), *shape, packed.precision, packed.bias, packed.dtype)
        self.number_format = number_format
        zeros = torch.zeros_like(self.start.scales)
        self.growths = nn.Parameter(zeros)
        self.register_parameter("ways", None if number_format.symmetric else nn.Parameter(zeros.clone()))
        self.train(packed.training)

    @property
    def start(self) -> AnyGrid:
        """The original grid."""
        return self.number_format.grid(self.packed(), self.precision)

    def on(self, scales: Tensor, minima: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the codes encode with given scales and minima [O, M]."""
        return self.number_format.values(self.packed(), self.start.on(scales, minima), self.in_features, dtype)

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> Tensor:
        return self.on(*moved(self.start, self.growths, self.ways), dtype)

    def forward(self, x: Tensor) -> Tensor:  # [.., I] -> [.., O]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        scales, minima = moved(self.start, self.growths, self.ways)
        product: Tensor = _MovedProduct.apply(x, bias, scales, minima, self)  # type: ignore[no-untyped-call]
        return product

    def as_packed(self) -> PackedLinear:
        """The packed linear with its original grid."""
        return self._rebuilt(self.packed())

    @torch.no_grad()
    def as_polished(self) -> PackedLinear:
        """A packed linear with the same codes and the trained grid, rounded to what the format can store."""
        codes = self.number_format.codes(self.packed(), self.in_features, self.precision)
        grid = self.number_format.storable(*moved(self.start, self.growths, self.ways), self.precision)
        return self._rebuilt(self.number_format.pack(codes, grid))

    def _rebuilt(self, state: dict[str, Tensor]) -> PackedLinear:
        shape = self.out_features, self.in_features
        linear = rebuild(state, *shape, precision=self.precision, bias=self.bias, dtype=self.dtype)
        return linear.train(self.training)

    def _stored(self) -> dict[str, Tensor]:
        trained = {"growths": self.growths} if self.ways is None else {"growths": self.growths, "ways": self.ways}
        return {**super()._stored(), **trained}


class _MovedProduct(torch.autograd.Function):
    """A product with a weight that is unpacked again in the backward pass, with gradients for its scales and minima."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, scales: Tensor, minima: Tensor, linear: PolishedLinear
    ) -> Tensor:
        ctx.save_for_backward(x, scales, minima)
        ctx.linear = linear
        return functional.linear(x, linear.on(scales, minima, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, None]:
        x, scales, minima = ctx.saved_tensors
        linear = ctx.linear
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        of_x = gradient @ linear.on(scales, minima, gradient.dtype) if ctx.needs_input_grad[0] else None
        codes = linear.number_format.codes(linear.packed(), linear.in_features, linear.precision)
        inputs = x.flatten(0, -2).to(gradient.dtype)
        return of_x, of_bias, *gradients_of_grid(gradient.flatten(0, -2), inputs, codes, linear.start), None


def linears_with_grids(model: Any) -> dict[str, tuple[PackedLinear, GridFormat]]:
    """The packed linears of a model whose formats have grids, by name, with their formats; without embedding and head.

    Linears of two segments are included if the minima are free in both segments or in neither.

    Args:
        model: causal language model, perhaps with adapters.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    apart = {id(module) for table in tables if table is not None for module in table.modules()}
    linears: dict[str, tuple[PackedLinear, GridFormat]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and id(module) not in apart:
            number_format = format_for(module.precision)
            if isinstance(number_format, GridFormat) and not _is_mixed(number_format):
                linears[name] = module, number_format
    return linears


def _is_mixed(number_format: GridFormat) -> bool:
    """Whether minima are free in only one of two segments, so that one parameter cannot describe both."""
    if not isinstance(number_format, GridSegments):
        return False
    return number_format.leading.symmetric != number_format.rest.symmetric


def loosen_(model: Any) -> None:
    """Replaces the packed linears of `linears_with_grids` by linears whose grids can be trained."""
    for name, (linear, number_format) in linears_with_grids(model).items():
        model.set_submodule(name, PolishedLinear(linear, number_format))


def settle_(model: Any, *, polished: bool) -> None:
    """Replaces linears whose grids were trained by packed ones.

    Args:
        model: causal language model, perhaps with adapters, changed in place.
        polished: whether the packed linears get the trained grids; otherwise they get the original ones.
    """
    trained = {name: module for name, module in model.named_modules() if isinstance(module, PolishedLinear)}
    for name, linear in trained.items():
        model.set_submodule(name, linear.as_polished() if polished else linear.as_packed())
