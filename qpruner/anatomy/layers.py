"""The decoder layers of a model: their projections, their removable units, and their widths."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qpruner.anatomy.coupled import Coupled, WideNorm, by_linear
from qpruner.anatomy.families import FAMILIES, Family, Width, family_of
from qpruner.architecture import Architecture, by_expert

MEMBERS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The projections of each quantization unit."""


def unit_linears(model: nn.Module) -> list[dict[str, tuple[str, ...]]]:
    """The names of the linears of each quantization unit, by layer; fewer than its projections where some are fused.

    Raises:
        UserError: an unsupported family.
    """  # [layers]
    _, family = family_of(model.config)
    return [
        {
            unit: tuple(f"{family.layers}.{number}.{path}" for path in paths)
            for unit, paths in unit_paths(family, num_experts(family, block)).items()
        }
        for number, block in enumerate(decoder_blocks(model))
    ]


def unit_paths(family: Family, experts: int) -> dict[str, tuple[str, ...]]:
    """The paths in a layer to the linears of each quantization unit, those of one expert after the other.

    Args:
        family: anatomy of the layer.
        experts: number of the layer's experts; 0 where it has a plain FFN.
    """

    def paths(names: tuple[str, ...]) -> Iterator[str]:
        if experts and names[0] not in ("q", "o"):
            for number in range(experts):
                yield from (family.path(f"experts.{number}.{name}") for name in names)
        else:
            yield from (family.projections[first] for first, *_ in family.fused(names))

    return {unit: tuple(paths(names)) for unit, names in MEMBERS.items()}


def num_experts(family: Family, block: nn.Module) -> int:
    """Number of experts of a layer; 0 where it has a plain FFN."""
    if family.mixture is None or not has_module(block, family.mixture.path):
        return 0
    experts: Any = block.get_submodule(family.mixture.path)
    return len(experts)


