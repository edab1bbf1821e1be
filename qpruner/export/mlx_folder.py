"""Export to the folder that mlx-lm loads on Macs: grouped codes of 2 to 8 bits, and layers of any widths as OpenELM."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpruner.anatomy import architecture_of, family_of, refuse_experts
from qpruner.dense_copy import TokenizerFiles
from qpruner.errors import UserError
from qpruner.export.bit_stream import bit_stream, codes_of_stream, words
from qpruner.export.description import Description
from qpruner.export.groups import GroupedWeight, GroupLayout, rounded
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.files import write_json
from qpruner.folder_manifest import CONFIG, entries_of

SIZES = (128, 64, 32)
SMALLEST = 32
FEWEST_BITS = 2
EQUAL = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "qwen3"}
"""The mlx-lm model that computes a model of each family, where all layers have equal widths."""
UNEQUAL = ("llama", "mistral", "qwen3")
"""The families that OpenELM, whose layers may differ in width, can compute: it has no biases."""
ROPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "swish")
"""The names in transformers of the activation that all of these models of mlx-lm compute, whatever is configured."""


@dataclass(frozen=True)
class Scheme:
    """How a linear is held.

    Args:
        bits: bits of a code.
        size: columns of a group.
    """

    bits: int
    size: int

    def __str__(self) -> str:
        return f"{self.bits} bits with a scale for {self.size} weights"


class Mlx:
    """A folder for mlx-lm, whose linears and embedding are packed to 32-bit words.

    A linear named ``x`` of O rows and I columns has, for b bits and groups of G columns,

    - ``x.weight``: uint32 [O, I * b / 32], its codes as a stream of bits;
    - ``x.scales`` and ``x.biases``: [O, I / G];

    and the value scale * code + bias. So codes on a uniform grid are exported unchanged, with minima as biases; those
    of one bit take two. NF4 and FP4, linears of two segments or with adapters are quantized anew; rows whose length is
    no multiple of 32 are dense.

    A model of equal layers is written as ``llama`` or ``qwen3``, one whose layers differ in width as ``openelm``, where
    queries, keys and values, and gate and up, are one linear each.

    Source: mlx 0.32 and mlx-lm 0.32, which are not needed to write it.
    """

    name = "mlx"
    extra = None
    module = None

    def check(self, model: Description) -> None:
        config = model.config
        refuse_experts(config, f"--format {self.name}", "--format dense")
        unequal = config.is_heterogeneous
        family, anatomy = family_of(config)
        if family not in EQUAL or (unequal and family not in UNEQUAL):
            allowed = UNEQUAL if unequal else tuple(EQUAL)
            raise UserError(
                f"mlx has no model that computes what a {family} does{' whose layers differ in width' * unequal}; "
                f"{', '.join(allowed)} can be exported. Export with --format onnx or dense"
                f"{', or prune with selection.uniform true' * (unequal and family in EQUAL)}."
            )
        window = getattr(config, "sliding_window", None)
        if window is not None and window < config.max_position_embeddings:
            raise UserError(
                f"All layers of this model read a window of {window} tokens, which mlx cannot. Export with --format "
                f"onnx or dense."
            )
        rope = config.rope_parameters.get("rope_type", "default")
        allowed = ROPES[:1] if unequal else ROPES
        if rope not in allowed:
            raise UserError(
                f"The rotary positions of this model are of type {rope}; mlx gets {', '.join(allowed)}. Export with "
                f"--format onnx or dense."
            )
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"The activation of this model's FFNs is {config.hidden_act}; mlx computes {ACTIVATIONS[0]} in every "
                f"{family}. Export with --format onnx or dense."
            )
        if not any(switch is None or getattr(config, switch) for switch in anatomy.biases.values()):
            return
        if unequal:
            raise UserError(
                "The layers of this model differ in width and have biases, which OpenELM has not. Prune with "
                "selection.uniform true, or export with --format onnx or dense."
            )
        if EQUAL[family] == "qwen3":
            raise UserError(
                "The attention of this model has biases, which mlx's qwen3 has not. Export with --format onnx or dense."
            )

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        from huggingface_hub import save_torch_state_dict

        unequal = source.config.is_heterogeneous
        modules = _openelm_modules(source) if unequal else {name: (name,) for name in _modules(source)}
        schemes = {name: scheme for name, parts in modules.items() if (scheme := _scheme(source, parts[0])) is not None}
        state, present = dict[str, Tensor](), set(source.names())
        for name, parts in modules.items():
            if name in schemes:
                weights = [_weight(source, part, schemes[name]) for part in parts]
                stream = torch.cat([bit_stream(weight.codes, weight.bits) for weight in weights])
                state[f"{name}.weight"] = words(stream).view(torch.uint32)
                scales = torch.cat([weight.scales for weight in weights])
                minima = torch.cat([weight.minima for weight in weights])
                state[f"{name}.scales"] = rounded(f"The scales of {name}", scales, dtype)
                state[f"{name}.biases"] = rounded(f"The minima of {name}", minima, dtype)
            else:
                values = torch.cat([source.weight(f"{part}.weight") for part in parts])
                state[f"{name}.weight"] = rounded(f"{name}.weight", values, dtype)
            if f"{parts[0]}.bias" in present:
                state[f"{name}.bias"] = rounded(f"{name}.bias", source.weight(f"{parts[0]}.bias"), dtype)
        state |= _zero_biases(source, dtype)
        folder.mkdir(parents=True)
        save_torch_state_dict(state, str(folder), metadata={"format": "mlx"})
        config = _openelm_config(source) if unequal else _stock_config(source)
        write_json(
            folder / CONFIG, config | _quantization(schemes) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        )
        TokenizerFiles(source.folder).save_pretrained(folder)

        def read(name: str) -> Tensor:
            part, _, kind = name.rpartition(".")
            module = next(module for module, parts in modules.items() if part in parts)
            if kind == "bias":
                return state[name].float()
            before = modules[module][: modules[module].index(part)]
            first = sum(source.shape(f"{each}.weight")[0] for each in before)
            rows = source.shape(name)[0]
            return _values(state, module, schemes.get(module))[first : first + rows]

        predicted = sum(_predicted_bytes(source, parts, schemes.get(name), dtype) for name, parts in modules.items())
        biases = sum(source.shape(name)[0] for name in present if name.endswith(".bias"))
        predicted += biases * dtype.itemsize + sum(tensor.nbytes for tensor in _zero_biases(source, dtype).values())
        files = tuple(Path(path) for path in entries_of(folder))
        return Written(files, predicted, _changes(source, modules, schemes, dtype), read)


def _modules(source: Source) -> list[str]:
    """The modules of the dense model that have a weight."""
    return [name.removesuffix(".weight") for name in source.names() if name.endswith(".weight")]


def _openelm_modules(source: Source) -> dict[str, tuple[str, ...]]:
    """The modules of OpenELM, each with the modules of the model whose rows it holds, in order."""
    _, family = family_of(source.config)
    modules: dict[str, tuple[str, ...]] = {
        "transformer.token_embeddings": (family.embedding,),
        "transformer.norm": (family.last_norm,),
    }
    before, behind = family.layer_norms
    parts: dict[str, tuple[str, ...]] = {
        "attn.qkv_proj": tuple(family.projections[name] for name in "qkv"),
        "attn.out_proj": (family.projections["o"],),
        "ffn.proj_1": tuple(family.projections[name] for name in ("gate", "up")),
        "ffn.proj_2": (family.projections["down"],),
        "attn_norm": (before,),
        "ffn_norm": (behind,),
    }
    if family.head_norms:
        parts |= {f"attn.{name}_norm": (path,) for name, path in zip("qk", family.head_norms, strict=True)}
    for number in range(source.config.num_hidden_layers):
        for name, paths in parts.items():
            modules[f"transformer.layers.{number}.{name}"] = tuple(f"{family.layers}.{number}.{path}" for path in paths)
    return modules if source.tied else {**modules, "lm_head": (family.head,)}


def _scheme(source: Source, name: str) -> Scheme | None:
    """How a linear or table is stored; None for dense."""
    packed = source.packed(name)
    if packed is None or packed.in_features % SMALLEST:
        return None
    layout = GroupLayout.of(packed)
    size = SMALLEST if layout is None else layout.divided(packed.in_features, SIZES)
    assert size is not None
    return Scheme(max(FEWEST_BITS, packed.precision.bits), size)


def _is_exact(source: Source, name: str) -> bool:
    """Whether the codes of a packed linear are exported unchanged."""
    packed = source.packed(name)
    return packed is not None and GroupLayout.of(packed) is not None and name not in source.adapters


def _weight(source: Source, name: str, scheme: Scheme) -> GroupedWeight:
    packed = source.packed(name)
    if packed is not None and _is_exact(source, name):
        return replace(GroupedWeight.of(packed, scheme.size), bits=scheme.bits)
    return GroupedWeight.encoded(source.weight(f"{name}.weight"), scheme.bits, scheme.size, symmetric=False)


def _values(state: Mapping[str, Tensor], name: str, scheme: Scheme | None) -> Tensor:
    """The weight of a module as the engine computes it from its tensors; float32."""
    weight = state[f"{name}.weight"]
    if scheme is None:
        return weight.float()
    scales, biases = state[f"{name}.scales"], state[f"{name}.biases"]
    columns = scales.shape[1] * scheme.size
    codes = codes_of_stream(weight.view(torch.uint8), columns, scheme.bits).view(*scales.shape, scheme.size)
    return (codes * scales.float().unsqueeze(2) + biases.float().unsqueeze(2)).view(-1, columns)


def _zero_biases(source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros for a parameter that mlx's Llama has and Qwen2 does not: the bias of the attention's output projection."""
    family, anatomy = family_of(source.config)
    if family != "qwen2":
        return {}
    layers = range(source.config.num_hidden_layers)
    names = (f"{anatomy.layers}.{number}.{anatomy.projections['o']}.bias" for number in layers)
    return {name: torch.zeros(source.config.hidden_size, dtype=dtype) for name in names}


