"""Adapters merged into a dense copy of their base.

Always dense: packed into the base's formats again, the merged weights would be rounded again, which costs more than the
adapters gave.
"""

from typing import Any

import torch
from torch import nn

from qpruner.pretrained import hold_in_
from qpruner.quantization.embedding import unpack_embedding_
from qpruner.quantization.formats import dequantize
from qpruner.quantization.packed import PackedLinear


def merge_(model: Any, dtype: torch.dtype) -> Any:
    """Makes a PEFT model dense, in place, with its adapters added to their linears in float32, and returns it.

    Args:
        model: a PEFT model, or one without adapters; packed or not.
        dtype: of the result.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    unpack_embedding_(base)
    for name, module in list(base.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            base.set_submodule(name, _dense(module.base_layer, module.get_delta_weight("default")))
        elif isinstance(module, PackedLinear) and ".base_layer" not in name:
            base.set_submodule(name, _dense(module, None))
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(base, flag, False)
    if hasattr(base, "peft_config"):  # else PEFT warns of adapters that are there already, when it adds others
        del base.peft_config
    return hold_in_(base, dtype)


def _dense(linear: Any, delta: torch.Tensor | None) -> nn.Linear:
    """A dense linear of the same function, with a change of the weight added; float32."""
    weight = dequantize(linear) if isinstance(linear, PackedLinear) else linear.weight.detach().float()
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight if delta is None else weight + delta.float(), requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made
