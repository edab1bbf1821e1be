"""Eight-bit integers with a scale for every row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.plan import Precision


@dataclass(frozen=True)
class Int8:
    """Symmetric int8 with one float32 scale per row: the largest magnitude in each row gets the code 127 or -127.

    Layout:

    - ``codes``: int8 [out, in], from -127 to 127;
    - ``scales``: float32 [out], the largest magnitude in each row; weight = code * (scale * (1 / 127)), computed in
      float32.

    Activations are not quantized. ``Linear8bitLt`` of bitsandbytes casts them to float16 and rounds each of their rows
    to int8, on CUDA always, on CPUs in evaluation but not in training. Here only the weight is int8, so that training
    and evaluation, all devices, and other programs that read the codes and scales use the same weight.

    Source: Dettmers et al., LLM.int8(), 2022 (arXiv:2208.07339), section 2, without the decomposition of outliers.
    """

    @property
    def name(self) -> str:
        return "int8"

    @property
    def bits(self) -> tuple[int, ...]:
        return (8,)

    @property
    def groups(self) -> tuple[None]:
        return (None,)

    def encode(self, weight: Tensor, precision: Precision) -> dict[str, Tensor]:
        # Without bitsandbytes, which rounds the weight to float16 first.
        weight = weight.float().contiguous()
        scales = weight.abs().amax(dim=1)  # [out]
        steps = torch.where(scales > 0, scales, 1.0).unsqueeze(1)  # avoids 0 / 0 in rows of zeros
        return {"codes": (weight / steps * 127).round().to(torch.int8), "scales": scales}

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> dict[str, Tensor]:
        scales = state["scales"]
        return {
            "codes": state["codes"].index_select(axis, index),
            "scales": scales[index] if axis == 0 else scales.clone(),
        }
