"""Four-bit floats in blocks that share a scale (NF4, FP4), by bitsandbytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.plan import Precision
from qpruner.quantization.packed import PackedLinear

CODE_BOOKS: dict[str, tuple[float, ...]] = {
    # Quantiles of the normal distribution scaled to [-1, 1], with an exact zero.
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # Sign, two bits of exponent and one of mantissa, over 12.
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
SCALE_GROUP = 256
"""Scales that share a scale of their own in double quantization."""


@dataclass(frozen=True)
class Blockwise4:
    """NF4 or FP4: each weight is the nearest of 16 values, times the largest magnitude in its block.

    Blocks run over the weights in row order, across the ends of rows; the last one may be short. Four bits and a
    float32 scale for 64 weights make 4.5 bits per weight; with double quantization (``-double``) 4.13.

    Layout, for n = out * in weights, m = ceil(n / group) blocks:

    - ``codes``: uint8 [ceil(n / 2)], two weights a byte, the earlier one in the upper four bits; each is an index into
      ``CODE_BOOKS``. When n is odd the last four bits mean nothing.
    - ``scales``: float32 [m]; weight = code book[code] * scale of its block.

    With double quantization, instead of ``scales``:

    - ``scale_codes``: uint8 [m], indices into ``scale_code_book``;
    - ``scale_scales``: float32 [ceil(m / 256)];
    - ``scale_offset``: float32 []; scale = scale code book[scale code] * scale scale of its 256 scales + scale offset.

    Source: Dettmers et al., QLoRA, 2023 (arXiv:2305.14314), section 3 and appendix E.
    """

    code_book: str
    double: bool = False

    @property
    def name(self) -> str:
        return f"{self.code_book}-double" if self.double else self.code_book

    @property
    def bits(self) -> tuple[int, ...]:
        return (4,)

    @property
    def groups(self) -> tuple[int, ...]:
        return (64, 32, 128, 256, 512, 1024)

    def layout(self, out_features: int, in_features: int, precision: Precision) -> dict[str, Tensor]:
        num_weights = out_features * in_features
        num_blocks = -(-num_weights // self.group(precision))
        layout = {"codes": torch.empty(-(-num_weights // 2), dtype=torch.uint8, device="meta")}
        if not self.double:
            return {**layout, "scales": torch.empty(num_blocks, dtype=torch.float32, device="meta")}
        return {
            **layout,
            "scale_codes": torch.empty(num_blocks, dtype=torch.uint8, device="meta"),
            "scale_scales": torch.empty(-(-num_blocks // SCALE_GROUP), dtype=torch.float32, device="meta"),
            "scale_offset": torch.empty((), dtype=torch.float32, device="meta"),
        }

    def encode(self, weight: Tensor, precision: Precision) -> dict[str, Tensor]:
        codes, state = _bitsandbytes().functional.quantize_4bit(
            weight.float().contiguous(), blocksize=self.group(precision), quant_type=self.code_book
        )
        if not self.double:
            return {"codes": codes.flatten(), "scales": state.absmax}
        offset = state.absmax.mean()
        scale_codes, scale_state = _bitsandbytes().functional.quantize_blockwise(
            state.absmax - offset, code=scale_code_book(offset.device), blocksize=SCALE_GROUP
        )
        return {
            "codes": codes.flatten(),
            "scale_codes": scale_codes,
            "scale_scales": scale_state.absmax,
            "scale_offset": offset,
        }

    def decode(self, state: Mapping[str, Tensor], out_features: int, in_features: int, precision: Precision) -> Tensor:
        num_weights, group = out_features * in_features, self.group(precision)
        values = self._values(state["codes"])[:num_weights]
        blocks = torch.arange(-(-num_weights // group), device=values.device)
        return (values * _spread(self._scales(state, blocks), group, num_weights)).view(out_features, in_features)

    def unpack(
        self,
        state: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        precision: Precision,
        dtype: torch.dtype,
    ) -> Tensor:
        bnb = _bitsandbytes()
        codes, scales = state["codes"], state.get("scales")
        if scales is None:
            scales = bnb.functional.dequantize_blockwise(state["scale_codes"], _scale_state(state))
            scales = scales + state["scale_offset"]
        # The kernel is told of a matrix with a block in each row, or of one long row: these it reads rightly. It knows
        # three dtypes, and leaves memory as it is for others.
        group, length = self.group(precision), 2 * codes.numel()
        shape = (1, length) if length % group else (length // group, group)
        values = torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1, 1), scales, group, self.code_book, shape, torch.float32
        )
        return values.flatten()[: out_features * in_features].view(out_features, in_features).to(dtype)

    def decode_rows(
        self, state: Mapping[str, Tensor], rows: Tensor, out_features: int, in_features: int, precision: Precision
    ) -> Tensor:
        group = self.group(precision)
        if in_features % group:  # blocks run across the ends of rows, and so may bytes
            return self.decode(state, out_features, in_features, precision)[rows]
        per_row = in_features // group
        blocks = rows.unsqueeze(1) * per_row + torch.arange(per_row, device=rows.device)  # [n, blocks of a row]
        values = self._values(state["codes"].view(out_features, -1)[rows].flatten()).view(len(rows), per_row, group)
        return (values * self._scales(state, blocks).unsqueeze(2)).view(len(rows), in_features)

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> None:
        return None  # blocks run across columns, and from the end of a row into the next

    def build(
        self,
        state: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        precision: Precision,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> PackedLinear:
        return Blockwise4Linear(state, out_features, in_features, precision, bias, dtype, self)

    def book(self, device: torch.device) -> Tensor:
        return _code_book(self.code_book, device)

    def group(self, precision: Precision) -> int:
        return precision.group or self.groups[0]

    def scales(self, state: Mapping[str, Tensor]) -> Tensor:
        """The scale of every block; float32 [m]."""
        blocks = state["scale_codes" if self.double else "scales"]
        return self._scales(state, torch.arange(len(blocks), device=blocks.device))

    def _values(self, codes: Tensor) -> Tensor:
        """What bytes [n] of two codes each mean before they are scaled; [2 n]."""
        book = self.book(codes.device)  # [16]
        pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)  # [256, 2], a byte's two values
        return pairs.index_select(0, codes.int()).flatten()

    def _scales(self, state: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
        """The scales of some blocks, in the shape of their numbers."""
        if not self.double:
            return state["scales"][blocks]
        codes = state["scale_codes"][blocks]
        values = scale_code_book(codes.device)[codes.int()]
        return values * state["scale_scales"][blocks // SCALE_GROUP] + state["scale_offset"]


class Blockwise4Linear(PackedLinear):
    """A linear in blocks of four-bit floats; CUDA multiplies by the kernels of bitsandbytes.

    On CPUs it unpacks with torch. The ``Linear4bit`` of bitsandbytes would rewrite its weight in place at the first
    forward in evaluation where there is AVX512-BF16, after which no gradient passes through it, silently; with AVX512
    its kernel mixes up scales when ``in`` is a multiple of 32 but not of the group; and it computes for good in the
    dtype of the first input that it sees.

    """

    number_format: Blockwise4

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        packed = self.packed()
        bnb = _bitsandbytes()
        return bnb.matmul_4bit(x, packed["codes"].view(-1, 1), bias=bias, quant_state=self.state_of(packed, x.dtype))

    def state_of(self, packed: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        """What bitsandbytes has to know of the codes, for products in a dtype and their backward pass."""
        number_format = self.number_format
        scales: dict[str, Any] = {"absmax": packed.get("scales")}
        if number_format.double:
            scales = {
                "absmax": packed["scale_codes"],
                "offset": packed["scale_offset"],
                "state2": _scale_state(packed),
            }
        return _bitsandbytes().functional.QuantState(
            shape=torch.Size((self.out_features, self.in_features)),
            code=number_format.book(packed["codes"].device),
            blocksize=number_format.group(self.precision),
            quant_type=number_format.code_book,
            dtype=dtype,
            **scales,
        )


def _bitsandbytes() -> Any:
    """Imported when something is computed: it takes longer than torch, and a plan's bytes are counted without it."""
    import bitsandbytes

    return bitsandbytes


def _scale_state(packed: Mapping[str, Tensor]) -> Any:
    """What bitsandbytes has to know of scales that are quantized themselves."""
    scales = packed["scale_scales"]
    return _bitsandbytes().functional.QuantState(
        absmax=scales, blocksize=SCALE_GROUP, code=scale_code_book(scales.device), dtype=torch.float32
    )


@cache  # moved to a device once, not at every product
@torch.inference_mode(False)
def _code_book(name: str, device: torch.device) -> Tensor:
    return torch.tensor(CODE_BOOKS[name], dtype=torch.float32, device=device)


@cache
@torch.inference_mode(False)
def scale_code_book(device: torch.device) -> Tensor:
    """The 256 values, ascending, of the signed dynamic type for scales; float32 [256].

    Zero, one, and, for each power of ten from 1e-6 to 1, with either sign, the middles of 1, 2, 4, .. 64 equal parts of
    [0.1, 1] times that power.

    Source: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015 (arXiv:1511.04561).
    """
    values = [torch.tensor([0, 1], dtype=torch.float32, device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def _spread(scales: Tensor, group: int, length: int) -> Tensor:
    """Each scale repeated for the members of its group, of which the last may be short."""
    return scales.repeat_interleave(group)[:length]
