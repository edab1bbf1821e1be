"""Removes units from a model and puts the remaining ones in order: weights become smaller, nothing is masked."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import (
    Coupled,
    DecoderLayer,
    Family,
    WideNorm,
    architecture_of,
    by_linear,
    decoder_blocks,
    decoder_layers,
    family_of,
)
from qpruner.anatomy.coupled import within
from qpruner.anatomy.families import Mixture
from qpruner.anatomy.layers import widths_of
from qpruner.errors import UserError
from qpruner.modeling_compressed import layer_config
from qpruner.offload import opened
from qpruner.plan import Architecture, CompressionPlan, describe_differences
from qpruner.pruning.order import reorder_hidden_
from qpruner.pruning.widths import set_config, with_widths
from qpruner.quantization.formats import dequantize, narrowed
from qpruner.quantization.packed import PackedLinear


def apply_pruning_(model: Any, plan: CompressionPlan) -> None:
    """Removes from a dense model, in place, whatever its plan does not keep, and puts the rest in the plan's order.

    Raises:
        UserError: the model does not have the shape that the plan was made for, by its configuration or by its weights,
            or its hidden channels cannot be reordered.
    """
    for actual in (architecture_of(model.config), stated_by_weights(model)):
        if differences := describe_differences(plan.architecture, actual):
            raise UserError(f"The plan does not fit the model: {differences}.")
    if plan.hidden is not None:
        reorder_hidden_(model, plan.hidden)
    narrow_(model, [(layer.kv_groups, layer.ffn_channels) for layer in plan.layers])


def narrow_(model: Any, kept: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, float]:
    """Keeps only some of the units of each layer, in the order given, in place; the configuration is updated, too.

    Rows of q, k, v, gate and up are removed with their biases; o and down lose columns, so their biases stay. Norms
    over one head (Qwen3) are shared by all heads and stay; those over all heads (OLMo2) are narrowed, see `norm_scale`.
    Packed linears stay packed; where a scale spans removed weights, the rest is requantized. An expert of which no
    channel is kept is removed with its row of the router.

    Args:
        model: causal language model of a supported family, without adapters, on any device, including meta.
        kept: [layers], indices of the kept KV groups and FFN channels, in the order that they are to have.

    Returns:
        Relative change of each linear that was requantized, by ``layer.projection``: norm of the change over norm of
        the weight.
    """
    _, family = family_of(model.config)
    rounded: dict[str, float] = {}
    for number, (block, layer) in enumerate(zip(decoder_blocks(model), decoder_layers(model), strict=True)):
        with opened(model, block):
            changes = _narrow_layer_(block, layer, family, kept[number])
        rounded |= {f"{number}.{projections}": change for projections, change in changes.items()}
    set_config(model, with_widths(model.config, stated_by_weights(model)))
    for number, (block, layer) in enumerate(zip(decoder_blocks(model), decoder_layers(model), strict=True)):
        widths = widths_of(layer)
        for path, width in family.widths.items():
            if not widths[width]:  # there are no experts
                continue
            owner, _, name = path.rpartition(".")
            setattr(block.get_submodule(owner), name, widths[width])
        for path in family.reads_config:
            reader: Any = block.get_submodule(path)
            reader.config = layer_config(model.config, number)
    # The rotary module reads a number of heads, without using it, when it rescales positions for long texts. An outline
    # of a model has no such module.
    if family.rotary is not None and family.rotary in dict(model.named_modules()):
        model.get_submodule(family.rotary).config = layer_config(model.config, 0)
    return rounded


def _narrow_layer_(
    block: nn.Module, layer: DecoderLayer, family: Family, kept: tuple[Sequence[int], Sequence[int]]
) -> dict[str, float]:
    """Keeps only some of the units of one layer; returns the relative change of each requantized linear."""
    groups, experts = kept[0], list(layer.channels_by_ffn(kept[1]))
    rounded: dict[str, float] = {}
    for norm in layer.wide_norms:
        if _changes(groups, norm.of.num_units):
            narrow_norm_(norm, groups)
    if _changes(groups, layer.kv_groups):
        index = within(groups, layer.queries_per_group)
        for path in family.head_entries:
            owner, _, name = path.rpartition(".")
            _keep_entries_(block.get_submodule(owner), name, index)
    for stack, units in _stacks(layer, kept):
        first = stack[0]
        if not _changes(units, first.num_units):
            continue
        if not isinstance(first.linear, PackedLinear):
            keep_units_(stack, units)
            continue
        packed, change = _keep_packed(stack, first.linear, units)
        block.set_submodule(family.path(first.name), packed)
        if change:
            rounded["_".join(part.name for part in stack)] = change
    if layer.router is not None and family.mixture is not None:
        _keep_experts_(block, family.mixture, layer.router, experts)
    return rounded


def _changes(units: Sequence[int], number: int) -> bool:
    """Whether any of a number of units are removed or reordered."""
    return tuple(units) != tuple(range(number))


def _stacks(
    layer: DecoderLayer, kept: tuple[Sequence[int], Sequence[int]]
) -> Iterator[tuple[list[Coupled], Sequence[int]]]:
    """The projections of each linear of a layer, and the units of their kind that are kept."""
    groups, channels = kept
    kinds: list[tuple[tuple[Coupled, ...], Sequence[int]]] = [(layer.group_weights, groups)]
    of_each = layer.channel_weights_of_each
    kinds += [(of_each[number], units) for number, units in layer.channels_by_ffn(channels).items()]
    for parts, units in kinds:
        for stack in by_linear(parts):
            yield stack, units


def _keep_experts_(block: nn.Module, mixture: Mixture, router: nn.Module, experts: Sequence[int]) -> None:
    """Keeps only some of the experts of a layer, in an order, with their rows of the router."""
    everyone: Any = block.get_submodule(mixture.path)
    if _changes(experts, len(everyone)):
        block.set_submodule(mixture.path, type(everyone)(everyone[number] for number in experts))
        for name, _ in list(router.named_parameters(recurse=False)):
            _keep_entries_(router, name, torch.tensor(experts))


def _keep_entries_(module: nn.Module, name: str, index: Tensor) -> None:
    parameter = module.get_parameter(name)
    setattr(module, name, _sliced(parameter, 0, index.to(parameter.device)))


def first_units(whole: Architecture, widths: Architecture) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The first units of each layer, as many as an architecture has: the first channels of the first experts.

    Args:
        whole: architecture whose units are counted, at least as wide.
        widths: numbers of units.
    """  # [layers]
    kept: list[tuple[Sequence[int], Sequence[int]]] = []
    for number, groups in enumerate(widths.kv_groups):
        channels, each = range(widths.channels_of_each(number)), whole.channels_of_each(number)
        starts = range(0, max(1, widths.num_experts(number)) * each, each)
        kept.append((range(groups), [start + channel for start in starts for channel in channels]))
    return kept


