"""The decoder layers of a model: their projections, their removable units, and their widths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qpruner.anatomy.coupled import Coupled, WideNorm, by_linear
from qpruner.anatomy.families import FAMILIES, Width, family_of
from qpruner.plan import Architecture

MEMBERS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The projections of each quantization unit."""


def unit_linears(model: nn.Module) -> list[dict[str, tuple[str, ...]]]:
    """The names of the linears of each quantization unit, layer by layer; fewer than projections where these are fused.

    Raises:
        UserError: an unsupported family.
    """  # [layers]
    _, family = family_of(model.config)
    num_layers = len(model.get_submodule(family.layers))  # type: ignore[arg-type]
    return [
        {
            unit: tuple(f"{family.layers}.{number}.{family.projections[first]}" for first, *_ in family.fused(names))
            for unit, names in MEMBERS.items()
        }
        for number in range(num_layers)
    ]


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer's projections, and its removable units.

    A KV group is a key-value head with the query heads that read it; an FFN channel is a row of gate and up with a
    column of down. With multi-head attention a group is one head, with multi-query attention there is one group.
    Projections that are stacked in one linear are the same module here.

    Args:
        head_dim: channels of a head.
        queries_per_group: query heads to a key-value head.
        gate: linear of the gate; None in an MLP without one.
        q_norm: norm over all query heads; None without one.
        k_norm: norm over all key heads; None without one.
    """

    head_dim: int
    queries_per_group: int
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    @property
    def kv_groups(self) -> int:
        return self.o.in_features // (self.queries_per_group * self.head_dim)

    @property
    def ffn_channels(self) -> int:
        return self.down.in_features

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Each linear once, by the projections in it, such as ``q`` or ``q_k_v``."""
        stacks = by_linear((*self.group_weights, *self.channel_weights))
        return {"_".join(part.name for part in stack): stack[0].linear for stack in stacks}

    @property
    def group_weights(self) -> tuple[Coupled, ...]:
        """What a KV group owns."""
        queries = self.queries_per_group * self.head_dim
        rows = self._rows({"q": queries, "k": self.head_dim, "v": self.head_dim}, self.kv_groups)
        return *rows, Coupled("o", self.o, 1, queries, self.kv_groups)

    @property
    def channel_weights(self) -> tuple[Coupled, ...]:
        """What an FFN channel owns."""
        rows = self._rows({"gate": 1, "up": 1}, self.ffn_channels)
        return *rows, Coupled("down", self.down, 1, 1, self.ffn_channels)

    @property
    def wide_norms(self) -> tuple[WideNorm, ...]:
        """The norms over all heads, which narrow with them."""
        norms = {"q": self.q_norm, "k": self.k_norm}
        return tuple(WideNorm(norm, part) for part in self.group_weights if (norm := norms.get(part.name)) is not None)

    def _rows(self, widths: Mapping[str, int], num_units: int) -> list[Coupled]:
        """Projections that make units, each a block of rows below those that are stacked above it."""
        below: dict[int, int] = {}
        parts = []
        for name, width in widths.items():
            if (linear := getattr(self, name)) is not None:
                start = below.get(id(linear), 0)
                parts.append(Coupled(name, linear, 0, width, num_units, start))
                below[id(linear)] = start + num_units * width
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
    config: Any = model.config
    _, family = family_of(config)
    paths = {**family.projections, **{f"{name}_norm": path for name, path in family.wide_norms.items()}}
    blocks: list[Any] = [*decoder_blocks(model)]
    return [
        DecoderLayer(*head_shape(config), **{name: block.get_submodule(path) for name, path in paths.items()})
        for block in blocks
    ]


def head_shape(config: Any) -> tuple[int, int]:
    """Channels of a head, and query heads to a key-value head; neither changes when groups are removed."""
    first = config.per_layer_config[0]
    head_dim = getattr(first, "head_dim", None) or first.hidden_size // first.num_attention_heads
    return head_dim, first.num_attention_heads // _kv_groups(first)


def architecture_of(config: Any) -> Architecture:
    """The widths that a configuration states.

    Raises:
        UserError: an unsupported family.
    """
    name, _ = family_of(config)
    head_dim, queries_per_group = head_shape(config)
    layers = list(config.per_layer_config)
    return Architecture(
        model_type=name,
        hidden_size=config.hidden_size,
        head_dim=head_dim,
        queries_per_group=queries_per_group,
        kv_groups=tuple(_kv_groups(layer) for layer in layers),
        ffn_channels=tuple(_ffn_channels(layer) for layer in layers),
    )


def _kv_groups(layer_config: Any) -> int:
    field = family_of(layer_config)[1].groups_field
    number: int = getattr(layer_config, field or "num_attention_heads")
    return number


def _ffn_channels(layer_config: Any) -> int:
    number: int | None = getattr(layer_config, family_of(layer_config)[1].channels_field)
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
    }


def unit_shapes(widths: Architecture, layer: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Shapes [out, in] of the weights of each quantization unit of a layer."""
    family = FAMILIES[widths.model_type]
    hidden, channels = widths.hidden_size, widths.ffn_channels[layer]
    keys = widths.kv_groups[layer] * widths.head_dim
    queries = keys * widths.queries_per_group
    rows = {"q": queries, "k": keys, "v": keys, "o": hidden, "gate": channels, "up": channels, "down": hidden}
    inputs = {"o": queries, "down": channels}
    return {
        unit: tuple((sum(rows[name] for name in stack), inputs.get(stack[0], hidden)) for stack in family.fused(names))
        for unit, names in MEMBERS.items()
    }


def unit_parameters(layer: DecoderLayer) -> tuple[int, int]:
    """Parameters that go with one KV group, and with one FFN channel, biases and norms over all heads included."""

    def count(weights: tuple[Coupled, ...]) -> int:
        return sum(
            c.width * ((c.linear.in_features if c.axis == 0 else c.linear.out_features) + _has_unit_bias(c))
            for c in weights
        )

    of_norms = sum(norm.of.width for norm in layer.wide_norms)
    return count(layer.group_weights) + of_norms, count(layer.channel_weights)


def _has_unit_bias(coupled: Coupled) -> bool:
    return coupled.axis == 0 and coupled.linear.bias is not None


def num_linear_parameters(model: nn.Module) -> int:
    """Parameters of the decoder's projections, biases included; of packed ones, as many as they stand for."""
    return sum(
        linear.out_features * linear.in_features + (0 if linear.bias is None else linear.bias.numel())
        for layer in decoder_layers(model)
        for linear in layer.linears.values()
    )
