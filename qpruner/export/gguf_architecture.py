"""Which architecture of llama.cpp computes what a model does, and the metadata that it needs to.

The loaders of ``llama``, ``qwen2``, ``qwen3`` and ``gemma3`` size the tensors of all layers by the first. Two read
widths layer by layer: ``deci``, which is otherwise ``llama``, and ``openelm``, whose head is its embedding and whose
heads have norms, as those of a Qwen3. Figures and traps are those of llama.cpp as llama-cpp-python 0.3.36 has it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpruner.anatomy import family_of
from qpruner.errors import UserError
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
        norms_from_one: whether a norm's weights stand for what is added to one in the model.
    """

    name: str
    interleaved: bool = False
    fused: bool = False
    norms_from_one: bool = False


LLAMA, DECI = Architecture("llama", interleaved=True), Architecture("deci", interleaved=True)
QWEN2, QWEN3, OPENELM = Architecture("qwen2"), Architecture("qwen3"), Architecture("openelm", fused=True)
GEMMA3 = Architecture("gemma3", norms_from_one=True)


def architecture_for(source: Source) -> Architecture:
    """The architecture that computes what a model does.

    Raises:
        UserError: there is none; the reason, and the nearest thing that works.
    """
    config, widths = source.config, source.plan.widths
    family, _ = family_of(config)
    equal = len(set(widths.kv_groups)) == len(set(widths.ffn_channels)) == 1
    _check_activation(config, "gelu_pytorch_tanh" if family == "gemma3_text" else "silu")
    if family in ("llama", "mistral"):
        chosen = LLAMA if equal else DECI
    elif family == "qwen2":
        all_heads = widths.kv_groups[0] * widths.queries_per_group * widths.head_dim == widths.hidden_size
        chosen = DECI if not equal else QWEN2 if all_heads else LLAMA
    elif family == "qwen3":
        if not equal and not source.tied:
            raise _refusal(source, "its layers differ in width and its head is not its embedding", EQUAL_WIDTHS)
        if config.attention_bias:
            raise _refusal(source, "it has biases of attention", "Use --format dense")
        chosen = QWEN3 if equal else OPENELM
    elif family == "gemma3_text":
        if not equal:
            raise _refusal(source, "its layers are not equally wide", EQUAL_WIDTHS)
        _check_gemma(source)
        chosen = GEMMA3
    else:
        raise _refusal(
            source, "only llama, mistral, qwen2, qwen3 and gemma3_text are written so far", "Use --format dense"
        )
    _check_rope(source, chosen)
    return chosen


def metadata(source: Source, architecture: Architecture) -> tuple[dict[str, Value | str], list[str]]:
    """What a file states of a model, by key without the architecture's prefix, and what of it changes the model."""
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
        # Left out, they would follow from the heads of the first layer, which may be pruned.
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
    window = getattr(config, "sliding_window", None) if uses_window(config) else None
    if architecture == GEMMA3:
        values["attention.sliding_window"] = int(config.sliding_window)
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping:
            values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    elif window is not None and window < context:
        context = int(window)
        changes.append(
            f"the context is {context} tokens: {architecture.name} has no sliding window, which begins there"
        )
    values["context_length"] = context
    return values, changes


def added_channels(source: Source, number: int) -> int:
    """How many FFN channels of zeros a layer gets, where rows of them are packed, to fill blocks; they add nothing."""
    if all(layer.precision["down"] == DENSE for layer in source.plan.layers):
        return 0
    return -source.plan.widths.ffn_channels[number] % BLOCK


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary positions of a model; of Gemma 3 those of full attention."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """By how much Llama 3 slows each frequency of its rotary positions, [head_dim / 2]; None where it does not."""
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
    return kinds is None or "sliding_attention" in kinds


def _check_activation(config: Any, expected: str) -> None:
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if family_of(config)[0] in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text") and activation != expected:
        raise UserError(
            f"--format gguf: llama.cpp computes {expected} where this model has {activation}. Use --format dense."
        )


def _check_gemma(source: Source) -> None:
    config = source.config
    if config.query_pre_attn_scalar != source.plan.widths.head_dim:
        raise _refusal(
            source,
            f"query_pre_attn_scalar is not the number of channels of a head but {config.query_pre_attn_scalar}",
            "Use --format dense",
        )
    if config.attn_logit_softcapping is not None or config.attention_bias:
        raise _refusal(source, "it has soft capping or biases of attention", "Use --format dense")


def _check_rope(source: Source, architecture: Architecture) -> None:
    rope = rope_of(source.config)
    kinds = {"default", "linear"} | ({"llama3"} if architecture.interleaved else set())
    if rope["rope_type"] not in kinds or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(
            source,
            f"rotary positions of {architecture.name} are written for {', '.join(sorted(kinds))}, over whole "
            f"heads, not for {rope['rope_type']}",
            "Use --format dense",
        )


def _refusal(source: Source, reason: str, remedy: str) -> UserError:
    family = family_of(source.config)[0]
    return UserError(f"llama.cpp has no architecture for this {family}: {reason}. {remedy}.")
