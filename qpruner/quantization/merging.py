"""Adapters merged into a dense copy of their base.

Always dense: packed into the base's formats again, the merged weights would be rounded again, which costs more than the
adapters gave.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from qpruner.pretrained import hold_in_
from qpruner.quantization.embedding import unpack_embedding_
from qpruner.quantization.packed import PackedLinear


def merge_(model: Any, dtype: torch.dtype, done: Callable[[nn.Module], object] = lambda linear: None) -> Any:
    """Makes a PEFT model dense, in place, with its active adapters added to their linears in float32, and returns it.

    One linear after the other is made dense and rounded to the dtype, so that never more than one is in float32.

    Args:
        model: a PEFT model, or one without adapters; packed or not.
        dtype: dtype of the merged model.
        done: called with each linear that was packed or had an adapter, once it is dense.
    """
    adapted = hasattr(model, "merge_and_unload")
    base = model.get_base_model() if adapted else model
    for module in base.modules():
        if isinstance(module, PackedLinear):
            module.to(torch.float32)  # what codes are unpacked to
    unpack_embedding_(base)
    if adapted:
        _untie_adapted_head_(base)
    within: set[nn.Module] = set()  # linears below adapters, which come with these
    for module in list(base.modules()):
        if module in within:
            continue
        linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if isinstance(linear, PackedLinear):
            linear.become_dense_()
        elif not isinstance(module, LoraLayer):
            continue
        if isinstance(module, LoraLayer):
            within.add(linear)
            hold_in_(linear, torch.float32)
            module.merge()
        done(hold_in_(linear, dtype))
    return hold_in_(model.unload() if adapted else base, dtype)


def _untie_adapted_head_(base: Any) -> None:
    """Gives a head that has adapters a weight of its own; the embedding, which has none of them, keeps the tied one."""
    head = base.get_output_embeddings()
    if base.config.tie_word_embeddings and hasattr(head, "base_layer"):
        linear = head.get_base_layer()
        if isinstance(linear, PackedLinear):
            linear.become_dense_()
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
