"""The folder of a compressed model: written whole, read from safetensors and JSON alone, checked before it is read.

config.json, generation_config.json    widths, where transformers alone can express them in its own types
model*.safetensors, *.index.json       the compressed base
tokenizer*, chat templates, code       of the base
plan.json                              what was kept of the dense model
adapter/                               LoRA adapters in PEFT's layout, once they are trained
manifest.json                          version, base model, what was done to it, size and SHA-256 of every file above
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qpruner.anatomy import COMPRESSED, FAMILIES, architecture_of, family_of
from qpruner.conv1d import conv1d_to_linear_
from qpruner.errors import UserError, brief, cut, listed
from qpruner.files import MALFORMED, read_json, reading, replacing_folder, write_json
from qpruner.folder_manifest import (
    ADAPTER,
    CONFIG,
    COPY_AGAIN,
    KIND,
    MANIFEST,
    PLAN,
    VERSION,
    Step,
    entries_of,
    identity_of,
    is_compressed,
    read_checked_manifest,
    read_manifest,
)
from qpruner.memory import tensor_bytes
from qpruner.plan import MOST_LAYERS, CompressionPlan, describe_differences
from qpruner.pretrained import (
    hold_in_,
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve,
    save_tokenizer,
)
from qpruner.pruning.surgery import narrow_
from qpruner.pruning.widths import compressed_config_class, portable_config, skeleton_config, with_widths
from qpruner.quantization.apply import linear_precisions
from qpruner.quantization.embedding import rebuild_tables_
from qpruner.quantization.model import rebuild_linears_
from qpruner.quantization.packed import PackedLinear
from qpruner.schema import read_as

GENERATION = "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
ANYTHING = (Exception,)
"""What transformers and PEFT raise over content that they did not expect: they check little of it."""


class Configuration(TypedDict):
    """What must be known of ``config.json`` before transformers may read it."""

    model_type: str
    num_hidden_layers: NotRequired[int]


@dataclass(frozen=True)
class KeptBase:
    """What a folder holds beside the adapters.

    Args:
        network: the compressed base, frozen, in evaluation mode on the CPU.
        plan: what of the dense model it holds, and how.
        base_name: folder or hub name of the dense model.
        base_sha256: fingerprint of the dense model.
        state: how far its compression has come; see `qpruner.compressed.State`.
        recipe: what was done to the dense model, in order.
        sha256: hash of what the manifest says of the base, by which the base is known.
    """

    network: Any
    plan: CompressionPlan
    base_name: str
    base_sha256: str | None
    state: str
    recipe: tuple[Step, ...]
    sha256: str


def load_compressed(folder: str | Path) -> Any:
    """The model of a compressed folder, with its adapters when it has any, in evaluation mode on the CPU.

    A folder that was copied is to be loaded by this: PEFT alone looks for the base where the folder was written, and
    may find another model there.

    Args:
        folder: such as ``runs/quickstart/model``.

    Raises:
        UserError: not such a folder, of another version, or a file is missing, cut off or altered.
    """
    import peft

    folder = Path(folder).expanduser()
    model = load_base(folder).network
    if has_adapters(folder):
        path = folder / ADAPTER_CONFIG
        with reading(path, COPY_AGAIN, ANYTHING):
            config = peft.PeftConfig.from_pretrained(str(path.parent))
            if config.peft_type != peft.PeftType.LORA:
                raise UserError(f"It is of PEFT type {brief(config.peft_type)}; a compressed folder holds LORA.")
            config.base_model_name_or_path = str(folder.absolute())  # wherever it was written
            model = peft.PeftModelForCausalLM(model, config)
        load_adapters(folder, model)
        model.requires_grad_(False)
    return model.eval()


def load_base(folder: str | Path, *, check_hashes: bool = True) -> KeptBase:
    """The compressed base of a folder, without adapters.

    Args:
        folder: that `save_base` or `write_base` wrote.
        check_hashes: whether every file is read and compared with its hash, beside its size.

    Raises:
        UserError: as `load_compressed`.
    """
    folder = Path(folder).expanduser()
    manifest = read_checked_manifest(folder, hashes=check_hashes)
    config, plan = read_config(folder), read_plan(folder)
    # A uniform Llama may have been written as a Mistral.
    written = replace(architecture_of(config), model_type=plan.architecture.model_type)
    if differences := describe_differences(plan.widths, written):
        raise UserError(f"The plan in {str(folder)!r} is not that of its weights: {differences}. {COPY_AGAIN}")
    with reading(folder / CONFIG, COPY_AGAIN, ANYTHING):
        model = hold_in_(build_skeleton(config), config.dtype)  # packed linears take theirs from it
    state: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors") and "/" not in name:
            state |= _load_tensors(folder / name)
    with reading(folder, COPY_AGAIN):
        if plan.quantized:
            rebuild_linears_(model, linear_precisions(model, plan), state)
            rebuild_tables_(model, plan.embedding, plan.head, state, dtype=config.dtype)
        try:
            left = model.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:  # another shape, or no floating point
            raise UserError(f"The weights are not those of its configuration: {cut(error)}") from error
        model.tie_weights()
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing or left.unexpected_keys:
            raise UserError(
                f"The weights are not those of its configuration: missing {listed(missing)}, unexpected "
                f"{listed(left.unexpected_keys)}."
            )
        dtype = config.dtype or model.dtype
        if others := [name for name, weight in _dense_weights(model) if weight.dtype != dtype]:
            raise UserError(f"The weights are not those of its configuration: {listed(others)} should be of {dtype}.")
    model.requires_grad_(False)
    if GENERATION in manifest["files"]:
        with reading(folder / GENERATION, COPY_AGAIN, ANYTHING):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    base = manifest["base"]
    return KeptBase(
        model.eval(),
        plan,
        base["name"],
        base["sha256"],
        manifest["state"],
        tuple(manifest["recipe"]),
        identity_of(manifest),
    )


def save_base(
    folder: Path,
    model: Any,
    plan: CompressionPlan,
    *,
    base_name: str,
    state: str | None = None,
    recipe: Sequence[Step] = (),
    tokenizer: Any | None,
) -> None:
    """Writes a compressed base; the folder appears whole, with its manifest, or not at all.

    Args:
        folder: to write; what is there goes.
        model: without adapters.
        plan: that made it.
        base_name: folder or hub name of the dense model.
        state: how far its compression has come; see `qpruner.compressed.State`. By default as the plan has it.
        recipe: what was done to the dense model, in order.
        tokenizer: to put beside it.

    Raises:
        UserError: the disk has no room for it.
    """
    with replacing_folder(folder) as temporary:
        write_base(temporary, model, plan, base_name=base_name, state=state, recipe=recipe, tokenizer=tokenizer)


def write_base(
    folder: Path,
    model: Any,
    plan: CompressionPlan,
    *,
    base_name: str,
    state: str | None = None,
    recipe: Sequence[Step] = (),
    tokenizer: Any | None,
) -> None:
    """As `save_base`, to a folder that somebody else puts in its place when it is whole."""
    needed, free = tensor_bytes(model), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"The compressed base needs {needed:,} bytes in {str(folder.parent)!r} and the disk has {free:,} left. "
            f"Free some, or name another place with --run.dir."
        )
    model.save_pretrained(folder)
    # In place of what `save_pretrained` makes of the configuration that the model computes with.
    portable = with_widths(model.config, plan.widths) if plan.quantized else portable_config(model.config)
    portable.architectures = [_model_class_name(portable)]
    portable.to_json_file(folder / CONFIG)  # as it is: transformers cannot read what is packed
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    plan.write(folder / PLAN)
    manifest = {
        "kind": KIND,
        "version": VERSION,
        "base": {"name": base_name, "sha256": plan.base_sha256},
        "state": state or ("quantized" if plan.quantized else "pruned"),
        "recipe": list(recipe),
        "adapters": None,
        "files": entries_of(folder),
    }
    write_json(folder / MANIFEST, manifest)


def rehearse_saving(base: str, config: Any, tokenizer: Any, *, trust_remote_code: bool = False) -> None:
    """Finds, before any work with a model, that something cannot be written which its folder holds beside weights.

    Args:
        base: folder or hub name of the model that is going to be compressed.
        config: its configuration.
        tokenizer: to be put beside it.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        UserError: its configuration, generation configuration or tokenizer cannot be saved, or the tokenizer not be
            loaded again.
    """
    generation = load_generation_config(base)
    with TemporaryDirectory(prefix="qpruner-") as temporary:
        folder = Path(temporary) / "rehearsal"  # transformers keeps the code of a tokenizer under its folder's name
        steps: dict[str, Callable[[], object]] = {
            "configuration": lambda: config.save_pretrained(folder),
            "generation configuration": lambda: generation and generation.save_pretrained(folder),
            "tokenizer": lambda: _rehearse_tokenizer(tokenizer, folder, trust_remote_code),
        }
        for name, save in steps.items():
            try:
                save()
            except Exception as error:  # a tokenizer may be anybody's code, which raises what it likes
                raise UserError(
                    f"The {name} of {base!r} cannot be saved beside a compressed model ({type(error).__name__}: "
                    f"{error}). Mend its files."
                ) from error


def _rehearse_tokenizer(tokenizer: Any, folder: Path, trust_remote_code: bool) -> None:
    save_tokenizer(tokenizer, folder)
    load_tokenizer(str(folder), trust_remote_code=trust_remote_code)


def save_adapters(folder: Path, model: Any, *, trained: bool, place: Path | None = None) -> None:
    """Adds the adapters of a PEFT model to the folder of its base, and to the manifest.

    PEFT finds the base from anywhere as long as the folder lies where it was written; `load_compressed` wherever it is.

    Args:
        folder: that `save_base` or `write_base` wrote.
        model: the PEFT model.
        trained: whether a fit has trained them, or they are what a fit starts from.
        place: where the folder is going to lie, if not where it is.
    """
    manifest = read_manifest(folder)
    of_base = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{ADAPTER}/")}
    # Cut off from here on, the folder is that of the base alone.
    write_json(folder / MANIFEST, manifest | {"files": of_base, "adapters": None})
    with replacing_folder(folder / ADAPTER) as temporary:
        _write_adapters(temporary, model, _name_for_peft(folder, (place or folder).absolute()))
    files = of_base | {f"{ADAPTER}/{name}": entry for name, entry in entries_of(folder / ADAPTER).items()}
    write_json(folder / MANIFEST, manifest | {"files": files, "adapters": "trained" if trained else "initial"})


def _write_adapters(folder: Path, model: Any, base: str) -> None:
    # Left to itself, PEFT looks the base up by its name, to see whether embeddings were resized.
    model.save_pretrained(folder, save_embedding_layers=False)
    # It would name the model that was compressed, not the base that these are for.
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": base})
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


def _name_for_peft(folder: Path, place: Path) -> str:
    """What PEFT, and transformers behind it, are to look for as the base: its folder.

    Where transformers cannot load that, its error repeats the name it was given, and so that says what can.
    """
    portable = not read_json(folder / "config.json")["model_type"].startswith(COMPRESSED)
    return str(place) if portable else f"qpruner.load_compressed({str(place)!r})"


class AdapterKind(TypedDict):
    """What ``adapter_config.json`` says of adapters that others must have, too, to begin with their values."""

    r: int
    lora_alpha: float


def check_adapters(folder: Path, *, rank: int, alpha: float) -> None:
    """Makes sure that the adapters of a compressed folder are of a kind.

    Args:
        folder: that holds adapters.
        rank: r that they are to have.
        alpha: numerator that they are to have of what the forward pass multiplies by.

    Raises:
        UserError: they are of another kind, or the file is damaged.
    """
    stored = read_as(folder / ADAPTER_CONFIG, AdapterKind, remedy=COPY_AGAIN)
    pairs = {"r": (stored["r"], rank), "alpha": (stored["lora_alpha"], alpha)}
    if differences := [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]:
        raise UserError(
            f"The adapters in {str(folder)!r} are of another kind: {', '.join(differences)}. Use the --model.lora of "
            f"its run."
        )


def load_adapters(folder: Path, model: Any) -> None:
    """Gives a PEFT model the adapters of its base's folder.

    Raises:
        UserError: the file is damaged, or does not hold the adapters of this model.
    """
    from peft import set_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    state = _load_tensors(path)
    with reading(path, COPY_AGAIN, ANYTHING):  # such as an adapter of another shape
        left = set_peft_model_state_dict(model, state)
        missing = [name for name in left.missing_keys if "lora_" in name]
        if missing or left.unexpected_keys:
            raise UserError(
                f"It holds other adapters than the model has: missing {listed(missing)}, unexpected "
                f"{listed(left.unexpected_keys)}."
            )
        if integers := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
            raise UserError(f"The weights of adapters are floating point, not {state[integers[0]].dtype}.")


def _dense_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that are not packed, and so compute in the dtype that they are held in."""
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            yield from module.named_parameters(name, recurse=False)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return load_file(path)
    except (*MALFORMED, SafetensorError, KeyError, RuntimeError) as error:  # the last two: a dtype unknown to torch
        raise UserError(f"{str(path)!r} is not a safetensors file: {cut(error)}. {COPY_AGAIN}") from error


