"""Four-bit floats in blocks that share a scale (NF4, FP4), by bitsandbytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.modeling_compressed import (
    SCALE_GROUP,
    blockwise4_rows,
    blockwise4_scales,
    blockwise4_values,
    code_book,
    layout,
    scale_code_book,
)
from qpruner.plan import Precision
from qpruner.quantization.packed import PackedLinear


@dataclass(frozen=True)
class Blockwise4:
    """NF4 or FP4: each weight is the nearest of 16 values, times the largest magnitude in its block.

    Blocks run over the weights in row order, across the ends of rows; the last one may be short. Four bits and a
    float32 scale for 64 weights make 4.5 bits per weight; with double quantization (``-double``) 4.13.

    Layout, for n = out * in weights, m = ceil(n / group) blocks:

    - ``codes``: uint8 [ceil(n / 2)], two weights a byte, the earlier one in the upper four bits; each is an index into
      `qpruner.modeling_compressed.CODE_BOOKS`. When n is odd the last four bits mean nothing.
    - ``scales``: float32 [m]; weight = code book[code] * scale of its block.

    With double quantization, instead of ``scales``:

    - ``scale_codes``: uint8 [m], indices into `qpruner.modeling_compressed.scale_code_book`;
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
        return layout(out_features, in_features, precision.to_data())

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
        return blockwise4_values(state, out_features, in_features, self.code_book, self.group(precision))

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
        shape = out_features, in_features
        return blockwise4_rows(state, rows, shape, self.code_book, self.group(precision))

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

    def group(self, precision: Precision) -> int:
        return precision.group or self.groups[0]

    def scales(self, state: Mapping[str, Tensor]) -> Tensor:
        """The scale of every block; float32 [m]."""
        blocks = state["scale_codes" if self.double else "scales"]
        return blockwise4_scales(state, torch.arange(len(blocks), device=blocks.device))


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
            code=code_book(number_format.code_book, packed["codes"].device),
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
