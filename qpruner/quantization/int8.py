"""Eight-bit integers with a scale for every row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.plan import Precision


@dataclass(frozen=True)
class Int8:
    """Symmetric int8: the largest magnitude of each row of the weight becomes 127.

    Eight bits and a float32 scale for each row.

    Layout:

    - ``codes``: int8 [out, in], from -127 to 127;
    - ``scales``: float32 [out], the largest magnitudes; weight = code * (scale * (1 / 127)), computed in float32.

    Activations stay as they are. The ``Linear8bitLt`` of bitsandbytes casts them to float16 and rounds each row of them
    to int8, on CUDA always and on CPUs in evaluation but not in training. Here only the weight is int8, so a result is
    the same in both modes, on both devices and from the stored codes and scales.

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
        # Not by bitsandbytes, which rounds the weight to float16 first.
        weight = weight.float().contiguous()
        scales = weight.abs().amax(dim=1)  # [out]
        steps = torch.where(scales > 0, scales, 1.0).unsqueeze(1)  # rows of zeros: not 0 / 0
        return {"codes": (weight / steps * 127).round().to(torch.int8), "scales": scales}

    def take(
        self, state: Mapping[str, Tensor], axis: int, index: Tensor, in_features: int, precision: Precision
    ) -> dict[str, Tensor]:
        scales = state["scales"]
        return {
            "codes": state["codes"].index_select(axis, index),
            "scales": scales[index] if axis == 0 else scales.clone(),
        }
