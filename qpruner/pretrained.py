"""Base models and tokenizers from a folder, from the hub, or from the package itself."""

import copy
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from qpruner.anatomy import decoder_blocks, is_compressible
from qpruner.conv1d import conv1d_to_linear_
from qpruner.errors import UserError
from qpruner.experts import experts_to_linears_
from qpruner.files import hash_file, hash_json, read_json, write_json
from qpruner.loading_info import (
    check_architecture,
    check_loaded,
    check_number_formats,
    check_tied,
    check_tied_in_files,
    mend_padding_,
)
from qpruner.model_files import (
    adapters_are_no_base,
    check_fetched,
    check_is_model,
    check_weights,
    has_tokenizer,
    weight_files,
)
from qpruner.offload import Offload, offload_, opened
from qpruner.prequantized import (
    check_dequantizable,
    check_entry,
    dequantize,
    describe,
    drop_quantization,
    load_densely_,
    quantization_of,
    stores_codes,
)

EMBEDDED = "qpruner/stories"
"""The name of the small story teller that comes with the package."""

DType = Literal["auto", "float32", "bfloat16", "float16"]

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".py")
LONGEST_CAUSE = 300  # characters of what a library says
SPEAKERS = ("modeling_utils", "integrations.bitsandbytes", "configuration_utils")
TOLD_BY_US = (
    "LOAD REPORT",
    "This checkpoint seem corrupted",
    "we will NOT tie them",
    "The modules are dequantized",
    "to instantiate a model of type ``",  # of the tokenizer of a compressed folder
)
"""Messages that transformers logs on loading, whose content qpruner reports or refuses itself."""


def resolve(name: str) -> str:
    """A folder or a hub name that transformers understands.

    Raises:
        UserError: the name is empty, or a path and there is no such folder.
    """
    if name == EMBEDDED:
        return str(Path(__file__).parent / "stories" / "checkpoint")
    if not name.strip():
        raise UserError(f"The name of a model is empty. Give a model folder, a hub name or {EMBEDDED!r}.")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise UserError(f"{name!r} is a file. Give the folder of the model, such as {str(path.parent)!r}.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"There is no folder {name!r}. Give a model folder, a hub name or {EMBEDDED!r}.")
    return name


def is_reachable(name: str) -> bool:
    """Whether a name may be that of a model: it is no path, or there is a folder."""
    try:
        resolve(name)
    except UserError:
        return False
    return True


def held_in(config: Any, dtype: DType) -> torch.dtype:
    """The number format in which a base is held in memory.

    ``auto`` is bfloat16 where the base is stored in it, and float32 for all others: gradients through float16 overflow,
    and bfloat16 would round weights that are stored in float16.

    Args:
        config: configuration of the base.
        dtype: number format that was asked for.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if stored_in(config) is torch.bfloat16 else torch.float32


def stored_in(config: Any) -> torch.dtype:
    """The number format in which the weights of a base lie on disk, as its configuration says."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def load_model(
    name: str,
    *,
    dtype: DType,
    trust_remote_code: bool,
    say: Callable[[str], object] = warnings.warn,
    offload: Offload | None = None,
) -> Any:
    """The causal language model, in evaluation mode on the CPU; only safetensors are read, never a pickle.

    Weights that are quantized already are made dense.

    Args:
        name: folder, hub name, or `EMBEDDED`.
        dtype: number format of the weights; see `held_in`.
        trust_remote_code: whether code that comes with the model may run.
        say: function that is told what a person should know of the model, such as that it was quantized.
        offload: what puts the blocks of the model into files; None to hold them in memory.

    Raises:
        UserError: nothing of that name, no causal language model, or weights that are not those of its configuration.
    """
    with _loading("model", name):
        config = _read_config(name, trust_remote_code)
        quantization, held = quantization_of(config), held_in(config, dtype)
        if not is_compressible(config):
            offload = None
        # Files are mapped into memory as they are, so that another number format waits until blocks go one by one.
        loaded = held if offload is None else stored_in(config)
        model, left_out = _load(name, config, trust_remote_code, dtype=loaded, device="cpu")
        if offload is not None:
            offload_(model, offload)
            for block in decoder_blocks(model):
                with opened(model, block):
                    hold_in_(block, held)
            hold_in_(model, held)
        check_tied(name, model)
        if (padding := mend_padding_(config)) is not None:
            if model.generation_config is not None:  # which has the same and could not be written again
                model.generation_config.pad_token_id = None
            say(f"{name} names a padding token, {padding}, that its embedding has no row for; it is left out.")
        if left_out:
            say(f"{name} has tensors beside its language model, which are left out: {', '.join(left_out)}.")
        if quantization is not None and not _holds_codes(name, config):
            say(f"{name} has a quantization_config ({describe(quantization)}) over dense weights; it is left out.")
        elif quantization is not None:
            kept = str(held).removeprefix("torch.")
            say(f"{name} is quantized ({describe(quantization)}); its weights are made dense in {kept}.")
        return model


