"""The adapters in the folder of a compressed model, in PEFT's layout, beside the base that they belong to."""

from pathlib import Path
from typing import Any, TypedDict

from qpruner.errors import UserError, listed
from qpruner.files import read_json, reading, replacing_folder, write_json
from qpruner.folder_manifest import ADAPTER, ANYTHING, COPY_AGAIN, MANIFEST, entries_of, read_manifest
from qpruner.reference_logits import record_logits
from qpruner.schema import read_as
from qpruner.tensor_files import load_tensors, tensor_names

ADAPTER_CONFIG, ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"

WRAPPED, FACTOR = "base_model.model.", ".lora_A.weight"
"""Beginning and end, around the name of its linear, of the name of an adapter's first factor."""


def save_adapters(folder: Path, model: Any, *, trained: bool, place: Path | None = None) -> None:
    """Adds the adapters of a PEFT model to the folder of its base, and to the manifest.

    PEFT finds the base from any directory as long as the folder is where it was written, with
    ``trust_remote_code=True`` where the base needs its modelling file; `load_compressed` finds it wherever the folder
    is.

    Args:
        folder: folder that `save_base` wrote.
        model: PEFT model that holds the adapters.
        trained: whether a fit has trained the adapters; otherwise they are what a fit starts from.
        place: final path of the folder; None for its present path.
    """
    manifest = read_manifest(folder)
    of_base = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{ADAPTER}/")}
    # If interrupted after this, the folder still is a valid one of the base alone.
    write_json(folder / MANIFEST, manifest | {"files": of_base, "adapters": None})
    with replacing_folder(folder / ADAPTER) as temporary:
        _write_adapters(temporary, model, str((place or folder).absolute()))
    files = of_base | {f"{ADAPTER}/{name}": entry for name, entry in entries_of(folder / ADAPTER).items()}
    write_json(folder / MANIFEST, manifest | {"files": files, "adapters": "trained" if trained else "initial"})


def _write_adapters(folder: Path, model: Any, base: str) -> None:
    # Left to itself, PEFT looks the base up by its name, to see whether embeddings were resized.
    model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT would name the original dense model, not the compressed base that the adapters belong to.
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": base})
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
    record_logits(folder, model)


class AdapterKind(TypedDict):
    """Fields of ``adapter_config.json`` in which new adapters must agree to be initialized from stored ones."""

    r: int
    lora_alpha: float


def check_adapters(folder: Path, *, rank: int, alpha: float) -> None:
    """Makes sure that the adapters of a compressed folder have the expected rank and alpha.

    Args:
        folder: folder of a compressed model with adapters.
        rank: expected rank r.
        alpha: expected alpha; the adapters' output is multiplied by ``alpha / r``.

    Raises:
        UserError: the adapters differ in one of these, or the file is damaged.
    """
    stored = read_as(folder / ADAPTER_CONFIG, AdapterKind, remedy=COPY_AGAIN)
    pairs = {"r": (stored["r"], rank), "alpha": (stored["lora_alpha"], alpha)}
    if differences := [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]:
        raise UserError(
            f"The adapters in {str(folder)!r} are of another kind: {', '.join(differences)}. Use the --model.lora of "
            f"its run."
        )


def load_adapters(folder: Path, model: Any) -> None:
    """Loads the adapters in the folder of a PEFT model's base into the model.

    Raises:
        UserError: the file is damaged, or does not hold the adapters of this model.
    """
    from peft import set_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    state = load_tensors(path)
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


def adapted_linears(folder: Path) -> set[str]:
    """The names of the linears of a compressed folder that have adapters, without reading any weight.

    Raises:
        UserError: the file is damaged.
    """
    names = tensor_names(folder / ADAPTER_WEIGHTS) if has_adapters(folder) else []
    ends = [name for name in names if name.endswith(FACTOR)]
    return {name.removeprefix(WRAPPED).removesuffix(FACTOR) for name in ends}


def has_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters."""
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= read_manifest(folder)["files"].keys()


def has_trained_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters as a fit left them."""
    return has_adapters(folder) and read_manifest(folder).get("adapters") == "trained"


def has_initial_adapters(folder: Path) -> bool:
    """Whether a compressed folder holds adapters that no fit has trained yet."""
    return has_adapters(folder) and read_manifest(folder).get("adapters") == "initial"
