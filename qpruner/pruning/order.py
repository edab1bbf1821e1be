"""The order of the residual stream's channels: permuting them leaves what a model computes unchanged.

Whatever reads a token's hidden states either normalizes them, which depends on the order only through the norm's own
weight, or takes products with each of them; whatever writes them writes each channel with one row. Applying one
permutation to all embedding tables, norms, input columns and output rows therefore changes no logit, and the channels
that matter most can be put first, where a packed linear holds them in more bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import decoder_blocks, decoder_layers, family_of
from qpruner.errors import UserError, listed
from qpruner.offload import opened
from qpruner.quantization.packed import PackedLinear


def reorder_hidden_(model: Any, places: Sequence[int]) -> None:
    """Permutes the channels of the residual stream, in place; each parameter that changes is replaced by a new one.

    Args:
        model: causal language model of a supported family, dense and without adapters, on any device, also meta.
        places: [hidden_size], current index of each channel, in the new order.

    Raises:
        UserError: the model has packed weights, whose columns share scales, or parameters that the family's anatomy
            does not describe.
    """
    _, family = family_of(model.config)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError(
            "The hidden channels of packed weights cannot be put into another order: columns share scales. Reorder the "
            "dense base and quantize it afterwards, or leave hidden null in the plan."
        )
    holders = list(_holders(model))
    known = {id(parameter) for module, _ in holders for parameter in module.parameters(recurse=False)}
    known |= {id(parameter) for parameter in _of_heads(model)}
    if others := [name for name, parameter in model.named_parameters() if id(parameter) not in known]:
        raise UserError(
            f"The hidden channels of this {model.config.model_type} cannot be put into another order: whether "
            f"{listed(others)} would have to follow is not known. Leave hidden null in the plan; of joint, leave "
            f"out lifts."
        )
    index = torch.tensor(places)
    again: dict[int, nn.Parameter] = {}  # tied tables stay tied

    def permuted(parameter: nn.Parameter, axis: int) -> nn.Parameter:
        if id(parameter) not in again:
            taken = parameter.detach().index_select(axis, index.to(parameter.device))
            again[id(parameter)] = nn.Parameter(taken, requires_grad=parameter.requires_grad)
        return again[id(parameter)]

    for module, axis in holders:
        with opened(model, module):
            _permute_(module, axis, permuted)


def _permute_(module: nn.Module, axis: int, permuted: Callable[[nn.Parameter, int], nn.Parameter]) -> None:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is not None:
        module.weight = permuted(weight, axis)
    if bias is not None and axis == 0:  # of a linear that writes the hidden states, or of a norm
        module.bias = permuted(bias, 0)


def _holders(model: Any) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose weights have an axis of hidden channels, and that axis; biases follow the rows."""
    _, family = family_of(model.config)
    for path in (family.embedding, family.positions, family.head):
        if path is not None:
            yield model.get_submodule(path), 1
    yield model.get_submodule(family.last_norm), 0
    for block, layer in zip(decoder_blocks(model), decoder_layers(model), strict=True):
        for path in family.layer_norms:
            yield block.get_submodule(path), 0
        for name, linear in layer.linears.items():
            yield linear, 0 if name.endswith(("o", "down")) else 1
        if layer.router is not None:
            yield layer.router, 1


def _of_heads(model: Any) -> Iterator[Tensor]:
    """The parameters that belong to heads, which the order of the hidden channels does not affect."""
    _, family = family_of(model.config)
    for block in decoder_blocks(model):
        for path in (*family.head_norms, *family.wide_norms.values()):
            yield from block.get_submodule(path).parameters()
        yield from (block.get_parameter(path) for path in family.head_entries)