def has_module(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule at a dotted path, such as a router, which only some layers may have."""
    for name in path.split("."):
        if name not in module._modules:
            return False
        module = module.get_submodule(name)
    return True


@dataclass(frozen=True)
class FeedForward:
    """The linears of an FFN, or of one expert of a mixture.

    Args:
        up: linear of the intermediate channels.
        down: linear back to the hidden size.
        gate: linear of the gate; None in an MLP without one.
    """

    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """The projections of one decoder layer, and its removable units.

    A KV group is a key-value head with the query heads that read it; an FFN channel is a row of gate and up with a
    column of down. With multi-head attention, a group is one head; with multi-query attention, there is one group.
    Projections that are stacked in one linear are the same module here. The channels of a mixture of experts are
    counted through all of its experts, which are equally wide; the parts of an expert are called ``experts.3.down``.

    Args:
        head_dim: number of channels of a head.
        queries_per_group: number of query heads per key-value head.
        ffns: linears of the FFN, or of each expert.
        router: module that routes tokens to experts; None in a layer with a plain FFN.
        q_norm: norm over all query heads; None without one.
        k_norm: norm over all key heads; None without one.
        head_entries: parameters with an entry for each query head.
    """

    head_dim: int
    queries_per_group: int
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    ffns: tuple[FeedForward, ...]
    router: nn.Module | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    head_entries: tuple[nn.Parameter, ...] = ()

    @property
    def kv_groups(self) -> int:
        return self.o.in_features // (self.queries_per_group * self.head_dim)

    @property
    def ffn_channels(self) -> int:
        return len(self.ffns) * self.channels_of_each

    @property
    def channels_of_each(self) -> int:
        """Number of FFN channels, or of those of each expert."""
        return self.ffns[0].down.in_features

    @property
    def experts(self) -> int:
        """Number of experts; 0 where there is a plain FFN."""
        return 0 if self.router is None else len(self.ffns)

    @property
    def up(self) -> nn.Linear:
        return self._only.up

    @property
    def down(self) -> nn.Linear:
        return self._only.down

    @property
    def gate(self) -> nn.Linear | None:
        return self._only.gate

    @property
    def _only(self) -> FeedForward:
        assert self.router is None, "experts have a down each"
        return self.ffns[0]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Each linear once, by the projections in it, such as ``q`` or ``q_k_v``."""
        stacks = by_linear((*self.group_weights, *self.channel_weights))
        return {"_".join(part.name for part in stack): stack[0].linear for stack in stacks}

    @property
    def group_weights(self) -> tuple[Coupled, ...]:
        """The coupled weights of KV groups."""
        queries = self.queries_per_group * self.head_dim
        linears = {"q": self.q, "k": self.k, "v": self.v}
        rows = _rows(linears, {"q": queries, "k": self.head_dim, "v": self.head_dim}, self.kv_groups)
        return *rows, Coupled("o", self.o, 1, queries, self.kv_groups)

    @property
    def channel_weights(self) -> tuple[Coupled, ...]:
        """The coupled weights of FFN channels, one expert after the other."""
        return tuple(part for parts in self.channel_weights_of_each for part in parts)

    @property
    def channel_weights_of_each(self) -> tuple[tuple[Coupled, ...], ...]:
        """The coupled weights of the channels of the FFN, or of each expert, with units counted within the expert."""
        of_each = []
        for number, ffn in enumerate(self.ffns):
            before = "" if self.router is None else f"experts.{number}."
            channels = ffn.down.in_features
            linears = {f"{before}{name}": linear for name in ("gate", "up") if (linear := getattr(ffn, name))}
            rows = _rows(linears, dict.fromkeys(linears, 1), channels)
            of_each.append((*rows, Coupled(f"{before}down", ffn.down, 1, 1, channels)))
        return tuple(of_each)

    def channels_by_ffn(self, channels: Sequence[int]) -> dict[int, Sequence[int]]:
        """Some FFN channels by the index of their expert, counted from its first channel, in the order given.

        Those of a plain FFN all have index 0.
        """
        if self.router is None:
            return {0: channels}
        return {**by_expert(channels, self.channels_of_each)}

    @property
    def outputs(self) -> tuple[Coupled, ...]:
        """The projections whose columns belong to units: o, and the down of the FFN or of each expert."""
        return self.group_weights[-1], *(parts[-1] for parts in self.channel_weights_of_each)

    @property
    def wide_norms(self) -> tuple[WideNorm, ...]:
        """The norms over all heads, which narrow along with the heads."""
        norms = {"q": self.q_norm, "k": self.k_norm}
        return tuple(WideNorm(norm, part) for part in self.group_weights if (norm := norms.get(part.name)) is not None)


def _rows(linears: Mapping[str, nn.Linear], widths: Mapping[str, int], num_units: int) -> list[Coupled]:
    """The projections whose rows belong to units, each a block of rows below those that are stacked above it."""
    below: dict[int, int] = {}
    parts = []
    for name, linear in linears.items():
        start = below.get(id(linear), 0)
        parts.append(Coupled(name, linear, 0, widths[name], num_units, start))
        below[id(linear)] = start + num_units * widths[name]
    return parts


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are the decoder layers of a causal language model, in order.

    Raises:
        UserError: an unsupported family.
    """
    _, family = family_of(model.config)
    blocks: Any = model.get_submodule(family.layers)
    return list(blocks)


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of a causal language model, in order.

    Raises:
        UserError: an unsupported family.
    """
    _, family = family_of(model.config)
    shape = head_shape(model.config)
    return [_decoder_layer(family, shape, block) for block in decoder_blocks(model)]


def _decoder_layer(family: Family, shape: tuple[int, int], block: Any) -> DecoderLayer:
    attention = {name: family.projections[name] for name in ("q", "k", "v", "o")}
    norms = {f"{name}_norm": path for name, path in family.wide_norms.items()}
    experts = num_experts(family, block)
    ffns = (
        [
            {name: family.path(f"experts.{number}.{name}") for name in ("gate", "up", "down")}
            for number in range(experts)
        ]
        if experts
        else [{name: path for name, path in family.projections.items() if name in ("gate", "up", "down")}]
    )
    router = family.mixture.router if experts and family.mixture is not None else None
    return DecoderLayer(
        *shape,
        ffns=tuple(FeedForward(**{name: block.get_submodule(path) for name, path in ffn.items()}) for ffn in ffns),
        router=None if router is None else block.get_submodule(router),
        head_entries=tuple(block.get_parameter(path) for path in family.head_entries),
        **{name: block.get_submodule(path) for name, path in (attention | norms).items()},
    )


def head_shape(config: Any) -> tuple[int, int]:
    """Channels of a head, and query heads per key-value head; neither changes when groups are removed."""
    first = config.per_layer_config[0]
    head_dim = getattr(first, "head_dim", None) or first.hidden_size // first.num_attention_heads
    return head_dim, first.num_attention_heads // _kv_groups(first)


def architecture_of(config: Any) -> Architecture:
    """The widths that a configuration states.

    Raises:
        UserError: an unsupported family.
    """
    name, family = family_of(config)
    head_dim, queries_per_group = head_shape(config)
    layers = list(config.per_layer_config)
    experts = [_experts(config, number, layer) for number, layer in enumerate(layers)]
    return Architecture(
        model_type=name,
        hidden_size=config.hidden_size,
        head_dim=head_dim,
        queries_per_group=queries_per_group,
        kv_groups=tuple(_kv_groups(layer) for layer in layers),
        ffn_channels=tuple(_ffn_channels(layer, number) for layer, number in zip(layers, experts, strict=True)),
        experts=() if family.mixture is None else tuple(experts),
        experts_per_token=0 if family.mixture is None else config.num_experts_per_tok,
    )


def _experts(config: Any, number: int, layer_config: Any) -> int:
    mixture = family_of(config)[1].mixture
    plain = number in (getattr(config, "mlp_only_layers", None) or ())  # only Qwen3-MoE has the two options
    if mixture is None or plain or (number + 1) % getattr(config, "decoder_sparse_step", 1):
        return 0
    count: int = getattr(layer_config, mixture.number_field)
    return count


def _kv_groups(layer_config: Any) -> int:
    field = family_of(layer_config)[1].groups_field
    number: int = getattr(layer_config, field or "num_attention_heads")
    return number


def _ffn_channels(layer_config: Any, experts: int) -> int:
    _, family = family_of(layer_config)
    if experts and family.mixture is not None:
        return experts * int(getattr(layer_config, family.mixture.channels_field))
    number: int | None = getattr(layer_config, family.channels_field)
    return 4 * int(layer_config.hidden_size) if number is None else number


def widths_of(layer: DecoderLayer) -> dict[Width, int]:
    """The widths of a layer, by the names that `Family.widths` gives them."""
    query_heads = layer.kv_groups * layer.queries_per_group
    return {
        "query_heads": query_heads,
        "kv_groups": layer.kv_groups,
        "query_channels": query_heads * layer.head_dim,
        "key_channels": layer.kv_groups * layer.head_dim,
        "ffn_channels": layer.ffn_channels,
        "experts": layer.experts,
    }


def unit_shapes(widths: Architecture, layer: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Shapes [out, in] of the weights of each quantization unit of a layer."""
    family = FAMILIES[widths.model_type]
    hidden, channels, experts = widths.hidden_size, widths.channels_of_each(layer), widths.num_experts(layer)
    keys = widths.kv_groups[layer] * widths.head_dim
    queries = keys * widths.queries_per_group
    rows = {"q": queries, "k": keys, "v": keys, "o": hidden, "gate": channels, "up": channels, "down": hidden}
    inputs = {"o": queries, "down": channels}

    def shapes(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
        if experts and names[0] not in ("q", "o"):
            return tuple((rows[name], inputs.get(name, hidden)) for name in names) * experts
        return tuple((sum(rows[name] for name in stack), inputs.get(stack[0], hidden)) for stack in family.fused(names))

    return {unit: shapes(names) for unit, names in MEMBERS.items()}


def unit_weights(widths: Architecture) -> int:
    """Number of weights in the quantization units of all layers.

    Without experts, it is the number of multiply-adds per token, too.
    """
    return sum(
        out_features * in_features
        for layer in range(widths.num_layers)
        for shapes in unit_shapes(widths, layer).values()
        for out_features, in_features in shapes
    )


def unit_parameters(layer: DecoderLayer) -> tuple[int, int]:
    """Numbers of parameters of one KV group and of one FFN channel, including biases and norms over all heads."""

    def count(weights: tuple[Coupled, ...]) -> int:
        return sum(
            c.width * ((c.linear.in_features if c.axis == 0 else c.linear.out_features) + _has_unit_bias(c))
            for c in weights
        )

    of_norms = sum(norm.of.width for norm in layer.wide_norms)
    of_entries = len(layer.head_entries) * layer.queries_per_group
    return count(layer.group_weights) + of_norms + of_entries, count(layer.channel_weights_of_each[0])


def expert_parameters(layer: DecoderLayer) -> int:
    """Number of parameters of one expert, including its row of the router."""
    ffn = layer.channel_weights_of_each[0]
    down = ffn[-1].linear
    of_router = 0 if layer.router is None else sum(p[0].numel() for p in layer.router.parameters(recurse=False))
    of_bias = 0 if down.bias is None else down.bias.numel()
    return layer.channels_of_each * unit_parameters(layer)[1] + of_bias + of_router


def _has_unit_bias(coupled: Coupled) -> bool:
    return coupled.axis == 0 and coupled.linear.bias is not None


def num_linear_parameters(model: nn.Module) -> int:
    """Number of parameters of the decoder's projections, including biases; packed ones count as if dense."""
    return sum(
        linear.out_features * linear.in_features + (0 if linear.bias is None else linear.bias.numel())
        for layer in decoder_layers(model)
        for linear in layer.linears.values()
    )
