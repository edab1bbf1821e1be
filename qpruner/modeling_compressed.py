"""A compressed language model for transformers: layers with individual widths, weights packed in one to eight bits.

This file needs only torch, transformers and huggingface_hub. It is stored beside the weights of every model that
transformers cannot build by itself, so that

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

works wherever these packages are installed. It reads the structure of the model from ``config.json``: the widths of the
layers from ``per_layer_config``, an entry that transformers defines, and the rest from ``compression``:

- ``modules``: each linear, embedding or norm that differs from what the family's class builds, by its path: its
  ``shape`` ([out, in] of a linear, [n] of a norm) and, if it is packed, ``format``, ``bits``, ``group`` and ``leading``
  (the number of leading ``columns``, and their ``precision``); for an embedding also the ``scale`` of its rows;
  ``linear`` for a packed linear that has become dense, and is a linear even where GPT-2 has a ``Conv1D``;
- ``attributes``: attributes in which modules store their widths, by path;
- ``layer_configs``: modules that read widths from their configuration during computation, by path, with the index of
  their layer;
- ``experts``: each mixture of experts, by its path, which becomes a list of gated networks: their ``number``, and the
  names of their linears (``projections``);
- ``parameters``: shapes of other narrowed parameters, such as a router's weight, by path;
- ``skeleton``: values of configuration fields with which the family's class can build the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

# The meaning of codes. Layouts (tensors by name) are documented where the number formats are defined.

ROW = -1
"""The value of ``group`` that stands for a whole row."""
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Widths in bits of the planes that a code is split into, lowest bits first, by the width of the code."""
SPREADING: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
"""How `_spread` unpacks a byte, by the width of a plane: dtype of the word, and the distance and mask of each step."""
CHUNK = 2**20
"""Weights that are unpacked at a time: few enough that the results of each step are still in the cache for the next."""
SCALE_GROUP = 256
"""Number of scales that share a second-level scale in double quantization of NF4 and FP4."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution scaled to [-1, 1], with an exact zero."""
CODE_BOOKS: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    # One sign bit, two exponent bits and one mantissa bit; the values are divided by 12.
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
LEADING = "leading_"
"""Prefix of the names of the leading segment's tensors."""

State = Mapping[str, Tensor]


