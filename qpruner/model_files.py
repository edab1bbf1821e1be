"""Identifies the content of a folder given as a base model: its weight files, or what the folder holds instead."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError, safe_open

from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.folder_manifest import is_compressed
from qpruner.schema import read_as

CONFIG, ADAPTERS = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FETCH_AGAIN = "Fetch the file again."
LFS_POINTER = b"version https://git-lfs"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")
OTHER_LAYOUTS = {
    "model_index.json": "a diffusers pipeline, not a language model",
    "modules.json": "a sentence-transformers model, not a language model",
    "*.gguf": "a GGUF file; transformers makes a folder of it with `from_pretrained(folder, gguf_file=...)`",
    "params.json": "weights in the layout of their makers; transformers converts them with the script of their family",
}
"""What a folder without a config.json holds, by the file that gives it away."""
OTHER_WEIGHTS = {
    "*.gguf": "GGUF. Transformers makes safetensors of it: `from_pretrained(folder, gguf_file=...)`, `save_pretrained`",
    **dict.fromkeys(
        ("*.bin", "*.pth", "*.pt", "*.ckpt"),
        "pickles, which may run code as they are opened. Where you trust them, load the model with transformers and "
        "`save_pretrained` it, which writes safetensors",
    ),
}
"""In what a folder without safetensors may hold its weights."""


class Index(TypedDict):
    """What must be known of the file that says in which shard each tensor lies."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that make the model, as transformers chooses them; none where there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted(
            {folder / shard for shard in read_as(folder / INDEX, Index, remedy=FETCH_AGAIN)["weight_map"].values()}
        )
    return []


def check_is_model(folder: Path) -> None:
    """Makes sure that a folder is that of a model, as far as its names tell.

    Raises:
        UserError: it is of adapters, of a run, of another kind of model, or a file is still to be fetched.
    """
    if (folder / ADAPTERS).is_file():
        raise UserError(adapters_are_no_base(str(folder), folder / ADAPTERS, beside=(folder / CONFIG).is_file()))
    if not (folder / CONFIG).is_file():
        raise UserError(_without_configuration(folder))
    check_fetched(file for file in folder.iterdir() if file.suffix in (".json", ".py"))


def _without_configuration(folder: Path) -> str:
    refusal = f"Cannot load a model from {str(folder)!r}: it holds no {CONFIG}"
    instead = next((kind for pattern, kind in OTHER_LAYOUTS.items() if any(folder.glob(pattern))), None)
    # Such as the folder of a run, or one with the checkpoints of a training.
    inside = sorted(str(file.parent) for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{CONFIG}"))
    if instead is None and inside:
        verb = "does" if len(inside) == 1 else "do"
        return f"{refusal}; {', '.join(map(repr, inside[:3]))} {verb}. Give the folder of the model itself."
    if instead is None and has_tokenizer(folder):
        instead = "a tokenizer alone"
    return (
        f"{refusal}{f', but {instead}' if instead else ''}. Give a folder as `save_pretrained` of transformers writes "
        f"it: {CONFIG}, safetensors and a tokenizer."
    )


def check_weights(folder: Path) -> None:
    """Makes sure that the weights of a model's folder are there and whole, without reading more than their headers.

    Raises:
        UserError: they are of another format, or a file is missing, cut off or still to be fetched.
    """
    files = weight_files(folder)
    if not files:
        if shards := sorted(folder.glob("model-*.safetensors")):
            raise UserError(f"{str(folder)!r} holds {shards[0].name!r} and no {INDEX}. Fetch that, too.")
        kind = next((kind for pattern, kind in OTHER_WEIGHTS.items() if any(folder.glob(pattern))), None)
        if kind is None:
            raise UserError(f"{str(folder)!r} holds no weights ({WEIGHTS}, or shards with {INDEX}). Fetch them, too.")
        raise UserError(f"{str(folder)!r} holds no safetensors; its weights are {kind}.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{str(folder)!r} lacks {', '.join(missing)}, which its {INDEX} names. Fetch the missing files."
        )
    check_fetched(files)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{str(file)!r} is no safetensors file, or was cut off ({error}). Fetch the file again."
            ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer may be made from."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def check_fetched(files: Iterable[Path]) -> None:
    """Makes sure that files are what they stand for.

    Raises:
        UserError: one is the pointer that Git leaves in the place of a large file.
    """
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{str(file)!r} is a pointer of Git LFS in the place of the file. Fetch the files that it stands "
                    f"for: `git lfs pull` in that folder."
                )


def adapters_are_no_base(name: str, adapter_config: Path, *, beside: bool) -> str:
    """Why a folder or hub model with adapters is no base, and what to do.

    Those of a run lie in the folder of their base, whose own file may be packed.

    Args:
        name: name of the folder or of the hub model.
        adapter_config: file that describes the adapters.
        beside: whether they lie beside a whole model.
    """
    check_fetched([adapter_config])
    described = read_json(adapter_config)
    base = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    if is_compressed(compressed := adapter_config.absolute().parent.parent):
        return (
            f"{name!r} holds the adapters of a compressed model, and a base has none. To build on them, make a dense "
            f"copy with `qpruner merge {compressed} FOLDER` and give that; to do without them, give "
            f"{str(compressed)!r}."
        )
    without = "take the adapter_* files out of it" if beside else f"give their base{f', {base!r}' if base else ''}"
    return (
        f"{name!r} holds adapters of PEFT ({ADAPTERS}){' beside a model' if beside else ''}, and a base has none. "
        f"To build on them, merge them with PEFT first (`merge_and_unload`, `save_pretrained`) and give that folder; "
        f"to do without them, {without}."
    )
