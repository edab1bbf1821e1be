"""Packed linears and tables in ONNX: constants that hold their codes, and nodes that compute with them.

Shapes: O rows (outputs), I columns (inputs), M groups in a row; x [.., I] is the input of a linear.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import onnx_ir
import torch
from onnx_ir import DataType, Node, Value
from torch import Tensor
from torch.nn.functional import pad

from qpruner.export.groups import GroupedWeight, GroupLayout
from qpruner.modeling_compressed import code_book, parted
from qpruner.quantization.bit_packing import pack
from qpruner.quantization.blockwise4 import Blockwise4
from qpruner.quantization.formats import format_for, rebuild
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.segments import leading_of

WIDTHS = (2, 4, 8)
"""Code widths in bits that onnxruntime multiplies; codes that are gathered from a table have eight."""
DOMAIN = "com.microsoft"
"""Domain of onnxruntime's own operators."""
SIZES = (128, 64, 32, 16)
"""Columns of the groups into which a row is cut: the sizes that onnxruntime's kernels support."""


@dataclass
class Builder:
    """Adds constants and nodes to a graph.

    Args:
        graph: graph that is changed in place.
        place: node before which new nodes are inserted.
        constants: constants by name, each added only once.
    """

    graph: Any
    place: Node
    constants: dict[str, Value] = field(default_factory=dict)

    def node(self, kind: str, *inputs: Value, domain: str = "", **attributes: Any) -> Value:
        """The output of a new node."""
        node = onnx_ir.node(kind, inputs, attributes, domain=domain)
        self.graph.insert_before(self.place, node)
        return node.outputs[0]

    def constant(self, name: str, values: Tensor) -> Value:
        """A constant with unchanged values."""
        return self._constant(name, onnx_ir.tensor(values.contiguous(), name=name))

    def floats(self, name: str, values: Tensor) -> Value:
        """A constant of any float dtype, cast to float32 when it is read."""
        value = self.constant(name, values)
        return value if values.dtype == torch.float32 else self.node("Cast", value, to=DataType.FLOAT)

    def nibbles(self, name: str, codes: Tensor) -> Value:
        """A constant of uint8 codes below 16, of any shape, stored as 4-bit integers."""
        stream = pack(codes.reshape(1, -1), 4).flatten().numpy()
        return self._constant(name, onnx_ir.PackedTensor(stream, DataType.UINT4, shape=codes.shape, name=name))

    def _constant(self, name: str, tensor: Any) -> Value:
        if name not in self.constants:
            value = Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
            self.constants[name] = value
        return self.constants[name]


def product(builder: Builder, name: str, packed: PackedLinear, x: Value, *, chosen: bool = False) -> Value:
    """The product x W^T, [.., O], of a packed linear without its bias.

    Args:
        builder: builder of the graph.
        name: name of the weight, used as a prefix of its constants' names.
        packed: the linear.
        x: input of the linear, [B, T, I].
        chosen: whether rows of the weight are gathered, too.
    """
    if packed.precision.leading is not None:
        products, first = [], 0
        for number, part in enumerate(segments(packed)):
            bounds = [builder.constant(f"at_{at}", torch.tensor([at])) for at in (first, first + part.in_features, -1)]
            products.append(product(builder, f"{name}.{number}", part, builder.node("Slice", x, *bounds)))
            first += part.in_features
        return builder.node("Add", *products)
    blocks = _Blocks.of(packed, chosen=chosen)
    if blocks is None:
        return builder.node("MatMul", x, builder.node("Transpose", looked_up(builder, name, packed), perm=[1, 0]))
    if chosen:
        codes, scales, minima = _table(builder, name, packed, blocks)
        values = builder.node("DequantizeLinear", codes, scales, axis=0, block_size=blocks.size)
        out = builder.node("MatMul", x, values)
    else:
        out, minima = _product_with_codes(builder, name, packed, blocks, x)
    if minima is None:
        return out
    sums = _sums(builder, x, packed.in_features, blocks.size)
    return builder.node("Add", out, builder.node("MatMul", sums, minima))


