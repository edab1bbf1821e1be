"""Adapters merged into a dense copy of their base.

Always dense: packed into the base's formats again, the merged weights would be rounded again, which costs more than the
adapters gave.
"""

from typing import Any

import torch
from torch import nn

from qpruner.pretrained import hold_in_
from qpruner.quantization.embedding import unpack_embedding_
from qpruner.quantization.packed import PackedLinear


def merge_(model: Any, dtype: torch.dtype) -> Any:
    """Makes a PEFT model dense, in place, with its active adapters added to their linears in float32, and returns it.

    Args:
        model: a PEFT model, or one without adapters; packed or not.
        dtype: dtype of the merged model.
    """
    adapted = hasattr(model, "merge_and_unload")
    base = model.get_base_model() if adapted else model
    for module in base.modules():
        if isinstance(module, PackedLinear):
            module.to(torch.float32)
    unpack_embedding_(base)
    for module in list(base.modules()):
        if isinstance(module, PackedLinear):
            module.become_dense_()
    hold_in_(base, torch.float32)
    if adapted:
        _untie_adapted_head_(base)
        base = model.merge_and_unload()
    return hold_in_(base, dtype)


def _untie_adapted_head_(base: Any) -> None:
    """Gives a head that has adapters a weight of its own; the embedding, which has none of them, keeps the tied one."""
    head = base.get_output_embeddings()
    if base.config.tie_word_embeddings and hasattr(head, "base_layer"):
        linear = head.get_base_layer()
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
