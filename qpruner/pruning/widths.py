"""Configurations of models whose layers have individual widths.

Widths that differ between layers are held in ``config.per_layer_config``, transformers' own record of them. Its model
classes cannot be built from that record yet, and some of its configurations (Llama, Gemma2) refuse head counts that do
not divide the hidden size, although ``head_dim`` is given. A narrowed model therefore has a configuration class of
ours, of type ``compressed_<family>``; where transformers alone can express the widths, `portable_config` returns the
configuration that does, and that is what the class saves.
"""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from qpruner.anatomy import FAMILIES, Family, family_of, head_shape
from qpruner.modeling_compressed import config_class
from qpruner.plan import Architecture

LLAMA_ONLY = ("attention_bias", "mlp_bias")
"""Options that a Llama may have and a Mistral does not."""


@cache
def compressed_config_class(family: str) -> type:
    """The configuration class of a family's narrowed models: the family's own, with any head count allowed."""
    parent = getattr(transformers, FAMILIES[family].config_class)

    def save_pretrained(self: Any, save_directory: str | Path, **options: Any) -> None:
        # The model may have become dense, for use by anyone: a configuration that transformers alone can read is
        # better.
        portable = portable_config(self)
        if portable is self:
            parent.save_pretrained(self, save_directory, **options)
        else:
            portable.architectures = [family_of(portable)[1].model_class]
            portable.save_pretrained(save_directory, **options)

    members: dict[str, Any] = {
        "save_pretrained": save_pretrained,
        "_auto_class": None,
        "__module__": __name__,
        "__annotations__": {},
    }
    # Without the decorator the parent's validators still run.
    compressed_class: type = strict(type(f"Compressed{parent.__name__}", (config_class(parent.__name__),), members))
    return compressed_class


def __getattr__(name: str) -> type:
    """Makes the classes members of this module, which pickling a model requires."""
    for family, anatomy in FAMILIES.items():
        if name == f"Compressed{anatomy.config_class}":
            return compressed_config_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def with_widths(config: Any, widths: Architecture) -> Any:
    """The configuration of the same model with other widths.

    Equal widths are held in the usual fields; others in ``per_layer_config``, beside the usual fields of ``config``.
    """
    family, anatomy = family_of(config)
    content = plain_dict(config)
    head_dim, queries_per_group = head_shape(config)
    overrides = [
        {
            heads_field(config): groups * queries_per_group,
            **({anatomy.groups_field: groups} if anatomy.groups_field else {}),
            **ffn_fields(anatomy, widths, number),
        }
        for number, groups in enumerate(widths.kv_groups)
    ]
    # A field that a layer does not read, such as the number of experts in a plain FFN, does not make it differ from
    # others.
    overrides = [{**fill, **layer} for fill in [_first_of_each(overrides)] for layer in overrides]
    content["head_dim"] = head_dim
    content.pop("per_layer_config", None)
    if all(layer == overrides[0] for layer in overrides):
        content |= overrides[0]
    else:
        content["per_layer_config"] = dict(enumerate(overrides))
    compressed = compressed_config_class(family)(**content)
    compressed._attn_implementation = config._attn_implementation
    return compressed


def ffn_fields(anatomy: Family, widths: Architecture, number: int) -> dict[str, int]:
    """The configuration fields that hold the widths of a layer's FFN, or of its experts, with their values."""
    channels, experts = widths.channels_of_each(number), widths.num_experts(number)
    if experts and anatomy.mixture is not None:
        return {anatomy.mixture.number_field: experts, anatomy.mixture.channels_field: channels}
    return {anatomy.channels_field: channels}


def _first_of_each(overrides: list[dict[str, int]]) -> dict[str, int]:
    """The value of each field in the first layer that has it."""
    first: dict[str, int] = {}
    for layer in overrides:
        first = {**layer, **first}
    return first


def heads_field(config: Any) -> str:
    """The field that holds the number of query heads, which has another name in GPT-2."""
    name: str = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    return name


def skeleton_config(config: Any) -> Any:
    """A configuration of equal layers that are at least as wide, from which the family's model class can be built."""
    family, anatomy = family_of(config)
    content = plain_dict(config)
    content.pop("per_layer_config", None)
    if not anatomy.free_heads:
        head_dim, queries_per_group = head_shape(config)
        content[heads_field(config)] = config.hidden_size // head_dim
        if anatomy.groups_field:
            content[anatomy.groups_field] = config.hidden_size // head_dim // queries_per_group
    return compressed_config_class(family)(**content)


def portable_config(config: Any) -> Any:
    """The same widths as a configuration that transformers alone can load, or ``config`` where there is none.

    A Llama whose head count does not divide its hidden size is the same function as a Mistral without a sliding window.
    """
    family, anatomy = family_of(config)
    head_dim, _ = head_shape(config)
    if config.is_heterogeneous or not (
        anatomy.free_heads or config.num_attention_heads * head_dim == config.hidden_size
    ):
        return config
    content = plain_dict(config)
    candidates = [(FAMILIES[family].config_class, content)]
    if family == "llama" and not any(content.get(name) for name in LLAMA_ONLY):
        candidates.append(("MistralConfig", content | {"sliding_window": None}))
    for class_name, fields in candidates:
        with suppress(StrictDataclassError):
            return getattr(transformers, class_name)(**fields)
    return config


def plain_dict(config: Any) -> dict[str, Any]:
    """The configuration's own fields, without its type and the fields that transformers adds when saving."""
    content: dict[str, Any] = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "compression"):
        content.pop(name, None)
    return content


def set_config(model: nn.Module, config: Any) -> None:
    """Gives the model and all its modules the configuration in place of the one that they share."""
    shared = model.config
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
