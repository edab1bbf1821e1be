"""The table of supported model families, and the meaning of its entries.

To add a family whose layers hold ``self_attn`` with q, k, v and o projections and ``mlp`` with gate, up and down
projections, add an entry to `FAMILIES`:

    "llama": Family("LlamaForCausalLM", "LlamaConfig"),

and, where the family differs, set the fields of `Family` that say so: other names, norms and biases; projections that
are stacked in one linear (`fused`); norms over all heads (``wide_norms``); experts (``mixture``); widths that its
modules store (``widths``).
The tests run over the whole table; add a tiny configuration of the family to ``EXPLICIT`` in
``tests/support/families.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qpruner.errors import UserError

Width = Literal["query_heads", "kv_groups", "query_channels", "key_channels", "ffn_channels", "experts"]
"""A width of a layer: numbers of heads, FFN channels or experts, or the channels of its query or key heads."""

SEPARATE = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
BEFORE_EACH = ("input_layernorm", "post_attention_layernorm")
AROUND_EACH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def biased(attention: str | None = "attention_bias", mlp: str | None = "mlp_bias") -> dict[str, str | None]:
    """Biases on all projections, each kind as a field of the configuration says; always present where it is None."""
    return {**dict.fromkeys("qkvo", attention), **dict.fromkeys(("gate", "up", "down"), mlp)}


@dataclass(frozen=True)
class Mixture:
    """Where the experts of a family's layers are. Their linears are separate ones; see `qpruner.experts`.

    Args:
        router: path in a layer to the module that routes tokens to experts, with a row of its weight for each expert.
        names: names of an expert's linears: gate, up and down.
        number_field: field of the configuration that holds the number of experts.
        channels_field: field of the configuration that holds the number of an expert's FFN channels.
        path: path in a layer to the list of experts.
        biased_router: whether the router has a bias.
        stored_path: name of the block of router and experts in published checkpoints; None where it is the same as in
            the layer.
    """

    router: str
    number_field: str
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    channels_field: str = "intermediate_size"
    path: str = "mlp.experts"
    biased_router: bool = False
    stored_path: str | None = None

    @property
    def block(self) -> str:
        """Path in a layer to the block of router and experts."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's models are.

    Args:
        model_class: name in transformers of the causal language model.
        config_class: name in transformers of its configuration.
        layers: path from the model to its list of decoder layers.
        projections: path in a layer to the linear of each projection, in the order q, k, v, o, gate, up, down; gate may
            be missing. Projections with the same path are stacked in one linear, in this order, as blocks of rows.
        embedding: path to the token embedding.
        positions: path to the table of learned positions; None without one.
        rotary: path to the module that computes rotary position embeddings; None without one.
        head: path to the linear that computes the logits.
        layer_norms: path in a layer to each norm over the hidden size.
        head_norms: path in a layer to each norm over one head. Such norms are shared by all heads.
        wide_norms: path in a layer to the norm over all heads of a projection's output, by projection.
        head_entries: path in a layer to each parameter with an entry for every query head.
        mixture: where the experts of its layers are; None where layers have none. Where the configuration says so, a
            layer has a plain FFN all the same, at the paths of ``projections``.
        normed_outputs: whether the outputs of o and down are normalized before they are added to the residual stream.
        last_norm: path to the norm before the head.
        norm: name of the torch class whose parameters the norms over the hidden size have.
        biases: field of the configuration that says whether a projection has a bias, by projection; None where it
            always has one. Projections that are not named have none.
        groups_field: field of the configuration that holds the number of key-value heads; None where there are as many
            as query heads.
        channels_field: field of the configuration that holds the number of FFN channels, which are four times the
            hidden size where it is None.
        free_heads: whether transformers' modules allow heads whose channels do not add up to the hidden size.
        widths: width that an attribute of a module in a layer stores, by path.
        reads_config: path in a layer to each module that reads its widths from its configuration in the forward pass.
    """

    model_class: str
    config_class: str
    layers: str = "model.layers"
    projections: Mapping[str, str] = field(default_factory=lambda: SEPARATE)
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    rotary: str | None = "model.rotary_emb"
    head: str = "lm_head"
    layer_norms: tuple[str, ...] = BEFORE_EACH
    head_norms: tuple[str, ...] = ()
    wide_norms: Mapping[str, str] = field(default_factory=dict)
    head_entries: tuple[str, ...] = ()
    mixture: Mixture | None = None
    normed_outputs: bool = False
    last_norm: str = "model.norm"
    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    biases: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys("qkvo", "attention_bias"))
    groups_field: str | None = "num_key_value_heads"
    channels_field: str = "intermediate_size"
    free_heads: bool = True
    widths: Mapping[str, Width] = field(default_factory=dict)
    reads_config: tuple[str, ...] = ()

    def path(self, name: str) -> str:
        """Path in a layer to the linear of a projection, such as ``q``, or ``experts.3.down`` of the fourth expert."""
        kind, _, of_expert = name.partition(".")
        if self.mixture is None or kind != "experts":
            return self.projections[name]
        number, projection = of_expert.split(".")
        names = dict(zip(("gate", "up", "down"), self.mixture.names, strict=True))
        return f"{self.mixture.path}.{number}.{names[projection]}"

    def fused(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The projections, grouped by the linear in which they are stacked; missing ones are left out."""
        by_path: dict[str, tuple[str, ...]] = {}
        for name in names:
            if path := self.projections.get(name):
                by_path[path] = (*by_path.get(path, ()), name)
        return list(by_path.values())


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", biases=biased()),
    "mistral": Family("MistralForCausalLM", "MistralConfig", biases={}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", biases=dict.fromkeys("qkv")),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig"),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", layer_norms=AROUND_EACH, normed_outputs=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        layer_norms=AROUND_EACH,
        normed_outputs=True,
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", biases=biased()),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config", biases=biased()),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "Olmo2Config",
        layer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        normed_outputs=True,
        wide_norms={"q": "self_attn.q_norm", "k": "self_attn.k_norm"},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        biases={},
        mixture=Mixture("mlp.gate", "num_local_experts", ("w1", "w3", "w2"), stored_path="block_sparse_moe"),
        widths={"mlp.gate.num_experts": "experts"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        mixture=Mixture("mlp.gate", "num_local_experts", channels_field="moe_intermediate_size"),
        widths={"mlp.gate.num_experts": "experts"},
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        wide_norms={"q": "self_attn.q_norm", "k": "self_attn.k_norm"},
        mixture=Mixture("mlp.gate", "num_experts"),
        free_heads=False,
        widths={"mlp.gate.num_experts": "experts"},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        biases={**dict.fromkeys("qkvo", "attention_bias"), **dict.fromkeys(("gate", "up", "down"))},
        head_entries=("self_attn.sinks",),
        mixture=Mixture("mlp.router", "num_local_experts", biased_router=True),
        widths={"mlp.router.num_experts": "experts"},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        projections={
            **dict.fromkeys("qkv", "self_attn.qkv_proj"),
            "o": "self_attn.o_proj",
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
            "down": "mlp.down_proj",
        },
        biases={},
        widths={"self_attn.num_key_value_heads": "kv_groups"},
        reads_config=("self_attn",),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        layers="transformer.h",
        projections={
            **dict.fromkeys("qkv", "attn.c_attn"),
            **{"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        },
        embedding="transformer.wte",
        positions="transformer.wpe",
        rotary=None,
        layer_norms=("ln_1", "ln_2"),
        last_norm="transformer.ln_f",
        norm="LayerNorm",
        biases=biased(None, None),
        groups_field=None,
        channels_field="n_inner",
        free_heads=False,
        widths={"attn.num_heads": "query_heads", "attn.split_size": "query_channels"},
    ),
}
"""The families whose layers can be pruned, by the ``model_type`` of their configuration."""

COMPRESSED = "compressed_"
"""Prefix of the ``model_type`` of a model that transformers alone cannot build."""


def is_compressible(config: Any) -> bool:
    """Whether a model belongs to a family that can be pruned and quantized, according to its configuration."""
    name: str = config.model_type
    return name.removeprefix(COMPRESSED) in FAMILIES


def learned_positions(config: Any) -> int | None:
    """Number of positions in a model's table of them; None where it has no such table, or is of an unknown family."""
    family = FAMILIES.get(config.model_type.removeprefix(COMPRESSED))
    if family is None or family.positions is None:
        return None
    number: int = config.max_position_embeddings
    return number


def refuse_experts(config: Any, what: str, remedy: str) -> None:
    """Makes sure that the layers of a model have no experts.

    Args:
        config: configuration of the model.
        what: what cannot be done to experts, as the start of the message.
        remedy: what to use instead.

    Raises:
        UserError: the layers have experts.
    """
    name = config.model_type.removeprefix(COMPRESSED)
    if name in FAMILIES and FAMILIES[name].mixture is not None:
        raise UserError(f"{what} does not work on mixtures of experts, as {name} is. Use {remedy}.")


def family_of(config: Any) -> tuple[str, Family]:
    """Name and anatomy of the family of a model's configuration.

    Raises:
        UserError: an unsupported family.
    """
    name = config.model_type.removeprefix(COMPRESSED)
    if name not in FAMILIES:
        raise UserError(
            f"Models of type {config.model_type!r} cannot be pruned; {', '.join(FAMILIES)} can. "
            f"A family is added in qpruner/anatomy/families.py."
        )
    return name, FAMILIES[name]
