"""Four-bit floats in blocks that share a scale (NF4, FP4), quantized by bitsandbytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpruner.modeling_compressed import SCALE_GROUP, blockwise4_scales, blockwise4_values, code_book, scale_code_book
from qpruner.plan import Precision


@dataclass(frozen=True)
class Blockwise4:
    """NF4 or FP4: each weight is the nearest of 16 values, times the largest magnitude in its block.

    Blocks run over the weights in row order, across the ends of rows; the last one may be short. Four bits per weight
    and a float32 scale for 64 weights add up to 4.5 bits per weight, with double quantization (``-double``) to 4.13.

    Layout, for n = out * in weights, m = ceil(n / group) blocks:

    - ``codes``: uint8 [ceil(n / 2)], two weights a byte, the earlier one in the upper four bits; each is an index into
      `qpruner.modeling_compressed.CODE_BOOKS`. When n is odd, the last four bits are unused.
    - ``scales``: float32 [m]; weight = code book[code] * scale of its block.

    With double quantization, instead of ``scales``:

    - ``scale_codes``: uint8 [m], indices into `qpruner.modeling_compressed.scale_code_book`;
    - ``scale_scales``: float32 [ceil(m / 256)];
    - ``scale_offset``: float32 []; scale = scale code book[scale code] * scale scale of its 256 scales + scale offset.

    Source: Dettmers et al., QLoRA, 2023 (arXiv:2305.14314), section 3 and appendix E.

    Args:
        code_book: name of the 16 values, ``nf4`` or ``fp4``.
        double: whether the scales are quantized to eight bits each.
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

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> None:
        return None  # blocks hold several columns, and run from the end of a row into the next

    def group(self, precision: Precision) -> int:
        return precision.group or self.groups[0]

    def scales(self, state: Mapping[str, Tensor]) -> Tensor:
        """The scale of every block; float32 [m]."""
        blocks = state["scale_codes" if self.double else "scales"]
        return blockwise4_scales(state, torch.arange(len(blocks), device=blocks.device))


def unpack_blocks(
    state: Mapping[str, Tensor],
    out_features: int,
    in_features: int,
    name: str,
    group: int,
    places: Tensor | None = None,
) -> Tensor:
    """Computes `blockwise4_values`, bit for bit; for a whole weight by the kernel of bitsandbytes, which is faster."""
    if places is not None:
        return blockwise4_values(state, out_features, in_features, name, group, places)
    bnb = _bitsandbytes()
    codes, scales = state["codes"], state.get("scales")
    if scales is None:
        scales = bnb.functional.dequantize_blockwise(state["scale_codes"], _scale_state(state))
        scales = scales + state["scale_offset"]
    # The weight is passed to the kernel as a matrix with one block in each row, or as one long row, since those are the
    # shapes that it reads correctly. It supports three dtypes only, and leaves the output uninitialised for others.
    length = 2 * codes.numel()
    shape = (1, length) if length % group else (length // group, group)
    values = torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), scales, group, name, shape, torch.float32)
    return values.flatten()[: out_features * in_features].view(out_features, in_features)


def multiply_blocks(
    x: Tensor, bias: Tensor | None, state: Mapping[str, Tensor], out_features: int, name: str, group: int
) -> Tensor:
    """The product ``x W^T + b`` [.., out] with a weight in blocks, on CUDA, by the kernels of bitsandbytes.

    Not for CPUs. With AVX512-BF16, ``Linear4bit`` of bitsandbytes rewrites its weight in place at the first forward
    pass in evaluation mode, after which it silently passes no gradient on. With AVX512, the kernel mixes up scales when
    ``in`` is a multiple of 32 but not of the group.

    Args:
        x: inputs [.., in], on a CUDA device.
        bias: bias [out] in the dtype of ``x``, or None.
        state: tensors of the weight in the layout of `Blockwise4`.
        out_features: rows of the weight.
        name: name of the code book.
        group: number of weights in a block.
    """
    told = quant_state(state, (out_features, x.shape[-1]), name, group, x.dtype)
    product: Tensor = _bitsandbytes().matmul_4bit(x, state["codes"].view(-1, 1), bias=bias, quant_state=told)
    return product


def quant_state(state: Mapping[str, Tensor], shape: tuple[int, int], name: str, group: int, dtype: torch.dtype) -> Any:
    """The ``QuantState`` of bitsandbytes for a weight [out, in], for products in a dtype and for their gradients."""
    scales: dict[str, Any] = {"absmax": state.get("scales")}
    if "scale_codes" in state:
        scales = {"absmax": state["scale_codes"], "offset": state["scale_offset"], "state2": _scale_state(state)}
    code = code_book(name, state["codes"].device)
    return _bitsandbytes().functional.QuantState(
        shape=torch.Size(shape), code=code, blocksize=group, quant_type=name, dtype=dtype, **scales
    )


def _bitsandbytes() -> Any:
    """Imported on use: importing it takes longer than torch, and counting the bytes of a plan works without it."""
    import bitsandbytes

    return bitsandbytes


def _scale_state(packed: Mapping[str, Tensor]) -> Any:
    """The ``QuantState`` of bitsandbytes for the scales of double quantization."""
    scales = packed["scale_scales"]
    return _bitsandbytes().functional.QuantState(
        absmax=scales, blocksize=SCALE_GROUP, code=scale_code_book(scales.device), dtype=torch.float32
    )