def check_model(name: str, *, trust_remote_code: bool) -> None:
    """Makes sure that a model can be loaded, from its configuration, the headers of its weights, and a head of its own.

    Raises:
        UserError: the model cannot be loaded; see `load_model`.
    """
    with _loading("model", name):
        config = _read_config(name, trust_remote_code)
        load_generation_config(name)
        if not _holds_codes(name, config):  # which cannot be loaded without their values
            model, _ = _load(name, config, trust_remote_code, dtype=torch.float32, device="meta")
            if (local := _local_folder(name)) is not None:
                check_tied_in_files(name, model, weight_files(local))


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model as `load_model` makes it, without its weights.

    Raises:
        UserError: nothing of that name, or quantized in a way that cannot be undone.
    """
    with _loading("configuration", name):
        config = _read_config(name, trust_remote_code)
        mend_padding_(config)
        return drop_quantization(config)


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

    with _loading("tokenizer", name):
        folder = Path(resolve(name))
        if folder.is_dir():
            check_fetched(file for file in folder.iterdir() if file.suffix in TOKENIZER_SUFFIXES)
            if not has_tokenizer(folder):
                check_is_model(folder)
                raise UserError(
                    f"{name!r} holds no tokenizer. Put that of the model there, such as its tokenizer.json and "
                    f"tokenizer_config.json."
                )
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer so that transformers can load it again, also one that comes with code of its own.

    Of that, ``save_pretrained`` names the class alone where `AutoTokenizer` expects two, slow and fast.
    """
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    written = read_json(path) if path.is_file() else {}
    classes = written.get("auto_map") or {}
    if isinstance(name := classes.get("AutoTokenizer"), str):
        pair = [None, name] if getattr(tokenizer, "is_fast", False) else [name, None]
        write_json(path, written | {"auto_map": classes | {"AutoTokenizer": pair}})


