"""Linears and LoRA on them, for every format."""

from collections.abc import Mapping, Sequence

import peft
import torch
from torch import Tensor, nn

from qpruner.modeling_compressed import values
from qpruner.plan import Leading, Precision
from qpruner.quantization.formats import format_for

PRECISIONS = [
    Precision("nf4", 4),
    Precision("nf4", 4, group=128),
    Precision("nf4-double", 4),
    Precision("fp4", 4),
    Precision("fp4-double", 4, group=32),
    Precision("int8", 8),
    Precision("affine", 1, group=32),
    Precision("affine", 4),
    Precision("affine-double", 2),
    Precision("affine-double", 3, group=-1),
    Precision("symmetric", 8, group=32),
    Precision("symmetric", 5, group=128),
    Precision("symmetric-double", 6),
    Precision("nf4", 4, leading=Leading(20, Precision("int8", 8))),
    Precision("affine-double", 3, 32, Leading(20, Precision("symmetric", 6))),
]


def quantize_dequantize(weight: Tensor, precision: Precision) -> Tensor:
    """What a precision makes of a weight [out, in]; float32 of the same shape."""
    return meant_by(format_for(precision).encode(weight, precision), weight.shape, precision)


def meant_by(state: Mapping[str, Tensor], shape: Sequence[int], precision: Precision) -> Tensor:
    """The weight that a state means, by torch alone; float32 [out, in]."""
    out_features, in_features = shape
    return values(state, out_features, in_features, precision.to_data(), torch.float32)


def random_linear(in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(in_features, out_features).to(dtype)


class Chain(nn.Module):
    """Two linears one after the other, so that a gradient of the first adapter passes through the second linear."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def with_lora(model: nn.Module) -> nn.Module:
    """The same adapters each time, with both factors drawn at random so that both have gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
        return peft.get_peft_model(model, config)


def lora_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(x).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
