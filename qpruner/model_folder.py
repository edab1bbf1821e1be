"""The folder of a compressed model: written whole, read from safetensors and JSON alone, checked before it is read.

config.json, generation_config.json    widths in transformers' own terms, and what the modelling file has to know
modeling_compressed.py                 what transformers needs to load it, where its own classes cannot build it
model*.safetensors, *.index.json       the compressed base
tokenizer*, chat templates, code       of the base
plan.json                              what was kept of the dense model
reference/                             logits behind a few prompts, as the model gave them when it was written
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
from torch import Tensor, nn

from qpruner.adapter_files import ADAPTER_CONFIG, has_adapters, load_adapters
from qpruner.anatomy import COMPRESSED, FAMILIES, architecture_of, family_of
from qpruner.architecture import MOST_LAYERS
from qpruner.conv1d import conv1d_to_linear_
from qpruner.errors import UserError, brief, cut, listed
from qpruner.experts import experts_to_linears_
from qpruner.files import reading, replacing_folder, write_json
from qpruner.folder_manifest import (
    ANYTHING,
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
)
from qpruner.memory import tensor_bytes
from qpruner.plan import CompressionPlan, describe_differences
from qpruner.pretrained import (
    hold_in_,
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve,
    save_tokenizer,
)
from qpruner.pruning.surgery import first_units, narrow_, stated_by_weights
from qpruner.pruning.widths import compressed_config_class, portable_config, skeleton_config, with_widths
from qpruner.quantization.apply import linear_precisions
from qpruner.quantization.embedding import rebuild_tables_
from qpruner.quantization.model import rebuild_linears_
from qpruner.quantization.packed import PackedLinear
from qpruner.reference_logits import record_logits
from qpruner.remote_code import add_code, needs_code
from qpruner.schema import read_as
from qpruner.tensor_files import load_tensors

GENERATION = "generation_config.json"


class Configuration(TypedDict):
    """What must be known of ``config.json`` before transformers may read it."""

    model_type: str
    num_hidden_layers: NotRequired[int]


@dataclass(frozen=True)
class KeptBase:
    """What a folder holds beside the adapters.

    Args:
        network: the compressed base, frozen, in evaluation mode on the CPU.
        plan: units of the dense model that the base holds, and how.
        base_name: folder or hub name of the dense model.
        base_sha256: fingerprint of the dense model.
        state: how far the compression of the base has come; see `qpruner.compressed.State`.
        recipe: what was done to the dense model, in order.
        sha256: hash of the base's entries in the manifest, which identifies the base.
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

    Use this to load a folder that was copied: PEFT alone looks for the base where the folder was written, and may find
    another model there.

    Args:
        folder: folder of a compressed model, such as ``runs/quickstart/model``.

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
        folder: folder that `save_base` or `write_base` wrote.
        check_hashes: whether every file is read and compared with its hash, beside its size.

    Raises:
        UserError: not such a folder, of another version, or a file is missing, cut off or altered.
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
            state |= load_tensors(folder / name)
    with reading(folder, COPY_AGAIN):
        if plan.quantized:
            rebuild_linears_(model, linear_precisions(model, plan), state)
            rebuild_tables_(model, plan.embedding, plan.head, state)
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
        folder: folder to write, whose present content is removed.
        model: compressed model without adapters.
        plan: plan that the model holds.
        base_name: folder or hub name of the dense model.
        state: how far the compression has come; see `qpruner.compressed.State`. By default as far as the plan goes.
        recipe: what was done to the dense model, in order.
        tokenizer: tokenizer to write beside the model; None for none.

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
    portable.architectures = [model_class_name(portable)]
    if needs_code(portable):
        add_code(folder, portable, model)
    portable.to_json_file(folder / CONFIG)  # as it is: transformers cannot read what is packed
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    plan.write(folder / PLAN)
    record_logits(folder, model)
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
    """Makes sure, before any work with a model, that everything in its folder beside weights can be written.

    Args:
        base: folder or hub name of the model that is going to be compressed.
        config: configuration of that model.
        tokenizer: tokenizer that is going to be written beside the model; None for none.
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


def _dense_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that are not packed, and so compute in the dtype that they are held in."""
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            yield from module.named_parameters(name, recurse=False)


def read_plan(folder: Path) -> CompressionPlan:
    """The plan of a compressed folder."""
    return CompressionPlan.read(folder / PLAN)


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
        UserError: there is no model of that name.
    """
    folder = Path(resolve(name))
    return read_config(folder) if is_compressed(folder) else load_config(name, trust_remote_code=trust_remote_code)


def build_skeleton(config: Any) -> Any:
    """A model of a configuration's widths: parameters on the meta device, to be assigned; buffers real."""
    from accelerate import init_empty_weights

    _, anatomy = family_of(config)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, anatomy.model_class)(skeleton_config(config))
        experts_to_linears_(conv1d_to_linear_(model))
    widths = architecture_of(config)
    model.tie_weights()  # taken apart on the meta device
    narrow_(model, first_units(stated_by_weights(model), widths))
    return model


def model_class_name(config: Any) -> str:
    """The name of the class that loads a model, in transformers or in `qpruner.modeling_compressed`."""
    name: str = family_of(config)[1].model_class
    return f"Compressed{name}" if config.model_type.startswith(COMPRESSED) else name
