"""Merges adapters into their base, which becomes dense.

The result is always dense: packing the merged weights into the formats of the base would round them a second time,
which costs more than the adapters gain.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qpruner.adapters.lora import Adapter, adapters_of, detach_adapters
from qpruner.anatomy import family_of
from qpruner.pretrained import hold_in_
from qpruner.quantization.embedding import unpack_embedding_
from qpruner.quantization.packed import PackedLinear


def merge_(model: Any, dtype: torch.dtype, done: Callable[[nn.Module], object] = lambda linear: None) -> Any:
    """Merges the adapters of a PEFT model into its weights, in place, and returns the dense model without PEFT.

    Args:
        model: PEFT model, or model of transformers without adapters; packed or not.
        dtype: dtype of the merged model.
        done: called with each linear that was packed or had an adapter, once it is dense.
    """
    if not hasattr(model, "peft_config"):
        return make_dense_(model, {}, dtype, done)
    adapters = adapters_of(model)
    return make_dense_(detach_adapters(model)[0], adapters, dtype, done)


def make_dense_(
    network: Any,
    adapters: Mapping[str, Adapter],
    dtype: torch.dtype,
    done: Callable[[nn.Module], object] = lambda linear: None,
) -> Any:
    """Makes a model dense, in place, with adapters added to its linears in float32, and returns it.

    Linears are made dense and rounded to ``dtype`` one by one, so that only one of them is in float32 at a time, beside
    an embedding that was packed. A tied head with an adapter becomes untied, and the embedding keeps its weight.

    Args:
        network: model of transformers without PEFT; packed or not.
        adapters: adapters by the name of their linear.
        dtype: dtype of the dense model.
        done: called with each linear that was packed or has an adapter, once it is dense.
    """
    for module in network.modules():
        if isinstance(module, PackedLinear):
            module.to(torch.float32)  # dtype that its codes are unpacked to
    unpack_embedding_(network)
    if network.config.tie_word_embeddings and family_of(network.config)[1].head in adapters:
        head = network.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        network.config.tie_word_embeddings = False
    for name, linear in list(network.named_modules()):
        adapter = adapters.get(name)
        if isinstance(linear, PackedLinear):
            linear.become_dense_()
        elif adapter is None:
            continue
        hold_in_(linear, torch.float32)
        if adapter is not None:
            linear.weight.data += adapter.product
        done(hold_in_(linear, dtype))
    return hold_in_(network, dtype)
