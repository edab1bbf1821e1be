"""The folder of a compressed model: written whole, read from safetensors and JSON alone, checked before it is read.

config.json, generation_config.json    widths, where transformers alone can express them in its own types
model*.safetensors, *.index.json       the compressed base
tokenizer*                             of the base
plan.json                              what was kept of the dense model
adapter/                               LoRA adapters in PEFT's layout, once they are trained
manifest.json                          version, base model, size and SHA-256 of every file above
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qpruner.anatomy import COMPRESSED, FAMILIES, architecture_of, family_of
from qpruner.errors import UserError
from qpruner.files import hash_file, read_json, replacing_folder, write_json
from qpruner.memory import tensor_bytes
from qpruner.plan import CompressionPlan, describe_differences
from qpruner.pretrained import load_config, resolve
from qpruner.pruning.surgery import narrow_
from qpruner.pruning.widths import compressed_config_class, plain_dict, portable_config, with_widths
from qpruner.quantization.apply import linear_precisions
from qpruner.quantization.embedding import rebuild_tables_
from qpruner.quantization.model import rebuild_linears_

KIND, VERSION = "qpruner model", 1
MANIFEST, PLAN, ADAPTER = "manifest.json", "plan.json", "adapter"
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"


@dataclass(frozen=True)
class CompressedBase:
    """What a folder holds beside the adapters.

    Args:
        model: the compressed base, in evaluation mode on the CPU.
        plan: that made it.
        base_name: folder or hub name of the dense model.
        base_sha256: fingerprint of the dense model.
        loftq_iterations: with which it was quantized.
    """

    model: Any
    plan: CompressionPlan
    base_name: str
    base_sha256: str | None
    loftq_iterations: int


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
        config = peft.PeftConfig.from_pretrained(str(Path(folder) / ADAPTER))
        model = peft.PeftModelForCausalLM(model, config)
        load_adapters(Path(folder), model)
        model.requires_grad_(False)
    return model.eval()


def load_base(folder: str | Path) -> CompressedBase:
    """The compressed base of a folder, without adapters.

    Raises:
        UserError: as `load_compressed`.
    """
    folder = Path(folder).expanduser()
    manifest = _checked_manifest(folder)
    config, plan = read_config(folder), read_plan(folder)
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
    base = manifest["base"]
    return CompressedBase(model.eval(), plan, base["name"], base["sha256"], base["loftq_iterations"])


def save_base(
    folder: Path,
    model: Any,
    plan: CompressionPlan,
    *,
    base_name: str,
    tokenizer: Any | None,
    loftq_iterations: int = 0,
) -> None:
    """Writes a compressed base; the folder appears whole, with its manifest, or not at all.

    Args:
        folder: to write; what is there goes.
        model: without adapters.
        plan: that made it.
        base_name: folder or hub name of the dense model.
        tokenizer: to put beside it.
        loftq_iterations: with which the model was quantized.

    Raises:
        UserError: the disk has no room for it.
    """
    needed, free = tensor_bytes(model), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"The compressed base needs {needed:,} bytes in {str(folder.parent)!r} and the disk has {free:,} left. "
            f"Free some, or name another place with --run.dir."
        )
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        # In place of what `save_pretrained` makes of the configuration that the model computes with.
        portable = with_widths(model.config, plan.widths) if plan.quantized else portable_config(model.config)
        portable.architectures = [_model_class_name(portable)]
        portable.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        plan.write(temporary / PLAN)
        base = {"name": base_name, "sha256": plan.base_sha256, "loftq_iterations": loftq_iterations}
        files = _entries(temporary, temporary.iterdir())
        manifest = {"kind": KIND, "version": VERSION, "base": base, "adapters": None, "files": files}
        write_json(temporary / MANIFEST, manifest)


def save_adapters(folder: Path, model: Any, *, trained: bool) -> None:
    """Adds the adapters of a PEFT model to the folder of its base, and to the manifest.

    Args:
        folder: that `save_base` wrote.
        model: the PEFT model.
        trained: whether a fit has trained them, or they are what a fit starts from.
    """
    manifest = _manifest(folder)
    of_base = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{ADAPTER}/")}
    # Cut off from here on, the folder is that of the base alone.
    write_json(folder / MANIFEST, manifest | {"files": of_base, "adapters": None})
    with replacing_folder(folder / ADAPTER) as temporary:
        _write_adapters(temporary, model)
    files = of_base | _entries(folder, (folder / ADAPTER).iterdir())
    write_json(folder / MANIFEST, manifest | {"files": files, "adapters": "trained" if trained else "initial"})


def _write_adapters(folder: Path, model: Any) -> None:
    # Left to itself, PEFT looks the base up by its name, to see whether embeddings were resized.
    model.save_pretrained(folder, save_embedding_layers=False)
    # It names the place of the base as this machine has it; the base is the folder above.
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": ".."})
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


def load_adapters(folder: Path, model: Any) -> None:
    """Gives a PEFT model the adapters of its base's folder."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def is_compressed(folder: Path) -> bool:
    """Whether a folder says that it holds a compressed model."""
    return (folder / MANIFEST).is_file() and (folder / PLAN).is_file()


def read_plan(folder: Path) -> CompressionPlan:
    """The plan of a compressed folder."""
    return CompressionPlan.read(folder / PLAN)


def has_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters."""
    listed = _manifest(folder)["files"].keys()
    return {f"{ADAPTER}/adapter_config.json", ADAPTER_WEIGHTS} <= listed


def has_trained_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters as a fit left them."""
    return has_adapters(folder) and _manifest(folder).get("adapters") == "trained"


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


def read_base_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a base model, which may be a compressed folder, without its weights.

    Raises:
        UserError: nothing of that name.
    """
    folder = Path(resolve(name))
    return read_config(folder) if is_compressed(folder) else load_config(name, trust_remote_code=trust_remote_code)


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
        _ = [manifest["base"][key] for key in ("name", "sha256", "loftq_iterations")]
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


def _entries(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of files: their sizes and hashes, by their path in the folder."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(files)
    }