def _predicted_bytes(source: Source, parts: tuple[str, ...], scheme: Scheme | None, dtype: torch.dtype) -> int:
    """Bytes of the weights of a module, biases not included."""
    total = 0
    for part in parts:
        number = torch.Size(source.shape(f"{part}.weight")).numel()
        if scheme is None:
            total += number * dtype.itemsize
        else:
            total += number * scheme.bits // 8 + 2 * number // scheme.size * dtype.itemsize
    return total


def _quantization(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    if not schemes:
        return {}
    (usual, _), *_ = Counter(schemes.values()).most_common()
    modules = {name: {"group_size": scheme.size, "bits": scheme.bits} for name, scheme in schemes.items()}
    return {"quantization": {"group_size": usual.size, "bits": usual.bits, "mode": "affine", **modules}}


def _shared_config(source: Source) -> dict[str, Any]:
    config = source.dense_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = {name: getattr(config, name, None) for name in names}
    return {**content, "vocab_size": config.vocab_size, "rms_norm_eps": config.rms_norm_eps}


def _stock_config(source: Source) -> dict[str, Any]:
    config, widths = source.dense_config, architecture_of(source.config)
    family, anatomy = family_of(config)
    rope, heads = dict(config.rope_parameters), widths.kv_groups[0] * widths.queries_per_group
    # Which is a llama to mlx, while the tokenizer is loaded by transformers, whose llama refuses such heads.
    refused = EQUAL[family] == "llama" and config.hidden_size % heads
    return {
        **_shared_config(source),
        "model_type": "mistral" if refused else EQUAL[family],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": widths.ffn_channels[0],
        "num_attention_heads": heads,
        "num_key_value_heads": widths.kv_groups[0],
        "head_dim": widths.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": "q" in anatomy.biases and (family == "qwen2" or bool(config.attention_bias)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": source.tied,
    }


def _openelm_config(source: Source) -> dict[str, Any]:
    config, widths = source.dense_config, architecture_of(source.config)
    return {
        **_shared_config(source),
        "model_type": "openelm",
        "model_dim": config.hidden_size,
        "num_transformer_layers": config.num_hidden_layers,
        "head_dim": widths.head_dim,
        "num_kv_heads": list(widths.kv_groups),
        "num_query_heads": [groups * widths.queries_per_group for groups in widths.kv_groups],
        "ffn_multipliers": [channels / config.hidden_size for channels in widths.ffn_channels],
        "ffn_dim_divisor": 1,  # channels are rounded to its multiples
        "ffn_with_glu": True,
        "normalize_qk_projections": bool(family_of(config)[1].head_norms),
        "share_input_output_layers": source.tied,
        "rope_freq_constant": config.rope_parameters["rope_theta"],
    }


def _changes(
    source: Source, modules: Mapping[str, tuple[str, ...]], schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> tuple[str, ...]:
    kinds: Counter[str] = Counter()
    for name, parts in modules.items():
        for part in parts:
            packed, scheme = source.packed(part), schemes.get(name)
            if packed is None:
                continue
            if scheme is None:
                kinds[
                    f"of {packed.precision} became dense: rows of {packed.in_features} weights are no multiple of "
                    f"{SMALLEST}"
                ] += 1
            elif not _is_exact(source, part):
                reason = "their adapters are in them" if part in source.adapters else "the format has no such codes"
                kinds[f"of {packed.precision} became {scheme}, codes chosen anew: {reason}"] += 1
            elif scheme.bits != packed.precision.bits:
                kinds[f"of {packed.precision} hold each code in {scheme.bits} bits"] += 1
    changes = [f"{number} weight{'s' * (number > 1)} {kind}" for kind, number in kinds.items()]
    if schemes and dtype != torch.float16:
        changes.append("scales and minima are rounded to bfloat16; --dtype float16 holds them as they are")
    return tuple(changes)
