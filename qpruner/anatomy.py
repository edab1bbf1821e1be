"""What a decoder layer is made of, for each model family: the only place that knows a family's names.

To add a family whose layers hold ``self_attn`` with q, k, v and o projections and ``mlp`` with gate, up and down
projections, add its line to `FAMILIES`; for other names, norms and biases give the line those, too. Norms of q and k
must be over one head, as in Qwen3: such norms belong to every head alike and need no narrowing. Norms over all heads
(OLMo2) and fused projections (Phi-3) are not provided for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qpruner.errors import UserError
from qpruner.plan import Architecture


@dataclass(frozen=True)
class Family:
    """Where a family's parts are.

    Args:
        model_class: name in transformers of the causal language model.
        config_class: name in transformers of its configuration.
        layers: path from the model to its list of decoder layers.
        projections: path in a layer to each projection.
        embedding: path to the token embedding.
        head: path to the linear that makes logits.
        layer_norms: path in a layer to each norm over the hidden size.
        head_norms: path in a layer to each norm over one head.
        last_norm: path to the norm before the head.
        biases: field of the configuration that says whether a projection has a bias, by projection; None where it has
            one always. Projections that are not named have none.
    """

    model_class: str
    config_class: str
    layers: str = "model.layers"
    projections: dict[str, str] = field(
        default_factory=lambda: {
            **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
            **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        }
    )
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    last_norm: str = "model.norm"
    biases: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys("qkvo", "attention_bias"))


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        biases=dict.fromkeys("qkvo", "attention_bias") | dict.fromkeys(("gate", "up", "down"), "mlp_bias"),
    ),
    "mistral": Family("MistralForCausalLM", "MistralConfig", biases={}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", biases=dict.fromkeys("qkv")),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        layer_norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
}
"""The families whose layers can be pruned, by the ``model_type`` of their configuration."""

COMPRESSED = "compressed_"
"""What the ``model_type`` of a model begins with when transformers alone cannot make it."""


def family_of(config: Any) -> tuple[str, Family]:
    """Name and anatomy of the family of a model's configuration.

    Raises:
        UserError: an unsupported family.
    """
    name = config.model_type.removeprefix(COMPRESSED)
    if name not in FAMILIES:
        raise UserError(
            f"Models of type {config.model_type!r} cannot be pruned; {', '.join(FAMILIES)} can. "
            f"A family is added in qpruner/anatomy.py."
        )
    return name, FAMILIES[name]


def unit_linears(model: nn.Module) -> list[dict[str, tuple[str, ...]]]:
    """The names of the linears of each quantization unit, layer by layer.

    Raises:
        UserError: an unsupported family.
    """  # [layers]
    _, family = family_of(model.config)
    members = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
    num_layers = len(model.get_submodule(family.layers))  # type: ignore[arg-type]
    return [
        {
            unit: tuple(f"{family.layers}.{number}.{family.projections[name]}" for name in names)
            for unit, names in members.items()
        }
        for number in range(num_layers)
    ]


@dataclass(frozen=True)
class Coupled:
    """The part of a projection's weight that belongs to one kind of unit.

    Unit u owns the rows (``axis`` 0) or columns (``axis`` 1) from ``u * width`` to ``(u + 1) * width``. The linear may
    be packed, or have an adapter around it.
    """

    name: str
    linear: nn.Linear
    axis: int
    width: int

    @property
    def num_units(self) -> int:
        return (self.linear.out_features, self.linear.in_features)[self.axis] // self.width

    def by_unit(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the weight's shape, or of its bias, with the units along the first axis."""  # [units, ...]
        values = values.movedim(self.axis if values.ndim > 1 else 0, 0)
        return values.reshape(-1, self.width, *values.shape[1:])


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer's projections, and its removable units.

    A KV group is a key-value head with the query heads that read it; an FFN channel is a row of gate and up with a
    column of down. With multi-head attention a group is one head, with multi-query attention there is one group.
    """

    head_dim: int
    queries_per_group: int
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def kv_groups(self) -> int:
        return self.k.out_features // self.head_dim

    @property
    def ffn_channels(self) -> int:
        return self.down.in_features

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {name: getattr(self, name) for name in ("q", "k", "v", "o", "gate", "up", "down")}

    @property
    def group_weights(self) -> tuple[Coupled, ...]:
        """What a KV group owns."""
        queries = self.queries_per_group * self.head_dim
        return (
            Coupled("q", self.q, 0, queries),
            Coupled("k", self.k, 0, self.head_dim),
            Coupled("v", self.v, 0, self.head_dim),
            Coupled("o", self.o, 1, queries),
        )

    @property
    def channel_weights(self) -> tuple[Coupled, ...]:
        """What an FFN channel owns."""
        return Coupled("gate", self.gate, 0, 1), Coupled("up", self.up, 0, 1), Coupled("down", self.down, 1, 1)


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
    head_dim, queries_per_group = head_shape(config)
    blocks: list[Any] = [*decoder_blocks(model)]
    return [
        DecoderLayer(
            head_dim,
            queries_per_group,
            **{name: layer.get_submodule(path) for name, path in family.projections.items()},
        )
        for layer in blocks
    ]


def head_shape(config: Any) -> tuple[int, int]:
    """Channels of a head, and query heads to a key-value head; neither changes when groups are removed."""
    first = config.per_layer_config[0]
    head_dim = getattr(first, "head_dim", None) or first.hidden_size // first.num_attention_heads
    return head_dim, first.num_attention_heads // first.num_key_value_heads


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
        kv_groups=tuple(layer.num_key_value_heads for layer in layers),
        ffn_channels=tuple(layer.intermediate_size for layer in layers),
    )


def unit_parameters(layer: DecoderLayer) -> tuple[int, int]:
    """Parameters that go with one KV group, and with one FFN channel, biases included."""

    def count(weights: tuple[Coupled, ...]) -> int:
        return sum(
            c.width * ((c.linear.in_features if c.axis == 0 else c.linear.out_features) + _has_unit_bias(c))
            for c in weights
        )

    return count(layer.group_weights), count(layer.channel_weights)


def _has_unit_bias(coupled: Coupled) -> bool:
    return coupled.axis == 0 and coupled.linear.bias is not None


def num_linear_parameters(model: nn.Module) -> int:
    """Parameters of the decoder's projections, biases included; of packed ones, as many as they stand for."""
    return sum(
        linear.out_features * linear.in_features + (0 if linear.bias is None else linear.bias.numel())
        for layer in decoder_layers(model)
        for linear in layer.linears.values()
    )
