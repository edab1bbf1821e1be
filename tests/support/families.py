"""A tiny random model of every family that can be pruned, with nothing left at a value that would hide a mistake."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers

from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.anatomy import FAMILIES, architecture_of
from qpruner.conv1d import conv1d_to_linear_
from qpruner.experts import experts_to_linears_
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.quantization.apply import quantize_

HIDDEN, LAYERS, FFN, VOCAB = 64, 3, 48, 100
KEPT = [((0, 2, 3), (0, 1, *range(5, 40))), ((1,), tuple(range(3, 48, 2))), ((0, 1, 2, 3), (7,))]
"""A pruning of the default tiny model in which no two layers end equal."""
PLAIN = [family for family, anatomy in FAMILIES.items() if anatomy.mixture is None]
MIXTURES = [family for family in FAMILIES if family not in PLAIN]
"""Families whose layers have one FFN, and those whose layers have experts."""

QUICK = ("llama", "gemma2", "gpt2", "mixtral")
"""One family of each kind: of plain layers, of further norms, with biases and combined projections, of experts."""

EACH, TOP_K = 12, 2


def each_of(families: Iterable[str]) -> pytest.MarkDecorator:
    """One test for each family as ``family``; those beyond `QUICK` are left to ``make test-slow``."""
    marked = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in families]
    return pytest.mark.parametrize("family", marked)


def in_experts(places: dict[int, Any]) -> tuple[int, ...]:
    """FFN channels as plans count them, of places within each of some experts."""
    return tuple(expert * EACH + place for expert, of_expert in places.items() for place in of_expert)


KEPT_EXPERTS = [
    ((0, 2, 3), in_experts({0: (0, 3, 4, 11), 2: range(1, 5), 3: range(8, 12)})),
    ((1,), in_experts({1: range(EACH), 3: range(EACH)})),
    ((0, 1, 2, 3), in_experts({0: (7,), 1: (3,), 2: (0,), 3: (11,)})),
]
"""The like of `KEPT` for a mixture: of three experts a third, of two all channels, of four one each."""
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": TOP_K, "intermediate_size": EACH}
"""4 experts of 12 channels, 48 in all, as the other families have."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPLICIT: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "qwen2": {},  # 64 / 8 = 8
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {
        "head_dim": 16,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "smollm3": {**SPECIAL, "head_dim": 16, "no_rope_layers": [1, 0, 1]},
    "olmo2": {**SPECIAL, "head_dim": 16, "rms_norm_eps": 1e-8},
    "mixtral": {"head_dim": 16, "sliding_window": 8, **EXPERTS},
    "qwen3_moe": {
        **EXPERTS,
        "head_dim": 16,
        "intermediate_size": FFN,
        "moe_intermediate_size": EACH,
        "norm_topk_prob": True,
    },
    "olmoe": {**SPECIAL, **EXPERTS, "rms_norm_eps": 1e-8},  # 64 / 8 = 8
    "gpt_oss": {
        **EXPERTS,
        "head_dim": 16,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "phi3": {**SPECIAL, "head_dim": 16, "sliding_window": 8, "partial_rotary_factor": 0.5},
    "gpt2": {**SPECIAL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
"""What a configuration says beyond the sizes that all have.

The sliding window is shorter than the tests' text, and the epsilon of OLMo2, whose part of norms over all heads changes
as heads leave, smaller than their tolerance.
"""


MULTI_HEAD_ONLY = ("gpt2",)


def tiny_config(family: str, **changes: Any) -> Any:
    """3 layers, width 64, 8 query heads on 4 key-value heads, 48 FFN channels and 100 tokens.

    A family that is multi-head alone has as many query heads as the others have key-value heads, 16 channels each.
    """
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    if family in MULTI_HEAD_ONLY:
        sizes |= {
            "num_attention_heads": changes.pop("num_key_value_heads", 4),
            "n_inner": changes.pop("intermediate_size", FFN),
        }
        del sizes["num_key_value_heads"], sizes["intermediate_size"]
    return getattr(transformers, FAMILIES[family].config_class)(**{**sizes, **EXPLICIT[family], **changes})


def tiny_model(family: str, **changes: Any) -> Any:
    """Random weights, norms and biases included, in evaluation mode; the same ones at every call.

    ``num_key_value_heads=8`` makes it multi-head and ``num_key_value_heads=1`` multi-query.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, FAMILIES[family].model_class)(tiny_config(family, **changes))
        experts_to_linears_(conv1d_to_linear_(model))
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight", "sinks")):
                parameter.data = torch.randn_like(parameter) / 4
            if "norm" in name or ".ln_" in name or name.endswith("bias"):
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    """[rows, length], without the special tokens at the start of the vocabulary."""
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, length, vocabulary], of the `random_tokens` unless told."""
    return model(input_ids=random_tokens() if tokens is None else tokens, use_cache=False).logits


def adapted(model: Any, **lora: Any) -> Any:
    """The model in PEFT, with both factors of every adapter drawn at random and no dropout; A x times 2."""
    wrapped = attach_adapters(model, LoRAConfig(**{"r": 3, "alpha": 6.0, "dropout": 0.0, **lora}), seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return wrapped.eval()


def packed(model: Any, precision: Precision) -> Any:
    """The model, with every projection of its decoder quantized in place."""
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    quantize_(
        model,
        plan.with_precision([dict.fromkeys(UNITS, precision)] * len(plan.layers)),
        None,
        device=torch.device("cpu"),
    )
    return model