def read_plan(folder: Path) -> CompressionPlan:
    """The plan of a compressed folder."""
    return CompressionPlan.read(folder / PLAN)


def has_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters."""
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= read_manifest(folder)["files"].keys()


def has_trained_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters as a fit left them."""
    return has_adapters(folder) and read_manifest(folder).get("adapters") == "trained"


def has_initial_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters that no fit has trained yet."""
    return has_adapters(folder) and read_manifest(folder).get("adapters") == "initial"


def read_config(folder: Path) -> Any:
    """The configuration of a compressed folder, of a class that can express its widths.

    Raises:
        UserError: it is damaged, or of a model that cannot be pruned.
    """
    path = folder / CONFIG
    content = read_as(path, Configuration, remedy=COPY_AGAIN)
    model_type = content["model_type"]
    with reading(path, COPY_AGAIN, ANYTHING):
        # Transformers makes lists of that length, whatever it is.
        if not 0 < content.get("num_hidden_layers", 1) <= MOST_LAYERS:
            raise UserError(f"num_hidden_layers is {content['num_hidden_layers']}; it must be 1 to {MOST_LAYERS}.")
        if not model_type.startswith(COMPRESSED):
            config = transformers.AutoConfig.from_pretrained(folder)
        elif (family := model_type.removeprefix(COMPRESSED)) in FAMILIES:
            config = compressed_config_class(family).from_pretrained(folder)  # type: ignore[attr-defined]
        else:
            raise UserError(f"It is of a model of type {brief(model_type)}, which this qpruner does not know.")
        architecture_of(config)  # has widths
    return config


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

    _, anatomy = family_of(config)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, anatomy.model_class)(skeleton_config(config))
        conv1d_to_linear_(model)
    widths = architecture_of(config)
    model.tie_weights()  # taken apart on the meta device
    narrow_(model, [(range(g), range(c)) for g, c in zip(widths.kv_groups, widths.ffn_channels, strict=True)])
    return model


def _model_class_name(config: Any) -> str:
    name: str = family_of(config)[1].model_class
    return f"Compressed{name}" if config.model_type.startswith(COMPRESSED) else name
