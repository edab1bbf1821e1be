"""Makes compressed folders loadable by transformers alone: a modelling file, and its entries in ``config.json``."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from qpruner import modeling_compressed
from qpruner.anatomy import COMPRESSED, FAMILIES, Family, decoder_blocks, family_of
from qpruner.anatomy.layers import has_module, num_experts
from qpruner.experts import experts_to_linears_
from qpruner.files import read_json
from qpruner.modeling_compressed import CompressedEmbedding, CompressedLinear, PackedTable
from qpruner.pruning.widths import heads_field, skeleton_config

CODE = Path(modeling_compressed.__file__).name


def needs_code(config: Any) -> bool:
    """Whether transformers needs the modelling file to build the model of a configuration."""
    return str(config.model_type).startswith(COMPRESSED)


def add_code(folder: Path, config: Any, network: Any) -> None:
    """Copies the modelling file into a folder, and adds the entries that it needs to a configuration.

    Args:
        folder: folder of the compressed model.
        config: configuration that will be written to the folder, of a compressed class; changed in place.
        network: compressed model without adapters.
    """
    name, family = family_of(config)
    module = CODE.removesuffix(".py")
    config.compression = compression_of(network, config)
    config.auto_map = {
        "AutoConfig": f"{module}.Compressed{family.config_class}",
        "AutoModel": f"{module}.Compressed{body_class(name)}",
        "AutoModelForCausalLM": f"{module}.Compressed{family.model_class}",
    }
    shutil.copyfile(modeling_compressed.__file__, folder / CODE)


def load_by_transformers(folder: Path) -> Any:
    """Loads a folder's base through the modelling file, in the version of this installation; in evaluation mode."""
    written = read_json(folder / "config.json")
    family = FAMILIES[written["model_type"].removeprefix(COMPRESSED)]
    config: Any = modeling_compressed.config_class(family.config_class)
    loader: Any = modeling_compressed.model_class(family.model_class)
    return loader.from_pretrained(folder, config=config.from_pretrained(folder), dtype="auto").eval()


def body_class(family: str) -> str:
    """The name of the transformers class for a family's model without a head."""
    name: str = MODEL_MAPPING_NAMES[family]
    return name


def compression_of(network: Any, config: Any) -> dict[str, Any]:
    """How a compressed model differs from what its family's class builds; see `qpruner.modeling_compressed`.

    Args:
        network: compressed model without adapters.
        config: configuration of the model, of a compressed class.
    """
    from accelerate import init_empty_weights

    _, family = family_of(config)
    with init_empty_weights():
        usual = getattr(transformers, family.model_class)(skeleton_config(config))
        experts_to_linears_(usual)
    layers = enumerate(decoder_blocks(usual))
    compression: dict[str, Any] = {
        "modules": dict(_modules(network, usual)),
        "attributes": {
            f"{family.layers}.{number}.{path}": _attribute(network.get_submodule(f"{family.layers}.{number}"), path)
            for number, block in layers
            for path in family.widths
            if has_module(block, path.rpartition(".")[0])
            and _attribute(network.get_submodule(f"{family.layers}.{number}"), path) != _attribute(block, path)
        },
        "layer_configs": {},
        "skeleton": {}
        if family.free_heads
        else {name: getattr(usual.config, name) for name in (heads_field(usual.config), family.groups_field) if name},
        **_experts(network, usual, family),
    }
    if config.is_heterogeneous:
        numbers = range(len(decoder_blocks(network)))
        readers = {f"{family.layers}.{number}.{path}": number for number in numbers for path in family.reads_config}
        compression["layer_configs"] = readers | ({family.rotary: 0} if family.rotary else {})
    return compression


def _experts(network: Any, usual: nn.Module, family: Family) -> dict[str, Any]:
    """The entries ``experts`` and ``parameters``; none for a family without mixtures of experts.

    Args:
        network: compressed model.
        usual: model as the family's class builds it, with its experts as linears.
        family: family of both models.
    """
    if family.mixture is None:
        return {}
    mixture, experts, parameters = family.mixture, {}, {}
    for number, (block, before) in enumerate(zip(decoder_blocks(network), decoder_blocks(usual), strict=True)):
        paths = list(family.head_entries)
        if count := num_experts(family, block):
            entry = {"number": count, "projections": list(mixture.names)}
            experts[f"{family.layers}.{number}.{mixture.path}"] = entry
            router = block.get_submodule(mixture.router)
            paths += [f"{mixture.router}.{name}" for name, _ in router.named_parameters(recurse=False)]
        for path in paths:
            if (shape := block.get_parameter(path).shape) != before.get_parameter(path).shape:
                parameters[f"{family.layers}.{number}.{path}"] = list(shape)
    return {"experts": experts, "parameters": parameters}


def _modules(network: Any, usual: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entry of each module that differs from what the family's class builds, by its path."""
    tables: set[nn.Module] = set()
    for name, module in network.named_modules():
        if isinstance(module, CompressedEmbedding):
            tables.add(module.table)
            yield name, _packed(module.table) | {"scale": module.scale}
        elif isinstance(module, CompressedLinear):
            if module not in tables:
                yield name, _packed(module)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            if not isinstance(module, nn.Linear | nn.Embedding) and weight.ndim == 2:  # a router; see `_experts`
                continue
            before: Any = usual.get_submodule(name)
            shape = before.weight.shape
            if type(before).__name__ == "Conv1D":
                shape = shape[::-1]
            if shape != weight.shape:
                yield name, {"shape": list(weight.shape)}


def _packed(linear: PackedTable) -> dict[str, Any]:
    return {"shape": [linear.out_features, linear.in_features], **linear.entry}


def _attribute(block: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(block.get_submodule(owner), name)
