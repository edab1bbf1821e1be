"""The folder of a compressed model: written whole, read from safetensors and JSON alone, checked before it is read.

config.json, generation_config.json    widths, where transformers alone can express them in its own types
model*.safetensors, *.index.json       the compressed base
tokenizer*                             of the base
plan.json                              what was kept of the dense model
adapter/                               LoRA adapters in PEFT's layout, once they are trained
manifest.json                          version, base model, size and SHA-256 of every file above
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qpruner.anatomy import COMPRESSED, FAMILIES, architecture_of, family_of
from qpruner.errors import UserError
from qpruner.files import hash_file, read_json, write_json
from qpruner.plan import CompressionPlan, describe_differences
from qpruner.pretrained import load_config, resolve
from qpruner.pruning.surgery import narrow_
from qpruner.pruning.widths import compressed_config_class, plain_dict, portable_config, with_widths
from qpruner.quantization.apply import linear_precisions
from qpruner.quantization.embedding import rebuild_tables_
from qpruner.quantization.model import rebuild_linears_

KIND, VERSION = "qpruner model", 1
MANIFEST, PLAN, ADAPTER = "manifest.json", "plan.json", "adapter"


@dataclass(frozen=True)
class CompressedBase:
    """What a folder holds beside the adapters.

    Args:
        model: the compressed base, in evaluation mode on the CPU.
        plan: that made it.
        base_name: folder or hub name of the dense model.
        base_sha256: fingerprint of the dense model.
    """

    model: Any
    plan: CompressionPlan
    base_name: str
    base_sha256: str | None


def load_compressed(folder: str | Path) -> Any:
    """The model of a compressed folder, with its adapters when it has any, in evaluation mode on the CPU.

    Args:
        folder: such as ``runs/quickstart/model``.

    Raises:
        UserError: not such a folder, of another version, or a file is missing, cut off or altered.
    """
    import peft

    model = load_base(folder).model
    if has_adapters(Path(folder)):
        model = peft.PeftModel.from_pretrained(model, str(Path(folder) / ADAPTER))
    return model.eval()


def load_base(folder: str | Path) -> CompressedBase:
    """The compressed base of a folder, without adapters.

    Raises:
        UserError: as `load_compressed`.
    """
    folder = Path(folder).expanduser()
    manifest = _checked_manifest(folder)
    config, plan = read_config(folder), CompressionPlan.read(folder / PLAN)
    # A uniform Llama may have been written as a Mistral.
    written = replace(architecture_of(config), model_type=plan.architecture.model_type)
    if differences := describe_differences(plan.widths, written):
        raise UserError(f"The plan in {str(folder)!r} is not that of its weights: {differences}.")
    model = build_skeleton(config)
    state: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors") and "/" not in name:
            try:
                state |= load_file(folder / name)
            except SafetensorError as error:
                raise UserError(f"{str(folder / name)!r} is not a safetensors file: {error}.") from error
    if plan.quantized:
        rebuild_linears_(model, linear_precisions(model, plan), state)
        rebuild_tables_(model, plan.embedding, plan.head, state, dtype=config.dtype)
    try:
        left = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # another shape
        raise UserError(f"The weights in {str(folder)!r} are not those of its configuration: {error}") from error
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing or left.unexpected_keys:
        raise UserError(
            f"The weights in {str(folder)!r} are not those of its configuration: missing {missing or 'none'}, "
            f"unexpected {left.unexpected_keys or 'none'}."
        )
    model.requires_grad_(False)
    if "generation_config.json" in manifest["files"]:
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return CompressedBase(model.eval(), plan, manifest["base"]["name"], manifest["base"]["sha256"])


def save_base(folder: Path, model: Any, plan: CompressionPlan, *, base_name: str, tokenizer: Any | None) -> None:
    """Writes a compressed base; the folder appears whole, with its manifest, or not at all.

    Args:
        folder: to write; what is there goes.
        model: without adapters.
        plan: that made it.
        base_name: folder or hub name of the dense model.
        tokenizer: to put beside it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        # In place of what `save_pretrained` makes of the configuration that the model computes with.
        portable = with_widths(model.config, plan.widths) if plan.quantized else portable_config(model.config)
        portable.architectures = [_model_class_name(portable)]
        portable.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        plan.write(temporary / PLAN)
        _write_manifest(temporary, {"name": base_name, "sha256": plan.base_sha256})
        for file in temporary.rglob("*"):
            _sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_adapters(folder: Path, model: Any, *, trained: bool) -> None:
    """Adds the adapters of a PEFT model to the folder of its base, and to the manifest.

    Args:
        folder: that `save_base` wrote.
        model: the PEFT model.
        trained: whether a fit has trained them, or they are what a fit starts from.
    """
    base = _manifest(folder)["base"]
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    _write_manifest(folder, base)  # cut off from here on, the folder is that of the base alone
    # Left to itself, PEFT looks the base up by its name, to see whether embeddings were resized.
    model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    # It names the place of the base as this machine has it; the base is the folder above.
    config = read_json(folder / ADAPTER / "adapter_config.json")
    write_json(folder / ADAPTER / "adapter_config.json", config | {"base_model_name_or_path": ".."})
    (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # a form to fill in
    for file in (folder / ADAPTER).iterdir():
        _sync(file)
    _write_manifest(folder, base, adapters="trained" if trained else "initial")


def load_adapters(folder: Path, model: Any) -> None:
    """Gives a PEFT model the adapters of its base's folder."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / ADAPTER / "adapter_model.safetensors"))


def is_compressed(folder: Path) -> bool:
    """Whether a folder says that it holds a compressed model."""
    return (folder / MANIFEST).is_file() and (folder / PLAN).is_file()


def has_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters."""
    return f"{ADAPTER}/adapter_config.json" in _manifest(folder)["files"]


def has_initial_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters that no fit has trained yet."""
    return has_adapters(folder) and _manifest(folder).get("adapters") == "initial"


def read_config(folder: Path) -> Any:
    """The configuration of a compressed folder, of a class that can express its widths."""
    content = read_json(folder / "config.json")
    model_type = content.get("model_type", "")
    if not model_type.startswith(COMPRESSED):
        return transformers.AutoConfig.from_pretrained(folder)
    family = model_type.removeprefix(COMPRESSED)
    if family not in FAMILIES:
        raise UserError(f"{str(folder)!r} holds a model of type {model_type!r}, which this qpruner does not know.")
    return compressed_config_class(family).from_pretrained(folder)  # type: ignore[attr-defined]


def read_base_config(name: str) -> Any:
    """The configuration of a base model, which may be a compressed folder, without its weights.

    Raises:
        UserError: nothing of that name.
    """
    folder = Path(resolve(name))
    return read_config(folder) if is_compressed(folder) else load_config(name)


def build_skeleton(config: Any) -> Any:
    """A model of a configuration's widths: parameters on the meta device, to be assigned; buffers real."""
    from accelerate import init_empty_weights

    family, anatomy = family_of(config)
    uniform = compressed_config_class(family)(
        **{k: v for k, v in plain_dict(config).items() if k != "per_layer_config"}
    )
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, anatomy.model_class)(uniform)
    widths = architecture_of(config)
    model.tie_weights()  # taken apart on the meta device
    narrow_(model, [(range(g), range(c)) for g, c in zip(widths.kv_groups, widths.ffn_channels, strict=True)])
    return model


