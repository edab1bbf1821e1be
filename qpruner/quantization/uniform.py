"""Integers of one to eight bits with a scale for every group of weights in a row, in plain torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qpruner.modeling_compressed import (
    uniform_scales,
    uniform_scales_and_minima,
    uniform_values,
    unpack_codes,
)
from qpruner.plan import ROW, Precision
from qpruner.quantization.bit_packing import pack
from qpruner.quantization.grid import Grid, groups_of_columns, inverse

LARGEST = torch.finfo(torch.float16).max
LAST = 255
"""The largest code of eight bits."""


@dataclass(frozen=True)
class Uniform:
    """Equally spaced values: weight = scale * code + minimum, with a scale and a minimum for each group.

    Groups lie within rows and hold 64, 32 or 128 weights or, with -1, a whole row; the last group of a row may be
    short. Scales and minima are float16 numbers, so that scale * code is exact in float32.

    ``affine`` stores both, in float16, and its values range from the lowest to the highest weight of a group. In groups
    of 32 with 4 bits, it is exactly Q4_1 of GGUF. With 1 bit, the two values are the mean of the weights below the
    group's mean and the mean of the others: for normally distributed weights, the norm of the error is 0.6 of that of
    the weights; with the lowest and highest weight as values, it would be 1.6.

    ``symmetric`` stores only scales: weight = scale * (code - 2^(b - 1)). The weight of largest magnitude becomes
    -2^(b - 1) times the scale, which can therefore have either sign; with 8 bits, it becomes 127 or -127 times a scale
    that is at least 0. In groups of 32 with 4 and 8 bits, it is Q4_0 and Q8_0 of GGUF. The fewest bits are 2: with one,
    a group would have zero and one other value, whereas the two values of ``affine`` are free.

    ``-double`` stores scales and minima in 8 bits each, so that in groups of 64, 2 bits cost 2.25 bits per weight, and
    1 bit costs 1.25. Codes are chosen for the stored scales and minima, so rounding these costs next to nothing.

    Layout, for m groups in a row:

    - ``codes``: uint8 [out, bytes of a row]; see `qpruner.modeling_compressed.unpack_codes`;
    - ``scales``: float16 [out, m];
    - ``minima``: float16 [out, m], only for ``affine``.

    With ``-double``, instead of ``scales`` and ``minima``:

    - ``largest_scale``: float32 [], at least as large as the magnitude of every scale;
    - ``scale_codes``: uint8 [out, m]; for ``affine``, scale = largest scale * 2^(-scale code / 24). For ``symmetric``,
      the highest bit is the sign, 1 for minus, and the lower seven bits c stand for largest scale * 2^(-c / 12). The
      result is rounded to float16;
    - ``zero_points``: uint8 [out, m], only for ``affine``; minimum = -scale * (2^b - 1) * zero point / 255, rounded to
      float16. The values of a group thus always span zero.

    Source: the quantization to Q4_0, Q4_1 and Q8_0 in the package gguf 0.19.

    Args:
        symmetric: whether minima follow from scales, rather than being stored.
        double: whether scales and minima are stored in 8 bits each.
    """

    symmetric: bool = False
    double: bool = False

    @property
    def name(self) -> str:
        return ("symmetric" if self.symmetric else "affine") + ("-double" if self.double else "")

    @property
    def bits(self) -> tuple[int, ...]:
        return (2, 3, 4, 5, 6, 8) if self.symmetric else (1, 2, 3, 4, 5, 6, 8)

    @property
    def groups(self) -> tuple[int, ...]:
        return (64, 32, 128, ROW)

    def encode(self, weight: Tensor, precision: Precision) -> dict[str, Tensor]:
        weight = weight.float()
        scales, minima = self._spans(weight, precision)
        grid = self.storable(scales, minima, precision)
        if self.double:
            return self.pack(grid.round(weight), grid)
        # As in GGUF, codes are computed with the scales before these are rounded to float16.
        if not self.symmetric:
            return self.pack(Grid(scales, minima, grid.bits, grid.group).round(weight), grid)
        groups = groups_of_columns(0, weight.shape[1], grid.group, weight.device)
        places, middle = weight * inverse(scales).index_select(1, groups), grid.levels // 2
        if grid.bits == 8:  # rounds halves away from zero
            codes = places.abs().add_(0.5).floor_().copysign_(places).add_(middle)
        else:
            codes = places.add_(middle + 0.5).floor_()
        return self.pack(codes.clamp_(0, grid.levels - 1).to(torch.uint8), grid)

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> Grid:
        return self.grid(self._stored(scales.float(), minima.float(), precision.bits), precision)

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"codes": pack(codes, grid.bits), **self._stored(grid.scales, grid.minima, grid.bits)}

    def grid(self, state: Mapping[str, Tensor], precision: Precision) -> Grid:
        return Grid(
            *uniform_scales_and_minima(state, precision.bits, self.symmetric), precision.bits, self.group(precision)
        )

    def codes(self, state: Mapping[str, Tensor], in_features: int, precision: Precision) -> Tensor:
        return unpack_codes(state["codes"], in_features, precision.bits)

    def values(self, state: Mapping[str, Tensor], grid: Grid, in_features: int, dtype: torch.dtype) -> Tensor:
        return uniform_values(state["codes"], grid.scales, grid.minima, in_features, grid.bits, grid.group, dtype)

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> dict[str, Tensor] | None:
        if axis == 0:
            return {name: tensor[index] if tensor.dim() else tensor.clone() for name, tensor in state.items()}
        group = self.group(precision)
        groups = torch.zeros_like(index) if group == ROW else index // group  # group that each column comes from
        size = len(index) if group == ROW else group
        taken = groups[::size]  # the old group of each new one, if all its columns share one
        if not torch.equal(taken.repeat_interleave(size)[: len(index)], groups):
            return None
        codes = unpack_codes(state["codes"], in_features, precision.bits).index_select(1, index)
        scales = {name: tensor[:, taken] if tensor.dim() else tensor.clone() for name, tensor in state.items()}
        return {**scales, "codes": pack(codes, precision.bits)}

    def group(self, precision: Precision) -> int:
        return precision.group or self.groups[0]

    def _spans(self, weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
        """The scales and minima [out, m] that fit a weight, before they are stored."""
        group = self.group(precision)
        size = weight.shape[1] if group == ROW else group
        missing = -weight.shape[1] % size
        # Filling a short group up with copies of its last weight changes nothing.
        groups = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1).view(len(weight), -1, size)
        if not self.symmetric:
            minima, maxima = groups.aminmax(dim=2) if precision.bits > 1 else _means_of_halves(weight, size)
            if self.double:
                minima, maxima = minima.clamp(max=0), maxima.clamp(min=0)
            return (maxima - minima) / ((1 << precision.bits) - 1), minima
        if precision.bits == 8:
            scales = groups.abs().amax(dim=2) / 127
        else:
            largest = groups.abs().argmax(dim=2, keepdim=True)
            scales = groups.gather(2, largest).squeeze(2) / -(1 << (precision.bits - 1))
        return scales, self._minima_of(scales, precision.bits)

    def _minima_of(self, scales: Tensor, bits: int) -> Tensor:
        """The minima of a symmetric format."""
        return scales * -float(1 << (bits - 1))

    def _stored(self, scales: Tensor, minima: Tensor, bits: int) -> dict[str, Tensor]:
        """The tensors that store scales and minima; exact for those that `uniform_scales_and_minima` returns."""
        if not self.double:
            stored = {"scales": scales, "minima": minima}
            if self.symmetric:
                stored.pop("minima")
            return {name: tensor.clamp(-LARGEST, LARGEST).half() for name, tensor in stored.items()}
        steps = (1 << bits) - 1
        if not self.symmetric:
            scales = ((minima + steps * scales).clamp(min=0) - minima.clamp(max=0)) / steps  # spans zero
        magnitudes = scales.abs()
        largest = magnitudes.max().clamp(max=LARGEST).half().float()
        small = LAST if not self.symmetric else LAST // 2
        ratios = largest * inverse(magnitudes)
        codes = torch.where(ratios > 0, ratios.log2() * self._codes_per_octave, small).round_().clamp_(0, small)
        state = {"largest_scale": largest}
        if self.symmetric:
            return {**state, "scale_codes": codes.add_(torch.where(scales < 0, small + 1, 0)).to(torch.uint8)}
        state["scale_codes"] = codes.to(torch.uint8)
        zeros = minima * inverse(uniform_scales(state, self.symmetric)) * (-LAST / steps)
        return {**state, "zero_points": zeros.round_().clamp_(0, LAST).to(torch.uint8)}

    @property
    def _codes_per_octave(self) -> int:
        return 12 if self.symmetric else 24


def _means_of_halves(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The mean of the weights below the mean of their group, and the mean of the others, [out, m] each."""
    nothing = torch.tensor(torch.nan, device=weight.device)
    groups = functional.pad(weight, (0, -weight.shape[1] % size), value=torch.nan)
    groups = groups.view(len(weight), -1, size)
    means = groups.nanmean(dim=2, keepdim=True)
    upper = torch.where(groups >= means, groups, nothing).nanmean(dim=2)
    lower = torch.where(groups < means, groups, nothing).nanmean(dim=2)
    return torch.where(lower.isnan(), upper, lower), upper  # if all weights are equal, none is below
