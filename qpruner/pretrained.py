"""Base models and tokenizers from a folder, a hub name, or the one that the package brings."""

from pathlib import Path
from typing import Any, Literal

import torch

from qpruner.errors import UserError
from qpruner.files import hash_file, hash_json

EMBEDDED = "qpruner/stories"
"""The name of the small story teller that comes with the package."""

DType = Literal["float32", "bfloat16", "float16"]


def resolve(name: str) -> str:
    """A folder or a hub name that transformers understands.

    Raises:
        UserError: the name is a path and there is no such folder.
    """
    if name == EMBEDDED:
        return str(Path(__file__).parent / "stories" / "checkpoint")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no folder {name!r}. Give a model folder, a hub name or {EMBEDDED!r}.")
    return name


def is_reachable(name: str) -> bool:
    """Whether a name may be that of a model: it is no path, or there is a folder."""
    try:
        resolve(name)
    except UserError:
        return False
    return True


def load_model(name: str, *, dtype: DType, trust_remote_code: bool) -> Any:
    """The causal language model, in evaluation mode on the CPU; only safetensors are read, never a pickle.

    Raises:
        UserError: nothing of that name, or not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve(name), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise _cannot_load("model", name, error) from error


def load_config(name: str) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        UserError: nothing of that name.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise _cannot_load("configuration", name, error) from error


def load_generation_config(name: str) -> Any | None:
    """How a model generates text, as its generation_config.json says; None where it has none.

    Raises:
        UserError: it cannot be used. With the model, transformers would quietly leave out one that is not JSON.
    """
    from transformers import GenerationConfig

    place = resolve(name)
    try:
        return GenerationConfig.from_pretrained(place)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two where it holds no object
        if isinstance(error, OSError) and not (Path(place) / "generation_config.json").exists():
            return None
        raise UserError(
            f"The generation_config.json of {name!r} cannot be used ({error}). Mend that file, or delete it to do with "
            f"what config.json says."
        ) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        UserError: nothing of that name, or it holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", name, error) from error


def model_fingerprint(name: str) -> str | None:
    """SHA-256 over configuration and weights of a base model, from its folder or the local hub cache.

    None where the weights are not there.
    """
    folder = Path(resolve(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json", "*.safetensors"]))
    files = sorted(file for file in folder.iterdir() if file.name == "config.json" or file.suffix == ".safetensors")
    if not any(file.suffix == ".safetensors" for file in files):
        return None
    return hash_json({file.name: hash_file(file) for file in files})


def hold_in_(model: Any, dtype: torch.dtype) -> Any:
    """Gives the weights of a model another number format, as if it was loaded in it, and returns the model.

    Buffers, such as the rotary frequencies, keep theirs: angles at late positions need it. ``to`` would cast them, too.
    """
    for parameter in model.parameters():  # tied ones stay tied
        parameter.data = parameter.data.to(dtype)
    return model


def _cannot_load(kind: str, name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"Cannot load a {kind} from {name!r}: {error} Give a folder in the Hugging Face layout, the name of a hub "
        f"model that is reachable or already downloaded, or {EMBEDDED!r}."
    )