def parted(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the leading columns of a weight, without their prefix, and those of the columns after them."""
    leading = {name.removeprefix(LEADING): tensor for name, tensor in state.items() if name.startswith(LEADING)}
    return leading, {name: tensor for name, tensor in state.items() if not name.startswith(LEADING)}


def bytes_of_row(columns: int, bits: int) -> int:
    """Number of bytes in a row of packed codes."""
    return sum(-(-columns * width // 8) for width in PLANES[bits])


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Unpacks codes, uint8 [rows, columns], from bytes, uint8 [rows, bytes of a row].

    The bits of a code are split into planes whose widths divide eight, so that no entry of a plane crosses the end of a
    byte: codes of three bits have a plane of two bits and one of one bit. Within a byte, earlier codes have lower bits.
    A row consists of the bytes of its planes, the plane of the lowest bits first; each plane starts with a new byte.
    """
    codes, first, shift = packed, 0, 0
    for width in PLANES[bits]:
        end = first + -(-columns * width // 8)
        plane = _spread(packed[:, first:end], width, shift)[:, :columns]
        codes = plane if shift == 0 else codes | plane
        first, shift = end, shift + width
    return codes


def _spread(plane: Tensor, width: int, shift: int) -> Tensor:
    """The codes in the bytes [rows, n] of a plane, times 2^shift; uint8 [rows, n * 8 / width].

    Each byte is extended to a word with one byte for each of its codes. Its bits are then repeatedly split in half and
    moved apart, until each byte of the word holds one code. On CPUs, this is far faster than looking codes up, since it
    is vectorized.
    """
    if width == 8:
        return plane
    word, steps = SPREADING[width]
    words = plane.to(word)
    for distance, mask in steps:
        words = (words << distance).bitwise_or_(words).bitwise_and_(mask)
    words = words << shift if shift else words
    return words.view(torch.uint8)  # the lowest byte of a word comes first


def uniform_scales(state: State, symmetric: bool) -> Tensor:
    """The scales [out, m] of ``affine`` and ``symmetric`` weights, in float32."""
    if "scales" in state:
        return state["scales"].float()
    codes = state["scale_codes"]
    shares = scale_shares(symmetric, codes.device).index_select(0, codes.flatten().int()).view_as(codes)
    return (shares * state["largest_scale"]).half().float()


def uniform_scales_and_minima(state: State, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scales and minima [out, m] of ``affine`` and ``symmetric`` weights, in float32."""
    scales = uniform_scales(state, symmetric)
    if symmetric:
        return scales, scales * -float(1 << (bits - 1))
    if "minima" in state:
        return scales, state["minima"].float()
    # The product of a code and a float16 number is exact in float32, so all devices round in the same way.
    minima = (state["zero_points"] * scales) * (((1 << bits) - 1) / -255)
    return scales, minima.half().float()


def uniform_values(
    codes: Tensor, scales: Tensor, minima: Tensor, columns: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Weights [out, columns] = scale * code + minimum, rounded once from float32.

    Args:
        codes: packed codes, uint8 [out, bytes of a row].
        scales: scales of the m groups of each row, float32 [out, m].
        minima: minima of the groups, float32 [out, m].
        columns: number of columns.
        bits: width of a code.
        group: number of columns in a group, -1 for whole rows; the last group of a row may be short.
        dtype: dtype of the weights.
    """
    scales, minima = scales.unsqueeze(2), minima.unsqueeze(2)  # [out, m, 1]
    group = columns if group == ROW else group
    whole = columns // group  # number of full groups; a short one may follow
    weight = torch.empty(len(scales), columns, dtype=dtype, device=scales.device)
    size = max(1, CHUNK // columns)
    for rows in (slice(first, first + size) for first in range(0, len(scales), size)):
        values = unpack_codes(codes[rows], columns, bits).float()
        groups = values[:, : whole * group].view(len(values), whole, group)
        groups.mul_(scales[rows, :whole]).add_(minima[rows, :whole])
        if whole * group < columns:
            values[:, whole * group :].mul_(scales[rows, whole]).add_(minima[rows, whole])
        weight[rows] = values
    return weight


def blockwise4_scales(state: State, blocks: Tensor) -> Tensor:
    """The scales of NF4 or FP4 blocks, in the shape of the tensor ``blocks`` of their indices."""
    if "scales" in state:
        return state["scales"][blocks]
    codes = state["scale_codes"][blocks]
    values = scale_code_book(codes.device)[codes.int()]
    return values * state["scale_scales"][blocks // SCALE_GROUP] + state["scale_offset"]


def blockwise4_codes(codes: Tensor, name: str) -> Tensor:
    """The unscaled values of bytes [n] that hold two codes of a code book each; float32 [2 n]."""
    book = code_book(name, codes.device)  # [16]
    pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)  # [256, 2], both values of each byte
    return pairs.index_select(0, codes.int()).flatten()


def blockwise4_values(
    state: State, out_features: int, in_features: int, name: str, group: int, places: Tensor | None = None
) -> Tensor:
    """Weights [out, in], or their rows ``places`` [n], of a code book in blocks across the ends of rows; float32."""
    if places is None or in_features % group:  # or blocks and bytes may span rows
        number = out_features * in_features
        values = blockwise4_codes(state["codes"], name)[:number]
        scales = blockwise4_scales(state, torch.arange(-(-number // group), device=values.device))
        values = (values * scales.repeat_interleave(group)[:number]).view(out_features, in_features)
        return values if places is None else values[places]
    per_row = in_features // group
    blocks = places.unsqueeze(1) * per_row + torch.arange(per_row, device=places.device)  # [n, blocks of a row]
    values = blockwise4_codes(state["codes"].view(out_features, -1)[places].flatten(), name)
    scales = blockwise4_scales(state, blocks).unsqueeze(2)
    return (values.view(len(places), per_row, group) * scales).view(len(places), in_features)


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Caches the tensor that a function creates, except during graph export, whose tensors hold no values."""
    kept = cache(torch.inference_mode(False)(make))

    @wraps(make)
    def get(*arguments: Any) -> Tensor:
        return (make if torch.compiler.is_exporting() else kept)(*arguments)

    return get


@_kept
def scale_shares(symmetric: bool, device: torch.device) -> Tensor:
    """The value of each scale code of ``-double``, as a share of the largest scale; float32 [256].

    Computed without torch, whose powers differ between devices.
    """
    if symmetric:
        magnitudes = [2 ** (-code / 12) for code in range(128)]
        shares = magnitudes + [-magnitude for magnitude in magnitudes]
    else:
        shares = [2 ** (-code / 24) for code in range(256)]
    return torch.tensor(shares, dtype=torch.float32, device=device)


@_kept
def code_book(name: str, device: torch.device) -> Tensor:
    """The 16 values of NF4 or FP4; float32 [16]."""
    return torch.tensor(CODE_BOOKS[name], dtype=torch.float32, device=device)


@_kept
def scale_code_book(device: torch.device) -> Tensor:
    """The 256 values, ascending, of the signed dynamic type for scales; float32 [256].

    They are zero, one, and for the powers of ten 1e-6, 1e-5, ..., 1, with both signs, the midpoints of 1, 2, ..., 64
    equal parts of [0.1, 1], multiplied by the power.

    Source: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015 (arXiv:1511.04561).
    """
    values = [torch.tensor([0, 1], dtype=torch.float32, device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


# Precisions, in the form that they have in `compression`.

Precision = Mapping[str, Any]


def layout(out_features: int, in_features: int, precision: Precision) -> dict[str, Tensor]:
    """The tensors of a weight in a precision, by name, without storage (on the meta device)."""
    if leading := precision.get("leading"):
        first = layout(out_features, leading["columns"], leading["precision"])
        rest = layout(out_features, in_features - leading["columns"], {**precision, "leading": None})
        return {**{LEADING + name: tensor for name, tensor in first.items()}, **rest}

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    name, group, double = precision["format"], group_of(precision), precision["format"].endswith("-double")
    if name == "int8":
        return {"codes": empty(torch.int8, out_features, in_features), "scales": empty(torch.float32, out_features)}
    if name.startswith(tuple(CODE_BOOKS)):
        number = out_features * in_features
        blocks = -(-number // group)
        state = {"codes": empty(torch.uint8, -(-number // 2))}
        if not double:
            return state | {"scales": empty(torch.float32, blocks)}
        return state | {
            "scale_codes": empty(torch.uint8, blocks),
            "scale_scales": empty(torch.float32, -(-blocks // SCALE_GROUP)),
            "scale_offset": empty(torch.float32),
        }
    groups, symmetric = 1 if group == ROW else -(-in_features // group), name.startswith("symmetric")
    state = {"codes": empty(torch.uint8, out_features, bytes_of_row(in_features, precision["bits"]))}
    if double:
        state |= {"largest_scale": empty(torch.float32), "scale_codes": empty(torch.uint8, out_features, groups)}
        return state if symmetric else state | {"zero_points": empty(torch.uint8, out_features, groups)}
    state |= {"scales": empty(torch.float16, out_features, groups)}
    return state if symmetric else state | {"minima": empty(torch.float16, out_features, groups)}


def group_of(precision: Precision) -> int:
    """Number of weights that share a scale."""
    return precision["group"] or 64


def values(
    state: State,
    out_features: int,
    in_features: int,
    precision: Precision,
    dtype: torch.dtype,
    places: Tensor | None = None,
    blockwise4: Callable[[State, int, int, str, int, Tensor | None], Tensor] = blockwise4_values,
    uniform: Callable[[Tensor, Tensor, Tensor, int, int, int, torch.dtype], Tensor] = uniform_values,
) -> Tensor:
    """The weight [out, in] that packed tensors encode, or some of its rows, rounded once from float32.

    Args:
        state: packed tensors, by name.
        out_features: rows of the weight.
        in_features: columns of the weight.
        precision: precision of the weight.
        dtype: dtype of the result.
        places: indices of the rows to return, [n]; None for all. Other rows are not unpacked, unless blocks span rows.
        blockwise4: function that unpacks blocks of a code book, as `blockwise4_values`.
        uniform: function that unpacks uniform weights, as `uniform_values`.
    """
    if leading := precision.get("leading"):
        columns, (first, rest) = leading["columns"], parted(state)
        behind, precision = in_features - columns, {**precision, "leading": None}
        led = values(first, out_features, columns, leading["precision"], dtype, places, blockwise4, uniform)
        return torch.cat([led, values(rest, out_features, behind, precision, dtype, places, blockwise4, uniform)], 1)
    name, bits, group = precision["format"], precision["bits"], group_of(precision)
    if name.startswith(tuple(CODE_BOOKS)):
        return blockwise4(state, out_features, in_features, name.removesuffix("-double"), group, places).to(dtype)
    if places is not None:
        state = {part: tensor[places] if tensor.dim() else tensor for part, tensor in state.items()}
    if name == "int8":
        codes = state["codes"].to(dtype)  # exact in every dtype
        return codes.mul_((state["scales"] * (1 / 127)).unsqueeze(1))  # in float32, then rounded
    grid = uniform_scales_and_minima(state, bits, name.startswith("symmetric"))
    return uniform(state["codes"], *grid, in_features, bits, group, dtype)


class UnpackedProduct(torch.autograd.Function):
    """A product with a weight that is unpacked again in the backward pass, rather than kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, unpack: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.unpack = unpack
        return nn.functional.linear(x, unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.unpack(gradient.dtype), of_bias, None


# Modules with packed weights.


class UnpackedWeight(Tensor):
    """The unpacked weight of a packed linear; reading its ``data`` makes the linear dense, with this same tensor."""

    linear: nn.Module
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        linear: Any = self.linear
        held = linear.become_dense_(self.as_subclass(Tensor)) if isinstance(linear, PackedTable) else linear
        return held.weight.data

    @data.setter
    def data(self, weight: Tensor) -> None:
        self.data.copy_(weight)

    def data_ptr(self) -> int:
        """The identity of the linear, by which PEFT recognises whether head and embedding are tied."""
        return id(self.linear)


class PackedTable(nn.Module):
    """A frozen linear ``x W^T + b`` that unpacks W for every product, and computes in the dtype of x.

    Reading ``weight`` unpacks it. Reading ``weight.data``, as code does that is about to write to it, makes the linear
    dense for good, so that the result of a merge is not lost.

    This class holds the table of an embedding, which may also be the tied head. It is not an `nn.Linear`, so PEFT adds
    no adapters to it, which would have no effect on the embedding.

    Args:
        state: tensors to register as parameters, in this order: codes and scales by name, and others of a subclass.
        out_features: rows of the weight.
        in_features: columns of the weight.
        entry: format, bits, group and leading columns.
        bias: bias [out], or None.
        dtype: dtype of ``weight``, also once the linear is dense; follows ``to``.
    """

    bias: nn.Parameter | None
    parameter: ClassVar[type[nn.Parameter]] = nn.Parameter

    def __init__(
        self,
        state: State,
        out_features: int,
        in_features: int,
        entry: Precision,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)  # not `nn.Linear`, a possible next class, which creates a weight
        self.out_features, self.in_features, self.entry, self.dtype = out_features, in_features, entry, dtype
        self.names = tuple(layout(out_features, in_features, entry))
        for name, tensor in state.items():  # not buffers, which DDP broadcasts at every step
            self.register_parameter(name, self.parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)

    def packed(self) -> dict[str, Tensor]:
        """Codes and scales by name; they share the storage of the module's parameters."""
        return {name: self.get_parameter(name).data for name in self.names}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded once from float32."""
        return values(self.packed(), self.out_features, self.in_features, self.entry, dtype)

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of the weight at the indices ``places`` [n]; [n, in]."""
        return values(self.packed(), self.out_features, self.in_features, self.entry, dtype, places)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return cast(Tensor, UnpackedProduct.apply(x, bias, self.unpack))  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The unpacked weight [out, in]."""
        weight = self.unpack(self.dtype).as_subclass(UnpackedWeight)
        weight.linear = self
        return weight

    def become_dense_(self, weight: Tensor | None = None) -> nn.Linear:
        """Turns this object into a dense linear, by changing its class as ``LazyLinear`` does.

        Args:
            weight: weight [out, in] of the dense linear; by default the unpacked one.

        Raises:
            TypeError: this is the table of an embedding.
        """
        if not isinstance(self, nn.Linear):
            raise TypeError(
                "The embedding of this model is packed, so its weight cannot be written to. Read `weight`, which is "
                "unpacked, or make a dense copy of the model first."
            )
        dense = self.unpack(self.dtype) if weight is None else weight.detach()
        dense = dense.to(self.dtype, copy=isinstance(weight, nn.Parameter))  # a parameter belongs to another module
        bias = self.bias
        self._parameters.clear()
        del self.entry, self.dtype, self.names
        linear = cast(nn.Linear, self)
        linear.__class__ = nn.Linear
        linear.weight = nn.Parameter(dense, requires_grad=False)
        linear.register_parameter("bias", bias)
        return linear

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:  # assigned by other code
            self.become_dense_(param)
        else:
            super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, tensor in before.items():  # casting the model must not cast the scales, on whichever devices they are
            if (moved := self.get_parameter(name)).dtype != tensor.dtype:
                self.register_parameter(name, self.parameter(tensor.to(moved.device), requires_grad=False))
        return self


class CompressedLinear(PackedTable, nn.Linear):  # type: ignore[misc, override]
    """A frozen linear with a packed weight, which PEFT treats like any other linear."""


class CompressedEmbedding(nn.Module):
    """A frozen embedding whose rows are those of a packed linear; with tied embeddings, that linear is the head itself.

    Args:
        table: linear whose weight [vocabulary, hidden] is the table, and whose dtype the rows have.
        scale: factor that the rows are multiplied by.
    """

    def __init__(self, table: PackedTable, scale: float) -> None:
        super().__init__()
        self.table, self.scale = table, scale

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., hidden]
        rows = self.table.rows(ids.flatten(), self.table.dtype)
        return rows.view(*ids.shape, self.table.in_features) * torch.tensor(self.scale, dtype=rows.dtype)

    @property
    def weight(self) -> Tensor:
        """The table, [vocabulary, hidden]."""
        return self.table.weight


# Mixtures of experts.


class Expert(nn.Module):
    """One gated network of a mixture, made of linears, which may be narrowed or packed, or have adapters.

    Args:
        names: names of its linears: gate, up and down.
        sizes: hidden size, and number of intermediate channels.
        bias: whether its linears have biases.
        activation: activation function of the gate; None if ``clamped`` is given.
        clamped: ``alpha`` and ``limit`` of gpt-oss, in which the gate is ``clamp(g) sigmoid(alpha clamp(g))``, and the
            up projection is ``clamp(u) + 1``; None for other families.
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        sizes: tuple[int, int],
        bias: bool,
        activation: nn.Module | None,
        clamped: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        hidden, channels = sizes
        self.names, self.clamped, self.activation = names, clamped, activation
        shapes = (hidden, channels), (hidden, channels), (channels, hidden)
        for name, (inputs, outputs) in zip(names, shapes, strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=bias))

    def forward(self, x: Tensor) -> Tensor:  # [.., hidden] -> [.., hidden]
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return cast(Tensor, down(self._gated(gate(x), up(x))))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.clamped is None:
            assert self.activation is not None
            return cast(Tensor, self.activation(gate)) * up
        alpha, limit = self.clamped
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class Experts(nn.ModuleList):
    """The experts of a layer as a list, each of which processes only the tokens that the router sends to it.

    The list replaces transformers' module, whose tensors hold all experts together and could only be packed as a whole.
    The packed weights of an expert are unpacked only if a token reaches it.
    """

    @classmethod
    def of(cls, fused: Any, names: tuple[str, str, str], number: int | None = None) -> "Experts":
        """Creates experts with the shapes of transformers' module, but not its weights.

        Args:
            fused: module of transformers.
            names: names of the linears of each expert: gate, up and down.
            number: number of experts; by default, as many as ``fused`` has.
        """
        has_bias = hasattr(fused, "gate_up_proj_bias")  # gpt-oss, whose weights are [in, out]
        sizes = fused.down_proj.shape[1:] if has_bias else fused.down_proj.shape[:0:-1]
        channels, hidden = sizes
        activation = None if has_bias else fused.act_fn
        clamped = (fused.alpha, fused.limit) if has_bias else None
        number = len(fused.down_proj) if number is None else number
        return cls(Expert(names, (hidden, channels), has_bias, activation, clamped) for _ in range(number))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The outputs of the experts for each token, summed with the weights from the router.

        Args:
            hidden_states: hidden states of the tokens, [N, hidden].
            top_k_index: indices of the experts of each token, [N, k].
            top_k_weights: weights of these experts, [N, k].
        """  # [N, hidden]
        total = torch.zeros_like(hidden_states)
        for number in sorted(set(top_k_index.flatten().tolist())):
            tokens, places = torch.where(top_k_index == number)
            given = self[number](hidden_states[tokens].unsqueeze(0)).squeeze(0)  # as one sequence
            weighted = given * top_k_weights[tokens, places].unsqueeze(1)
            total.index_add_(0, tokens, weighted.to(total.dtype))
        return total


# The configuration and the model.

COMPRESSED = "compressed_"
"""Prefix of the ``model_type`` of models that the family's class cannot build."""


class LayerConfig:
    """The configuration of a model as seen by one layer, with the widths of that layer.

    All other fields are read from the model's configuration at every access, since they may change, such as the
    implementation of attention.

    Args:
        config: configuration of the model.
        widths: widths of the layer, by name of the field.
    """

    def __init__(self, config: Any, widths: Mapping[str, int]) -> None:
        self.config, self.widths = config, widths

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "widths") or name.startswith("__"):  # looked up while the object is copied
            raise AttributeError(name)
        return self.widths[name] if name in self.widths else getattr(self.config, name)


def layer_config(config: Any, number: int) -> Any:
    """The configuration for a module of a layer that reads widths from it; the model's own if all layers are equal."""
    if not config.is_heterogeneous:
        return config
    layer = config.per_layer_config[number]
    return LayerConfig(config, {name: getattr(layer, name) for name in config.per_layer_attributes})


@cache
def config_class(name: str) -> type:
    """The class of compressed configurations for a family's, such as ``LlamaConfig``; allows any number of heads."""
    import transformers  # slow to import, and not needed to read codes
    from huggingface_hub.dataclasses import strict

    parent = getattr(transformers, name)

    def validate_rope(self: Any) -> None:
        # By the common rules: Phi-3's own assume that the heads fill the hidden size. Rules of long positions read the
        # number of heads, of which unequal layers have several; the skeleton has been checked by these rules.
        if not self.is_heterogeneous:
            transformers.PreTrainedConfig.validate_rope(self)

    members = {
        "model_type": COMPRESSED + parent.model_type,
        "validate_architecture": lambda self: None,
        "validate_rope": validate_rope,
        "__module__": __name__,
        "__annotations__": {},
    }
    # Without the decorator, the validators of the parent class would still run.
    compressed_class: type = strict(type(f"Compressed{name}", (parent,), members))
    return compressed_class


@cache
def model_class(name: str) -> type:
    """The class of compressed models for a family's class, such as ``LlamaForCausalLM``."""
    import transformers

    parent: Any = getattr(transformers, name)
    members = {"config_class": config_class(parent.config_class.__name__), "__module__": __name__}
    return type(f"Compressed{name}", (_Compressed, parent), members)


def __getattr__(name: str) -> type:
    """Creates the classes on access as members of this module, which loading by name and pickling need."""
    import transformers

    family = name.removeprefix("Compressed")
    if family != name and hasattr(transformers, family):
        return (config_class if family.endswith("Config") else model_class)(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Compressed:
    """Mixin that comes before the family's class in the classes of compressed models."""

    config: Any

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        with _as_skeleton(config):
            super().__init__(config, *arguments, **options)  # type: ignore[call-arg]
        compress_(self, config.compression)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense parameters; transformers would take that of the first one, which may be scales."""
        packed = {id(part) for module in _packed(self) for part in module.parameters()}
        return next(part.dtype for part in self.parameters() if id(part) not in packed)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As in transformers, but packed parameters stay frozen; transformers makes those of floats trainable."""
        loaded: Any = super().from_pretrained(*arguments, **options)  # type: ignore[misc]
        for module in _packed(loaded[0] if isinstance(loaded, tuple) else loaded):
            module.requires_grad_(False)
        return loaded

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """As in transformers, but first records in the configuration which modules have become dense since loading."""
        modules: dict[str, Any] = self.config.compression["modules"]
        for path, entry in list(modules.items()):
            part = self._part(path)
            if "format" in entry and part is not None and not isinstance(part, PackedTable | CompressedEmbedding):
                modules[path] = {"shape": entry["shape"], "linear": True}
        super().save_pretrained(*arguments, **options)  # type: ignore[misc]

    def _part(self, path: str) -> Any:
        """The module at a path in the whole model; None if this is a model without a head that lacks it."""
        inside = dict(_inside(self, {path: path}))
        return self.get_submodule(*inside) if inside else None  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, PackedTable | CompressedEmbedding):
            super()._init_weights(module)  # type: ignore[misc]


def _packed(model: Any) -> Iterator[PackedTable]:
    return (module for module in model.modules() if isinstance(module, PackedTable))


@contextmanager
def _as_skeleton(config: Any) -> Iterator[None]:
    """Changes a configuration, inside the context, to one from which the family's class can build: with equal layers.

    It changes the object itself, which the model keeps, since classes store results in it while they build, such as
    which attention to use.
    """
    record = config.__dict__.pop("_heterogeneity_spec", None)
    before = {name: getattr(config, name) for name in config.compression["skeleton"]}
    for name, value in config.compression["skeleton"].items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        if record is not None:
            config._heterogeneity_spec = record


def compress_(model: Any, compression: Mapping[str, Any]) -> None:
    """Replaces modules of a model with equal dense layers by those that ``compression`` describes, without values."""
    for name, entry in _inside(model, compression.get("experts", {})):
        model.set_submodule(name, Experts.of(model.get_submodule(name), tuple(entry["projections"]), entry["number"]))
    for name, entry in _inside(model, compression["modules"]):
        model.set_submodule(name, _replacement(model.get_submodule(name), entry))
    for path, shape in _inside(model, compression.get("parameters", {})):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Parameter(model.get_parameter(path).new_empty(shape)))
    tie_(model)
    for path, value in _inside(model, compression["attributes"]):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
    for path, number in _inside(model, compression["layer_configs"]):
        model.get_submodule(path).config = layer_config(model.config, number)


def tie_(model: Any) -> None:
    """Makes the table of a packed embedding the head as well, if the embeddings are tied; changes no other model."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, CompressedEmbedding) and head is not None and model.config.tie_word_embeddings:
        names = {id(part): name for name, part in model.named_modules()}
        model.set_output_embeddings(embedding.table)
        model._tied_weights_keys = {names[id(head)]: f"{names[id(embedding)]}.table"}
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()


def _inside(model: Any, by_path: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries by path, for the parts that a model has; in a model without a head, without the prefix of its base."""
    if hasattr(model, model.base_model_prefix):
        yield from by_path.items()
        return
    prefix = f"{model.base_model_prefix}."
    for path, told in by_path.items():
        if path.startswith(prefix):
            yield path.removeprefix(prefix), told


def _replacement(module: Any, entry: Mapping[str, Any]) -> nn.Module:
    shape: list[int] = entry["shape"]
    if len(shape) == 1:  # a norm
        module.weight = nn.Parameter(module.weight.new_empty(shape))
        return module
    has_bias = getattr(module, "bias", None) is not None
    if "format" not in entry:
        if isinstance(module, nn.Linear) or "linear" in entry:
            return nn.Linear(shape[1], shape[0], bias=has_bias)
        return type(module)(*shape)  # GPT-2's Conv1D, whose weight is [in, out]
    (rows, columns), dtype = shape, torch.get_default_dtype()
    precision = {name: entry.get(name) for name in ("format", "bits", "group", "leading")}
    like = layout(rows, columns, precision)
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    if isinstance(module, nn.Embedding):
        return CompressedEmbedding(PackedTable(state, rows, columns, precision, None, dtype), entry["scale"])
    bias = nn.Parameter(torch.empty(rows), requires_grad=False) if has_bias else None
    return CompressedLinear(state, rows, columns, precision, bias, dtype)
