"""Takes units out of a model: the weights become smaller, nothing is masked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import Coupled, architecture_of, decoder_layers
from qpruner.errors import UserError
from qpruner.plan import Architecture, CompressionPlan, describe_differences
from qpruner.pruning.widths import set_config, with_widths


def apply_pruning_(model: Any, plan: CompressionPlan) -> None:
    """Takes out of a dense model, in place, what its plan does not keep.

    Raises:
        UserError: the model has not the shape that the plan was made for, by its configuration or by its weights.
    """
    for found in (architecture_of(model.config), stated_by_weights(model)):
        if differences := describe_differences(plan.architecture, found):
            raise UserError(f"The plan does not fit the model: {differences}.")
    narrow_(model, [(layer.kv_groups, layer.ffn_channels) for layer in plan.layers])


def narrow_(model: Any, kept: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Keeps only some of the units of each layer, in place; configuration and weights follow.

    Rows of q, k, v, gate and up go with their biases; o and down lose columns, so their biases stay. Norms of q and k
    (Qwen3) belong to every head alike and stay.

    Args:
        model: causal language model of a supported family, on any device, also meta.
        kept: [layers], places of the kept KV groups and FFN channels.
    """
    for layer, (groups, channels) in zip(decoder_layers(model), kept, strict=True):
        for coupled in layer.group_weights:
            keep_units_(coupled, groups)
        for coupled in layer.channel_weights:
            keep_units_(coupled, channels)
    set_config(model, with_widths(model.config, stated_by_weights(model)))


def keep_units_(coupled: Coupled, units: Sequence[int]) -> None:
    """Slices a linear, in place, to the rows or columns of some units."""
    linear, width = coupled.linear, coupled.width
    if len(units) * width == linear.weight.shape[coupled.axis]:
        return
    index = (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten().to(linear.weight.device)
    linear.weight = _sliced(linear.weight, coupled.axis, index)
    if coupled.axis == 0 and linear.bias is not None:
        linear.bias = _sliced(linear.bias, 0, index)
    linear.out_features, linear.in_features = linear.weight.shape


def _sliced(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, index), requires_grad=parameter.requires_grad)


def stated_by_weights(model: Any) -> Architecture:
    """The widths that the weights have, whatever the configuration says."""
    stated = architecture_of(model.config)
    layers = decoder_layers(model)
    return Architecture(
        model_type=stated.model_type,
        hidden_size=layers[0].q.in_features,
        head_dim=stated.head_dim,
        queries_per_group=stated.queries_per_group,
        kv_groups=tuple(layer.kv_groups for layer in layers),
        ffn_channels=tuple(layer.ffn_channels for layer in layers),
    )
