"""Takes units out of a model: the weights become smaller, nothing is masked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import Coupled, architecture_of, decoder_blocks, decoder_layers, family_of
from qpruner.errors import UserError
from qpruner.plan import Architecture, CompressionPlan, describe_differences
from qpruner.pruning.widths import set_config, with_widths
from qpruner.quantization.formats import dequantize, narrowed
from qpruner.quantization.packed import PackedLinear


def apply_pruning_(model: Any, plan: CompressionPlan) -> None:
    """Takes out of a dense model, in place, what its plan does not keep.

    Raises:
        UserError: the model has not the shape that the plan was made for, by its configuration or by its weights.
    """
    for found in (architecture_of(model.config), stated_by_weights(model)):
        if differences := describe_differences(plan.architecture, found):
            raise UserError(f"The plan does not fit the model: {differences}.")
    narrow_(model, [(layer.kv_groups, layer.ffn_channels) for layer in plan.layers])


def narrow_(model: Any, kept: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, float]:
    """Keeps only some of the units of each layer, in place; configuration and weights follow.

    Rows of q, k, v, gate and up go with their biases; o and down lose columns, so their biases stay. Norms of q and k
    (Qwen3) belong to every head alike and stay. Packed linears stay packed; where their scales run across what goes,
    the rest is rounded anew.

    Args:
        model: causal language model of a supported family, without adapters, on any device, also meta.
        kept: [layers], places of the kept KV groups and FFN channels.

    Returns:
        Of each linear that was rounded anew, by ``layer.projection``, the norm of the change over that of the weight.
    """
    _, family = family_of(model.config)
    rounded: dict[str, float] = {}
    for number, (block, layer) in enumerate(zip(decoder_blocks(model), decoder_layers(model), strict=True)):
        groups, channels = kept[number]
        for parts, units in ((layer.group_weights, groups), (layer.channel_weights, channels)):
            for coupled in parts:
                if len(units) == coupled.num_units:
                    continue
                if not isinstance(coupled.linear, PackedLinear):
                    keep_units_(coupled, units)
                    continue
                packed, change = _keep_packed(coupled, coupled.linear, units)
                block.set_submodule(family.projections[coupled.name], packed)
                if change:
                    rounded[f"{number}.{coupled.name}"] = change
    set_config(model, with_widths(model.config, stated_by_weights(model)))
    return rounded


def keep_units_(coupled: Coupled, units: Sequence[int]) -> None:
    """Slices a dense linear, in place, to the rows or columns of some units."""
    linear = coupled.linear
    index = places_of(coupled, units).to(linear.weight.device)
    linear.weight = _sliced(linear.weight, coupled.axis, index)
    if coupled.axis == 0 and linear.bias is not None:
        linear.bias = _sliced(linear.bias, 0, index)
    linear.out_features, linear.in_features = linear.weight.shape


def places_of(coupled: Coupled, units: Sequence[int]) -> Tensor:
    """The rows or columns of a weight that some units own."""  # [units * width]
    return (torch.tensor(units)[:, None] * coupled.width + torch.arange(coupled.width)).flatten()


def _keep_packed(coupled: Coupled, linear: PackedLinear, units: Sequence[int]) -> tuple[PackedLinear, float]:
    """The rows or columns of some units of a packed linear, and the relative change by rounding them anew."""
    index = places_of(coupled, units).to(linear.packed()["codes"].device)
    packed = narrowed(linear, coupled.axis, index)
    before = dequantize(linear).index_select(coupled.axis, index)
    return packed, float((dequantize(packed) - before).norm() / before.norm().clamp(min=torch.finfo().tiny))


def _sliced(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, index), requires_grad=parameter.requires_grad)


def narrow_factors(
    model: Any, factors: Mapping[str, tuple[Tensor, Tensor]], kept: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters of a model that keeps only some of its units.

    Args:
        model: before it is narrowed.
        factors: A [r, in] and B [out, r] of adapters, by the name of their linear; other linears' stay as they are.
        kept: [layers], places of the kept KV groups and FFN channels.
    """
    _, family = family_of(model.config)
    narrower = dict(factors)
    for number, layer in enumerate(decoder_layers(model)):
        groups, channels = kept[number]
        for parts, units in ((layer.group_weights, groups), (layer.channel_weights, channels)):
            for coupled in parts:
                name = f"{family.layers}.{number}.{family.projections[coupled.name]}"
                if name in factors:
                    lora_A, lora_B = factors[name]
                    index = places_of(coupled, units).to(lora_A.device)
                    narrower[name] = (lora_A, lora_B[index]) if coupled.axis == 0 else (lora_A[:, index], lora_B)
    return narrower


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