def _model_class_name(config: Any) -> str:
    name: str = family_of(config)[1].model_class
    return f"Compressed{name}" if config.model_type.startswith(COMPRESSED) else name


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder)!r} holds no compressed model: cannot read its {MANIFEST} ({error}).") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{str(path)!r} holds no manifest of a compressed model. Copy the folder again.")
    if manifest.get("kind") != KIND or manifest.get("version") != VERSION:
        raise UserError(
            f"{str(path)!r} is of kind {manifest.get('kind')!r}, version {manifest.get('version')!r}; "
            f"this qpruner reads {KIND!r}, version {VERSION}."
        )
    try:
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        unlisted = {"config.json", PLAN} - listed.keys()
        _ = manifest["base"]["name"], manifest["base"]["sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(path)!r} lacks {error}. Copy the folder again.") from error
    if unlisted:
        raise UserError(f"{str(path)!r} does not list {', '.join(sorted(unlisted))}. Copy the folder again.")
    return manifest


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file that it lists was found to be as it says."""
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{str(path)!r} is missing. Copy the whole folder again.")
        size = path.stat().st_size
        if size != expected["size"]:
            raise UserError(
                f"{str(path)!r} has {size:,} bytes instead of {expected['size']:,}: it was cut off or altered. "
                f"Copy the folder again."
            )
        if hash_file(path) != expected["sha256"]:
            raise UserError(f"{str(path)!r} was altered: its SHA-256 is not {expected['sha256']}. Copy it again.")
    return manifest


def _write_manifest(folder: Path, base: dict[str, Any], adapters: str | None = None) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in _files(folder)
    }
    write_json(
        folder / MANIFEST, {"kind": KIND, "version": VERSION, "base": base, "adapters": adapters, "files": files}
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