def keep_units_(stack: Sequence[Coupled], units: Sequence[int]) -> None:
    """Slices a dense linear, in place, to the rows or columns of some units.

    Args:
        stack: all projections that the linear holds.
        units: indices of the units that stay.
    """
    linear, axis = stack[0].linear, stack[0].axis
    index = places_of(stack, units).to(linear.weight.device)
    linear.weight = _sliced(linear.weight, axis, index)
    if axis == 0 and linear.bias is not None:
        linear.bias = _sliced(linear.bias, 0, index)
    linear.out_features, linear.in_features = linear.weight.shape


def places_of(stack: Sequence[Coupled], units: Sequence[int]) -> Tensor:
    """The indices of the rows or columns that the given units own, in all projections of a linear."""  # [places]
    return torch.cat([part.places(units) for part in stack])


def narrow_norm_(norm: WideNorm, units: Sequence[int]) -> None:
    """Slices a norm over all heads, in place, to some units, and rescales it; call it before its projection narrows."""
    weight: Any = norm.norm.weight
    scale = norm_scale(norm, units).to(weight.dtype)
    index = within(units, norm.of.width).to(weight.device)
    kept = _sliced(weight, 0, index)
    kept.data *= scale
    norm.norm.weight = kept


def norm_scale(norm: WideNorm, units: Sequence[int]) -> Tensor:
    """The factor that makes up for the change in the mean square of a norm over all heads when heads are removed.

    With S the sum of squares over all n channels and S' that over the n' that stay, the norm divided these by the root
    of S / n and will divide them by the root of S' / n', so its weight is multiplied by the ratio of the new root to
    the old one. The sums are those of the projection's outputs for inputs of equal size in all directions: the squares
    of its weights. Where the removed rows are zero, the factor is exactly the root of n / n' for every input, and
    nothing changes except the effect of the norm's epsilon, which counts n' / n times; where all rows are alike, it is
    1.

    Args:
        norm: norm over all heads, with its projection as it is before heads are removed, packed or not.
        units: indices of the units that stay.
    """  # []
    linear: Any = norm.of.linear
    linear = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
    weight = dequantize(linear) if isinstance(linear, PackedLinear) else linear.weight.detach()
    of_units = norm.of.by_unit(weight).flatten(1).double().square().mean(1)
    tiny = torch.finfo(torch.float64).tiny
    stay = of_units[torch.tensor(units, device=of_units.device)].mean()
    return ((stay + tiny) / (of_units.mean() + tiny)).sqrt()


def _keep_packed(stack: Sequence[Coupled], linear: PackedLinear, units: Sequence[int]) -> tuple[PackedLinear, float]:
    """The rows or columns of some units of a packed linear, and the relative change due to requantizing them."""
    axis, index = stack[0].axis, places_of(stack, units).to(linear.packed()["codes"].device)
    packed = narrowed(linear, axis, index)
    before = dequantize(linear).index_select(axis, index)
    return packed, float((dequantize(packed) - before).norm() / before.norm().clamp(min=torch.finfo().tiny))


def _sliced(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, index), requires_grad=parameter.requires_grad)


def narrow_factors(
    model: Any, factors: Mapping[str, tuple[Tensor, Tensor]], kept: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters of a model that keeps only some of its units.

    Args:
        model: model before it is narrowed.
        factors: A [r, in] and B [out, r] of adapters, by the name of their linear; those of other linears are
            unchanged.
        kept: [layers], indices of the kept KV groups and FFN channels.
    """
    _, family = family_of(model.config)
    narrower = dict(factors)
    for number, layer in enumerate(decoder_layers(model)):
        for stack, units in _stacks(layer, kept[number]):
            name = f"{family.layers}.{number}.{family.path(stack[0].name)}"
            if name in factors:
                lora_A, lora_B = factors[name]
                index = places_of(stack, units).to(lora_A.device)
                narrower[name] = (lora_A, lora_B[index]) if stack[0].axis == 0 else (lora_A[:, index], lora_B)
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
        experts=tuple(layer.experts for layer in layers) if stated.experts else (),
        experts_per_token=stated.experts_per_token,
    )
