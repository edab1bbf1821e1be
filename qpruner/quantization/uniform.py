"""Integers of one to eight bits with a scale for every group of weights in a row, by torch alone."""

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
"""The last code of eight bits."""


@dataclass(frozen=True)
class Uniform:
    """Values at equal distances: weight = scale * code + minimum, with scale and minimum for each group.

    Groups run within rows, over 64, 32 or 128 weights or, with -1, over a whole row; the last of a row may be short.
    Scales and minima are numbers of float16, so that scale * code is exact in float32.

    ``affine`` stores both, in float16, and spans each group from its lowest to its highest weight. In groups of 32 with
    4 bits it is Q4_1 of GGUF, number for number. With 1 bit the two values are the means of the weights below the mean
    of the group and of the others: of weights drawn from a normal distribution 0.6 of the norm is lost, between lowest
    and highest weight 1.6 of it would be.

    ``symmetric`` stores scales alone: weight = scale * (code - 2^(b - 1)). The weight of largest magnitude becomes
    -2^(b - 1) times the scale, which therefore has either sign; with 8 bits +-127 times a scale of at least 0. In
    groups of 32 with 4 and 8 bits it is Q4_0 and Q8_0 of GGUF. It starts at 2 bits: with one, a group would have zero
    and one other value; ``affine`` has two free ones.

    ``-double`` stores scales and minima in 8 bits each: 2 bits in groups of 64 cost 2.25 bits per weight, 1 bit 1.25.
    Codes are chosen after scales and minima were, so that what these lose costs nearly nothing.

    Layout, for m groups in a row:

    - ``codes``: uint8 [out, bytes of a row], as `qpruner.modeling_compressed.unpack_codes` says;
    - ``scales``: float16 [out, m];
    - ``minima``: float16 [out, m], of ``affine`` alone.

    With ``-double``, instead of ``scales`` and ``minima``:

    - ``largest_scale``: float32 [], above all magnitudes of scales or among them;
    - ``scale_codes``: uint8 [out, m]; scale = largest scale * 2^(-scale code / 24) of ``affine``. Of ``symmetric`` the
      upper bit is the sign, 1 for minus, and the lower seven bits c mean 2^(-c / 12). Rounded to float16;
    - ``zero_points``: uint8 [out, m], of ``affine`` alone; minimum = -scale * (2^b - 1) * zero point / 255, rounded to
      float16. A group always spans zero.

    Source: Q4_0, Q4_1 and Q8_0 as the package gguf 0.19 quantizes to them.

    Args:
        symmetric: whether minima follow from scales.
        double: whether scales and minima are stored in 8 bits.
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
        # Codes by the scales before they are rounded to float16, as GGUF has it.
        if not self.symmetric:
            return self.pack(Grid(scales, minima, grid.bits, grid.group).round(weight), grid)
        groups = groups_of_columns(0, weight.shape[1], grid.group, weight.device)
        places, middle = weight * inverse(scales).index_select(1, groups), grid.levels // 2
        if grid.bits == 8:  # halves away from zero
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
        groups = torch.zeros_like(index) if group == ROW else index // group  # that the columns come from
        size = len(index) if group == ROW else group
        taken = groups[::size]  # one for each group that is left, if all its columns come from it
        if not torch.equal(taken.repeat_interleave(size)[: len(index)], groups):
            return None
        codes = unpack_codes(state["codes"], in_features, precision.bits).index_select(1, index)
        scales = {name: tensor[:, taken] if tensor.dim() else tensor.clone() for name, tensor in state.items()}
        return {**scales, "codes": pack(codes, precision.bits)}

    def group(self, precision: Precision) -> int:
        return precision.group or self.groups[0]

    def _spans(self, weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
        """The scales and minima [out, m] that weights are rounded to, before they are stored."""
        group = self.group(precision)
        size = weight.shape[1] if group == ROW else group
        missing = -weight.shape[1] % size
        # The last weight once more, for as many as a short group lacks, changes nothing.
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
        """What is stored of scales and minima; the same again for those that `uniform_scales_and_minima` gives."""
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
    """The means [out, m] of the weights below the mean of their group, and of the others."""
    nothing = torch.tensor(torch.nan, device=weight.device)
    groups = functional.pad(weight, (0, -weight.shape[1] % size), value=torch.nan)
    groups = groups.view(len(weight), -1, size)
    means = groups.nanmean(dim=2, keepdim=True)
    upper = torch.where(groups >= means, groups, nothing).nanmean(dim=2)
    lower = torch.where(groups < means, groups, nothing).nanmean(dim=2)
    return torch.where(lower.isnan(), upper, lower), upper  # where all weights are one none is below