def _read_config(name: str, trust_remote_code: bool) -> Any:
    """The configuration as it is written, after what it says of the weights was found to be possible."""
    from transformers import AutoConfig, PreTrainedConfig

    place = resolve(name)
    if (folder := Path(place)).is_dir():
        check_is_model(folder)
    check_entry(PreTrainedConfig.get_config_dict(place)[0], name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    _refuse_adapters_of_hub(name)  # those of a folder are refused above
    check_architecture(name, config)
    if (quantization := quantization_of(config)) is not None:
        check_dequantizable(quantization, name)
    return config


def _refuse_adapters_of_hub(name: str) -> None:
    from transformers.utils.peft_utils import find_adapter_config_file

    place = resolve(name)
    if Path(place).is_dir():
        return
    try:
        adapter_config = find_adapter_config_file(place)
    except (OSError, ValueError):  # no name that the hub could know
        return
    if adapter_config is not None:
        raise UserError(adapters_are_no_base(name, Path(adapter_config), beside=False))


def _load(
    name: str, config: Any, trust_remote_code: bool, *, dtype: torch.dtype, device: Literal["cpu", "meta"]
) -> tuple[Any, tuple[str, ...]]:
    """The model of a configuration, and the tensors of its file that it has no part for; on "meta" nothing is read."""
    from transformers import AutoModelForCausalLM

    place = resolve(name)
    if (folder := Path(place)).is_dir():
        check_weights(folder)
    loading = copy.deepcopy(config)
    mend_padding_(loading)
    quantized = _holds_codes(name, loading)
    if quantized:
        load_densely_(loading)
    else:
        drop_quantization(loading)  # transformers would quantize dense weights, and takes an empty entry for one, too
    model, info = AutoModelForCausalLM.from_pretrained(
        place,
        config=loading,
        dtype=dtype,
        device_map={"": device} if quantized or device == "meta" else None,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are told below, by name
        output_loading_info=True,
    )
    left_out = check_loaded(name, model, info)
    if quantized:
        model = hold_in_(dequantize(model, dtype), dtype)
        drop_quantization(model.config)
    elif (local := _local_folder(name)) is not None:
        check_number_formats(name, model, weight_files(local))
    return experts_to_linears_(conv1d_to_linear_(model)), left_out


def _holds_codes(name: str, config: Any) -> bool:
    """Whether the weights are stored quantized. A configuration may also say how to quantize dense ones."""
    if quantization_of(config) is None:
        return False
    if (folder := Path(resolve(name))).is_dir():
        check_weights(folder)
    local = _local_folder(name)
    files = [] if local is None else weight_files(local)
    return not files or stores_codes(files)  # those of the hub may not be here yet


def weight_bytes(name: str, config: Any, dtype: DType) -> int | None:
    """About how many bytes the dense weights of a model take in memory; None where its files are not here yet."""
    if (folder := _local_folder(name)) is None:
        return None
    stored = sum(file.stat().st_size for file in weight_files(folder))
    return stored * held_in(config, dtype).itemsize // stored_in(config).itemsize


def model_fingerprint(name: str) -> str | None:
    """SHA-256 over configuration and weights of a base model, from its folder or the local hub cache.

    None where the weights are not there.
    """
    if (folder := _local_folder(name)) is None:
        return None
    files = sorted(file for file in folder.iterdir() if file.name == "config.json" or file.suffix == ".safetensors")
    if not any(file.suffix == ".safetensors" for file in files):
        return None
    return hash_json({file.name: hash_file(file) for file in files})


def _local_folder(name: str) -> Path | None:
    """The folder of a model, or that of the local hub cache; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(resolve(name))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.json", "*.safetensors"]))
    except LocalEntryNotFoundError:
        return None


def hold_in_(model: Any, dtype: torch.dtype) -> Any:
    """Gives the weights of a model another number format, as if it was loaded in it, and returns the model.

    Buffers, such as the rotary frequencies, keep theirs: angles at late positions need it. ``to`` would cast them, too.
    """
    for parameter in model.parameters():  # tied ones stay tied
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def _loading(kind: str, name: str) -> Iterator[None]:
    """Turns any error that a library raises in reading a model into a `UserError` that names the model."""
    speakers = [logging.getLogger(f"transformers.{name}") for name in SPEAKERS]
    for speaker in speakers:
        speaker.addFilter(_is_news)
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Not narrower: what a damaged or foreign file makes of the code of three libraries, or of the code that comes with
    # a model, may be any exception, and none of them says which model it was or what to do.
    except Exception as error:
        _refuse_adapters_of_hub(name)
        raise UserError(f"Cannot load a {kind} from {name!r}: {_cause(error)} {_remedy(name, error)}") from error
    finally:
        for speaker in speakers:
            speaker.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in TOLD_BY_US)


def _cause(error: Exception) -> str:
    """What an exception says, in one line that ends like a sentence."""
    if _wants_trust(error):
        return "it comes with code of its own."
    if "use_safetensors" in str(error):
        return "it has no safetensors, and other formats, which may run code as they are opened, are not read."
    text = textwrap.shorten(str(error), LONGEST_CAUSE, placeholder=" ...")
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):  # says little without its name
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _wants_trust(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _remedy(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "Install what is missing."
    if _wants_trust(error):
        return (
            "Read that code; if you trust it, give --model.trust_remote_code true (--trust_remote_code for "
            "`qpruner plan`)."
        )
    if Path(resolve(name)).is_dir():
        return "Put right what is named, or fetch the folder again."
    return (
        f"There is no folder {name!r}, and no model of the hub by that name within reach. Give a folder in the "
        f"Hugging Face layout, the name of a hub model, or {EMBEDDED!r}."
    )
