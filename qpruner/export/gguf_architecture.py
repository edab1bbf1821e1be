"""The llama.cpp architecture that computes the same function as a model, and the metadata that it needs.

Most llama.cpp loaders size the tensors of all layers by the first. Two read widths layer by layer: ``deci``, which is
otherwise ``llama``, and ``openelm``, with tied embeddings and norms on its attention heads, like a Qwen3.

Source: the llama.cpp version in llama-cpp-python 0.3.36, which the tests run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpruner.anatomy import family_of
from qpruner.errors import UserError
from qpruner.export.description import Description
from qpruner.export.gguf_types import BLOCK
from qpruner.export.source import Source
from qpruner.plan import DENSE

EQUAL_WIDTHS = (
    "Prune to equal widths (`selection.uniform: true` of the pruning callback), or use --format dense, which holds any"
)
Value = int | float | bool | list[int] | list[bool]


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Args:
        name: name of the architecture, as the file states it.
        interleaved: whether rotary positions turn neighbouring channels of a head.
        fused: whether query, key and value are one tensor.
        norms_from_one: whether the model adds one to its norms' weights.
    """

    name: str
    interleaved: bool = False
    fused: bool = False
    norms_from_one: bool = False


LLAMA, DECI = Architecture("llama", interleaved=True), Architecture("deci", interleaved=True)
QWEN2, QWEN3, OPENELM = Architecture("qwen2"), Architecture("qwen3"), Architecture("openelm", fused=True)
GEMMA2, GEMMA3 = Architecture("gemma2", norms_from_one=True), Architecture("gemma3", norms_from_one=True)
GRANITE, SMOLLM3 = Architecture("granite", interleaved=True), Architecture("smollm3", interleaved=True)
OF_EQUAL_LAYERS = {
    "gemma": Architecture("gemma", norms_from_one=True),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
}
"""Architectures for layers of equal width, by the families that have such an architecture."""
WRITTEN = ("llama", "mistral", "qwen2", "qwen3", *OF_EQUAL_LAYERS)
"""The families whose models can be written."""


def architecture_for(model: Description) -> Architecture:
    """The architecture that computes what a model does.

    Raises:
        UserError: there is none; the message gives the reason and the nearest alternative that works.
    """
    config, widths = model.config, model.plan.widths
    family, _ = family_of(config)
    if family not in WRITTEN:
        raise _refusal(config, f"only {', '.join(WRITTEN)} are written so far")
    equal = len(set(widths.kv_groups)) == len(set(widths.ffn_channels)) == 1
    if family in ("llama", "mistral"):
        chosen = LLAMA if equal else DECI
    elif family == "qwen2":
        all_heads = widths.kv_groups[0] * widths.queries_per_group * widths.head_dim == widths.hidden_size
        chosen = DECI if not equal else QWEN2 if all_heads else LLAMA
    elif family == "qwen3":
        chosen = QWEN3 if equal else OPENELM
    else:
        chosen = OF_EQUAL_LAYERS[family]
    if chosen == OPENELM and not model.tied:
        raise _refusal(config, "its layers differ in width and its head is not its embedding", EQUAL_WIDTHS)
    if not equal and chosen not in (DECI, OPENELM):
        raise _refusal(config, "its layers are not equally wide", EQUAL_WIDTHS)
    if reason := _difference(model, chosen):
        raise _refusal(config, reason)
    return chosen


