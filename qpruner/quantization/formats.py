"""The number formats of weights behind one interface; a new format is a new file and an entry in `FORMATS`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qpruner.errors import UserError, nearest
from qpruner.modeling_compressed import layout
from qpruner.plan import DENSE, ROW, Precision
from qpruner.quantization.blockwise4 import Blockwise4
from qpruner.quantization.grid import AnyGrid
from qpruner.quantization.int8 import Int8
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.segments import GridSegments, Segments, leading_of
from qpruner.quantization.uniform import Uniform


class Format(Protocol):
    """A number format: the widths that it offers, and how weights are encoded in it.

    An encoded weight is a state: tensors by name. `qpruner.modeling_compressed` defines their layout (``layout``) and
    meaning (``values``). Only ``encode`` rounds.
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> tuple[int, ...]:
        """Offered numbers of bits per weight."""

    @property
    def groups(self) -> Sequence[int | None]:
        """Offered numbers of weights that share a scale, the default first; ``(None,)`` if there is no choice."""

    def encode(self, weight: Tensor, precision: Precision) -> dict[str, Tensor]:
        """The state nearest to a weight [out, in] of any float dtype, on the weight's device."""

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> dict[str, Tensor] | None:
        """The state of some rows or columns with their values unchanged, or None if their scales cannot be separated.

        Args:
            state: state of the whole weight.
            axis: 0 for rows, 1 for columns.
            index: indices of the rows or columns, [n], in their new order.
            in_features: columns of the whole weight.
            precision: precision of the whole weight; of some columns, `Precision.of_columns` gives the new one.
        """


@runtime_checkable
class GridFormat(Format, Protocol):
    """A number format whose values lie on a `Grid`, so that calibration can choose grid and codes separately."""

    @property
    def symmetric(self) -> bool:
        """Whether minima follow from scales: each is the scale times -2^(b - 1)."""

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> AnyGrid:
        """The storable grid that is nearest to scales and minima [out, groups].

        A symmetric format computes its minima from the scales, and ignores the given ones.
        """

    def pack(self, codes: Tensor, grid: Any) -> dict[str, Tensor]:
        """The state of codes uint8 [out, in] on a grid from `storable`; its values are ``grid.values(codes)``."""

    def grid(self, state: Mapping[str, Tensor], precision: Precision) -> AnyGrid:
        """The grid of a state."""

    def codes(self, state: Mapping[str, Tensor], in_features: int, precision: Precision) -> Tensor:
        """The codes of a state, uint8 [out, in]; `pack` restores the state bit for bit."""

    def values(self, state: Mapping[str, Tensor], grid: Any, in_features: int, dtype: torch.dtype) -> Tensor:
        """The values of a state's codes on any grid, [out, in], rounded once from float32 to a dtype."""


FORMATS: tuple[Format, ...] = (
    Blockwise4("nf4"),
    Blockwise4("nf4", double=True),
    Blockwise4("fp4"),
    Blockwise4("fp4", double=True),
    Int8(),
    Uniform(),
    Uniform(double=True),
    Uniform(symmetric=True),
    Uniform(symmetric=True, double=True),
)
DEFAULTS: Mapping[int, str] = {
    1: "affine-double",
    2: "affine-double",
    3: "affine-double",
    4: "nf4",
    5: "affine-double",
    6: "affine-double",
    8: "int8",
}
"""The default number format for each number of bits."""


def format_for(precision: Precision) -> Format:
    """The format that offers a precision; `Segments` for one with leading columns.

    Raises:
        UserError: there is no format of that name, or it does not offer these bits or this group.
    """
    if precision.leading is not None:
        leading, rest = format_for(precision.leading.precision), format_for(precision.rest)
        if isinstance(leading, GridFormat) and isinstance(rest, GridFormat):
            return GridSegments(leading, rest)
        return Segments(leading, rest)
    formats = {number_format.name: number_format for number_format in FORMATS}
    if precision.format not in formats:
        raise UserError(
            f"There is no number format {precision.format!r} to quantize to.{nearest(precision.format, formats)} "
            f"Choose one of {', '.join(formats)}; {DENSE.format!r} leaves a weight alone."
        )
    number_format = formats[precision.format]
    if precision.bits not in number_format.bits:
        closest = min(number_format.bits, key=lambda bits: abs(bits - precision.bits))
        others = sorted({bits for number_format in FORMATS for bits in number_format.bits})
        raise UserError(
            f"{precision.format} has no {precision.bits} bits. Give {closest} bits, the nearest that it offers, or "
            f"another format; all of them together offer {', '.join(map(str, others))} bits."
        )
    if precision.group is not None and precision.group not in number_format.groups:
        allowed = sorted(group for group in number_format.groups if group not in (None, ROW))
        row = f", {ROW} for a whole row" if ROW in number_format.groups else ""
        remedy = f"Give one of {', '.join(map(str, allowed))}{row}, or none" if allowed else "Leave the group out"
        size = "a whole row" if precision.group == ROW else f"{precision.group} weights"
        raise UserError(f"{precision.format} has no groups of {size}. {remedy}.")
    return number_format