def rows(builder: Builder, name: str, packed: PackedLinear, ids: Value) -> Value:
    """The rows [B, T, I] of a packed table of one segment.

    Args:
        builder: builder of the graph.
        name: name of the weight.
        packed: linear whose weight is the table.
        ids: indices of the rows, int64 [B, T].
    """
    blocks = _Blocks.of(packed, chosen=True)
    if blocks is None:
        return builder.node("Gather", looked_up(builder, name, packed), ids, axis=0)
    codes, scales, minima = _table(builder, name, packed, blocks)
    groups = builder.constant(f"{name}.groups", torch.arange(packed.in_features) // blocks.size)

    def chosen(values: Value) -> Value:  # [I or M, O] -> [B, T, I or M]
        return builder.node("Transpose", builder.node("Gather", values, ids, axis=1), perm=[1, 2, 0])

    def spread(values: Value) -> Value:  # [M, O] -> [B, T, I]
        return builder.node("Gather", chosen(values), groups, axis=2)

    values = builder.node("Mul", builder.node("Cast", chosen(codes), to=DataType.FLOAT), spread(scales))
    return values if minima is None else builder.node("Add", values, spread(minima))


def looked_up(builder: Builder, name: str, packed: PackedLinear) -> Value:
    """The weight [O, I] of a format with a code book, which onnxruntime computes when it loads the file."""
    number_format, state = format_for(packed.precision), packed.packed()
    assert isinstance(number_format, Blockwise4)
    group, scales = number_format.group(packed.precision), number_format.scales(state)
    codes = torch.stack([state["codes"] >> 4, state["codes"] & 15], 1).flatten()
    codes = pad(codes, (0, len(scales) * group - len(codes))).view(-1, group)
    index = builder.node("Cast", builder.nibbles(f"{name}.codes", codes), to=DataType.INT32)
    book = builder.constant(f"{packed.precision.format}.book", code_book(number_format.code_book, torch.device("cpu")))
    values = builder.node("Gather", book, index)
    values = builder.node("Mul", values, builder.constant(f"{name}.scales", scales.unsqueeze(1)))
    number = packed.out_features * packed.in_features
    if codes.numel() > number:
        values = builder.node("Reshape", values, builder.constant("at_-1", torch.tensor([-1])))
        bounds = [builder.constant(f"at_{bound}", torch.tensor([bound])) for bound in (0, number)]
        values = builder.node("Slice", values, *bounds)
    shape = packed.out_features, packed.in_features
    return builder.node("Reshape", values, builder.constant(f"shape_{shape[0]}_{shape[1]}", torch.tensor(shape)))


def segments(packed: PackedLinear) -> tuple[PackedLinear, PackedLinear]:
    """The leading columns of a linear of two segments, and the remaining ones, each as a linear."""
    leading, states = leading_of(packed.precision, packed.in_features), parted(packed.packed())
    rows, dtype, behind = packed.out_features, packed.dtype, packed.in_features - leading.columns
    first = rebuild(states[0], rows, leading.columns, precision=leading.precision, bias=None, dtype=dtype)
    return first, rebuild(states[1], rows, behind, precision=packed.precision.rest, bias=None, dtype=dtype)


@dataclass(frozen=True)
class _Blocks:
    """The groups of a linear as stored in ONNX.

    Args:
        size: columns of a group; a group of a whole row is cut.
        symmetric: whether codes are signed and there are no minima.
        bits: bits of a code in the file.
        scales: dtype of scales and minima, which represents them exactly.
    """

    size: int
    symmetric: bool
    bits: int
    scales: torch.dtype

    @classmethod
    def of(cls, packed: PackedLinear, *, chosen: bool) -> Self | None:
        layout = GroupLayout.of(packed)
        if layout is None:
            return None
        rows = layout.size == packed.in_features
        size = next((size for size in SIZES if size < packed.in_features), SIZES[-1]) if rows else layout.size
        bits = 8 if chosen else min(bits for bits in WIDTHS if bits >= layout.bits)
        return cls(size, layout.symmetric, bits, torch.float32 if packed.precision.format == "int8" else torch.float16)


def num_bytes(packed: PackedLinear, *, chosen: bool) -> int:
    """Bytes that the constants of a linear take; see `product`."""
    if packed.precision.leading is not None:
        return sum(num_bytes(part, chosen=chosen) for part in segments(packed))
    blocks, out_features, columns = _Blocks.of(packed, chosen=chosen), packed.out_features, packed.in_features
    if blocks is not None:
        groups = -(-columns // blocks.size)
        codes = columns if chosen else groups * blocks.size * blocks.bits // 8
        zeros = 0 if chosen or blocks.symmetric else -(-groups * blocks.bits // 8)
        return out_features * (codes + zeros + (1 if blocks.symmetric else 2) * groups * blocks.scales.itemsize)
    number_format = format_for(packed.precision)
    assert isinstance(number_format, Blockwise4)
    group = number_format.group(packed.precision)
    return -(-out_features * columns // group) * (group // 2 + 4)


def held_bits(packed: PackedLinear, *, chosen: bool) -> int:
    """Bits that a code of a linear of one segment takes in the file."""
    blocks = _Blocks.of(packed, chosen=chosen)
    return packed.precision.bits if blocks is None else blocks.bits


def _table(builder: Builder, name: str, packed: PackedLinear, blocks: _Blocks) -> tuple[Value, Value, Value | None]:
    """Codes of eight bits [I, O], scales [M, O] and, where there are any, minima [M, O]."""
    weight = GroupedWeight.of(packed, blocks.size)
    codes = weight.codes
    if blocks.symmetric:
        codes = (codes - (1 << (weight.bits - 1))).view(torch.int8)  # modulo 256
    return (
        builder.constant(f"{name}.codes", codes.T),
        builder.floats(f"{name}.scales", weight.scales.T.to(blocks.scales)),
        None if blocks.symmetric else builder.floats(f"{name}.minima", weight.minima.T.to(blocks.scales)),
    )


def _product_with_codes(
    builder: Builder, name: str, packed: PackedLinear, blocks: _Blocks, x: Value
) -> tuple[Value, Value | None]:
    """The product without the contribution of the minima, and the minima [M, O] where there are any."""
    weight, bits = GroupedWeight.of(packed, blocks.size), blocks.bits
    weight = weight.widened(bits) if blocks.symmetric else weight
    groups = weight.scales.shape[1]
    codes = pad(weight.codes, (0, groups * blocks.size - packed.in_features))
    constants = [
        builder.constant(f"{name}.codes", pack(codes, bits).view(packed.out_features, groups, -1)),
        builder.floats(f"{name}.scales", weight.scales.to(blocks.scales)),
    ]
    minima = None
    if not blocks.symmetric:  # without a zero point the operator uses the middle code
        zeros = torch.zeros(packed.out_features, -(-groups * bits // 8), dtype=torch.uint8)
        constants.append(builder.constant(f"{name}.zeros", zeros))
        minima = builder.floats(f"{name}.minima", weight.minima.T.to(blocks.scales))
    sizes = {"K": packed.in_features, "N": packed.out_features, "bits": bits, "block_size": blocks.size}
    # At the default level onnxruntime rounds inputs to eight bits, which half loses outliers among them.
    return builder.node("MatMulNBits", x, *constants, domain=DOMAIN, accuracy_level=1, **sizes), minima


def _sums(builder: Builder, x: Value, columns: int, size: int) -> Value:
    """The sums [B, T, M] of the inputs [B, T, I] of each group."""
    groups = -(-columns // size)
    if columns % size:
        ends = torch.tensor([0, 0, 0, 0, 0, groups * size - columns])
        x = builder.node("Pad", x, builder.constant(f"ends_{columns}_{size}", ends))
    shape = builder.constant(f"groups_{groups}_{size}", torch.tensor([0, 0, groups, size]))
    last = builder.constant("at_-1", torch.tensor([-1]))
    return builder.node("ReduceSum", builder.node("Reshape", x, shape), last, keepdims=0)