def _difference(model: Description, architecture: Architecture) -> str | None:
    """How a model's computation differs from its architecture's; None for no difference."""
    config, rope = model.config, rope_of(model.config)
    gemma = architecture.norms_from_one
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = "gelu_pytorch_tanh" if gemma else "silu"
    kinds = {"default", "linear"} | ({"llama3"} if architecture in (LLAMA, DECI) else set())
    differences = {
        f"{expected} is computed where it has {activation}": activation != expected,
        f"rotary positions are {', '.join(sorted(kinds))} over whole heads, where it has {rope['rope_type']}": (
            rope["rope_type"] not in kinds or rope.get("partial_rotary_factor", 1.0) != 1.0
        ),
        "it has biases, and the architecture has none": (
            architecture not in (LLAMA, DECI, QWEN2, GRANITE)
            and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
        ),
    }
    if gemma and architecture != OF_EQUAL_LAYERS["gemma"]:
        scalar = config.query_pre_attn_scalar
        capped = config.attn_logit_softcapping is not None
        differences |= {
            f"its query_pre_attn_scalar is {scalar}, not the channels of a head": scalar != model.plan.widths.head_dim,
            "attention is capped, or is not, otherwise": capped != (architecture == GEMMA2),
            "the last logits are not capped": architecture == GEMMA2 and not config.final_logit_softcapping,
        }
    if architecture in (GEMMA2, OF_EQUAL_LAYERS["gemma"]):
        differences["its head is not its embedding"] = not model.tied
    if architecture == SMOLLM3:
        turned = [int((number + 1) % 4 != 0) for number in range(model.plan.widths.num_layers)]
        differences["layers other than every fourth have no positions"] = list(config.no_rope_layers) != turned
    return next((difference for difference, holds in differences.items() if holds), None)


def metadata(source: Source, architecture: Architecture) -> tuple[dict[str, Value | str], list[str]]:
    """Metadata of a model, by key without the architecture's prefix, and the changes to the model that it implies."""
    config, widths = source.config, source.plan.widths
    heads = [groups * widths.queries_per_group for groups in widths.kv_groups]
    context, changes = int(config.max_position_embeddings), []
    channels = [number + added_channels(source, layer) for layer, number in enumerate(widths.ffn_channels)]
    if more := sum(channels) - sum(widths.ffn_channels):
        changes.append(f"the layers have {more} FFN channels of zeros more, so that rows are whole blocks of {BLOCK}")
    per_layer = architecture in (DECI, OPENELM)
    values: dict[str, Value | str] = {
        "block_count": widths.num_layers,
        "embedding_length": widths.hidden_size,
        "feed_forward_length": channels if per_layer else channels[0],
        "attention.head_count": heads if per_layer else heads[0],
        "attention.head_count_kv": list(widths.kv_groups) if per_layer else widths.kv_groups[0],
        # By default they are derived from the number of heads in the first layer, which may be pruned.
        "attention.key_length": widths.head_dim,
        "attention.value_length": widths.head_dim,
        "rope.dimension_count": widths.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": int(config.vocab_size),
    }
    rope = rope_of(config)
    values["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if architecture in (GEMMA2, GEMMA3):
        values["attention.sliding_window"] = int(config.sliding_window)
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, name):
                values[name] = float(getattr(config, name))
    elif uses_window(config) and config.sliding_window < context:
        context = int(config.sliding_window)
        changes.append(
            f"the context is {context} tokens: {architecture.name} has no sliding window, which begins there"
        )
    if architecture == GEMMA3:
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if architecture == GRANITE:
        values |= {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    values["context_length"] = context
    return values, changes


def added_channels(source: Source, number: int) -> int:
    """Number of zero FFN channels that pad a layer's packed rows to whole blocks; they do not change its output."""
    if all(layer.precision["down"] == DENSE for layer in source.plan.layers):
        return 0
    return -source.plan.widths.ffn_channels[number] % BLOCK


def rope_of(config: Any) -> dict[str, Any]:
    """Options of a model's rotary position embeddings; for Gemma 3 those of full attention."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """Factor by which Llama 3 slows each rotary frequency, [head_dim / 2]; None for other models."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # within the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (smooth + (1 - smooth) / rope["factor"])).float()


def uses_window(config: Any) -> bool:
    """Whether some layer looks back no further than a sliding window."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (kinds is None or "sliding_attention" in kinds)


def _refusal(config: Any, reason: str, remedy: str = "Use --format dense") -> UserError:
    family = family_of(config)[0]
    return UserError(f"llama.cpp has no architecture for this {family}: {reason}. {remedy}.")