def precision_of(bits: int, group: int, formats: Mapping[int, str]) -> Precision:
    """The precision of a number of bits.

    Args:
        bits: bits of a weight, one of those in `DEFAULTS`.
        group: number of weights that share a scale; ignored if the format leaves no choice.
        formats: names of number formats by number of bits, which take precedence over `DEFAULTS`.

    Raises:
        UserError: there is no format of that name, or it does not offer these bits or this group.
    """
    precision = Precision(formats.get(bits, DEFAULTS[bits]), bits)
    if tuple(format_for(precision).groups) == (None,):
        return precision
    precision = replace(precision, group=group)
    format_for(precision)
    return precision


def quantize(linear: nn.Linear, precision: Precision) -> PackedLinear:
    """Quantizes a dense linear, on its device and with its training mode; the bias is copied and frozen.

    Raises:
        UserError: no format offers the precision.
    """
    out_features, in_features = linear.weight.shape
    state = format_for(precision).encode(linear.weight.detach(), precision)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    dtype = linear.weight.dtype
    return rebuild(state, out_features, in_features, precision=precision, bias=bias, dtype=dtype).train(linear.training)


def dequantize(module: PackedLinear) -> Tensor:
    """The weight that a packed linear multiplies with; float32 [out, in]."""
    return module.unpack(torch.float32)


def narrowed(module: PackedLinear, axis: int, index: Tensor) -> PackedLinear:
    """A packed linear with some rows or columns of another one, and the bias that belongs to them.

    Values stay exactly the same wherever the format allows it. Where scales are shared with rows or columns that are
    removed, or leading columns would come after others, what remains is quantized anew, and values change a little.

    Args:
        module: packed linear to narrow; it is left unchanged.
        axis: axis of the weight to narrow: 0 for rows, 1 for columns.
        index: indices of the rows or columns that stay, [n], in their new order.
    """
    before, precision = module.precision, module.precision
    if axis == 1:
        precision = precision.of_columns(index.tolist())
    state = format_for(before).take(module.packed(), axis, index, module.in_features, before)
    if state is None:
        state = format_for(precision).encode(dequantize(module).index_select(axis, index), precision)
    shape = [module.out_features, module.in_features]
    shape[axis] = len(index)
    bias = None if module.bias is None else module.bias.detach()
    if bias is not None:
        bias = bias[index] if axis == 0 else bias.clone()
    return rebuild(state, *shape, precision=precision, bias=bias, dtype=module.dtype).train(module.training)


def num_bytes(out_features: int, in_features: int, precision: Precision) -> int:
    """Bytes of the codes and scales of a weight, without the bias and the headers of files.

    Raises:
        UserError: as `layout_of`.
    """
    return sum(tensor.nbytes for tensor in layout_of(out_features, in_features, precision).values())


def layout_of(out_features: int, in_features: int, precision: Precision) -> dict[str, Tensor]:
    """The state of a weight of this shape as tensors without storage (on the meta device).

    Raises:
        UserError: no format offers the precision, or the weight has no columns beside the leading ones.
    """
    format_for(precision)
    if precision.leading is not None:
        leading_of(precision, in_features)
    return layout(out_features, in_features, precision.to_data())


def rebuild(
    state: Mapping[str, Tensor],
    out_features: int,
    in_features: int,
    *,
    precision: Precision,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> PackedLinear:
    """Builds the packed linear of a state, on the state's device; it uses the tensors without copying them.

    Args:
        state: tensors of ``PackedLinear.packed``; others are ignored.
        out_features: rows of the weight.
        in_features: columns of the weight.
        precision: precision that the state was made in.
        bias: bias [out], or None.
        dtype: dtype of the dense linear that the packed one replaces.

    Raises:
        UserError: no format offers the precision, or a tensor is missing or not of the shape and dtype of the layout.
    """
    expected_state = layout_of(out_features, in_features, precision)
    for name, expected in expected_state.items():
        given = state.get(name)
        if given is None or given.shape != expected.shape or given.dtype != expected.dtype:
            actual = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
            raise UserError(
                f"The tensor {name!r} of {out_features} x {in_features} weights in {precision} is {actual}, but must "
                f"be {expected.dtype} {list(expected.shape)}. The file was altered or belongs to another plan; give "
                "the plan that it was saved with, or quantize again."
            )
    frozen = None if bias is None else nn.Parameter(bias, requires_grad=False)
    packed = {name: state[name] for name in expected_state}
    return PackedLinear(packed, out_features, in_features, precision, frozen, dtype)
