"""Base models whose weights are already quantized: made dense if transformers supports it, refused otherwise."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qpruner.errors import UserError, brief

DEQUANTIZED = ("bitsandbytes", "compressed-tensors", "fp8", "mxfp4")
"""The methods, by their ``quant_method``, whose weights transformers can make dense on any machine."""
DENSE = ("F64", "F32", "F16", "BF16")
"""The dtypes of dense weights, by their names in safetensors."""
TRACES = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")
"""Attributes that transformers leaves on a model that was quantized, from which PEFT chooses its adapters."""


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The entry of a configuration that describes how the weights are quantized; None if they are dense."""
    places = (config, config.get_text_config(decoder=True))
    return next((entry for place in places if (entry := getattr(place, "quantization_config", None))), None)


def check_entry(content: dict[str, Any], name: str) -> None:
    """Makes sure that the ``quantization_config`` of a config.json is an object, or missing.

    Args:
        content: content of the model's config.json.
        name: folder or hub name of the model, for the message.

    Raises:
        UserError: it is something else.
    """
    entry = content.get("quantization_config")
    if entry is not None and not isinstance(entry, dict):
        raise UserError(
            f"The quantization_config in the config.json of {name!r} is {brief(entry)}, which is not a JSON object. "
            f"If the weights are dense, remove it there; else fetch the file again."
        )


def stores_codes(files: Iterable[Path]) -> bool:
    """Whether any weight in some safetensors files has a dtype that dense weights do not have."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            # Not buffers, whose dtype may be any. MXFP4 stores blocks of codes instead of weights.
            weights = [
                name for name in names if name.rpartition(".")[2].startswith("weight") or name.endswith("_blocks")
            ]
            if any(opened.get_slice(name).get_dtype() not in DENSE for name in weights):
                return True
    return False


def describe(quantization: dict[str, Any]) -> str:
    """The method of a quantization entry and, if stated there, the number of bits, for messages."""
    bits = quantization.get("bits") or next((bits for bits in (4, 8) if quantization.get(f"load_in_{bits}bit")), None)
    return f"{_method(quantization)}{f', {bits} bits' if bits else ''}"


def check_dequantizable(quantization: dict[str, Any], name: str) -> None:
    """Makes sure that transformers can make the weights of a quantized model dense.

    Args:
        quantization: quantization entry of the model's configuration.
        name: folder or hub name of the model, for the message.

    Raises:
        UserError: the method is not supported, or needs a package that is not installed.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    dense = "Give the model that it was quantized from."
    if _method(quantization) not in DEQUANTIZED:
        raise UserError(
            f"{name!r} is quantized already ({describe(quantization)}), and dense weights can only be made of "
            f"{', '.join(DEQUANTIZED)}. {dense}"
        )
    try:
        AutoHfQuantizer.from_config(_to_dense(quantization)).validate_environment(device_map={"": "cpu"})
    except ImportError as error:
        raise UserError(
            f"{name!r} is quantized already ({describe(quantization)}), and a package is missing that makes it dense: "
            f"{error} Or do without: {dense[0].lower()}{dense[1:]}"
        ) from error


def load_densely_(config: Any) -> None:
    """Sets a configuration so that weights are made dense while they are loaded, if the method has such an option."""
    quantization = quantization_of(config)
    assert quantization is not None
    config.quantization_config = _to_dense(quantization)


def dequantize(model: Any, dtype: torch.dtype) -> Any:
    """Makes the weights of a loaded model dense, and removes all traces of quantization; returns the model."""
    if model.is_quantized:
        model = model.dequantize(dtype=dtype)
    for trace in TRACES:
        if hasattr(model, trace):
            delattr(model, trace)
    return model


def drop_quantization(config: Any) -> Any:
    """Removes the quantization from a configuration, in place, and returns the configuration."""
    for place in (config, config.get_text_config(decoder=True)):
        for attribute in ("quantization_config", "_is_quantized"):
            if hasattr(place, attribute):
                delattr(place, attribute)
    return config


def _method(quantization: dict[str, Any]) -> str:
    # Older entries of bitsandbytes do not name the method.
    of_bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return str(quantization.get("quant_method") or ("bitsandbytes" if of_bits else "an unnamed method"))


def _to_dense(quantization: dict[str, Any]) -> dict[str, Any]:
    return quantization if _method(quantization) == "bitsandbytes" else {**quantization, "dequantize": True}
