"""The model under evaluation: that of a run, of a folder or of the hub, with its adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qpruner.adapter_files import has_adapters
from qpruner.files import hash_json
from qpruner.folder_manifest import is_compressed, read_manifest
from qpruner.model_folder import load_compressed, read_base_config, read_plan
from qpruner.pretrained import DType, load_model, load_tokenizer, model_fingerprint
from qpruner.pricing import average_bits
from qpruner.records.folder import RunFolder


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, ready to be evaluated.

    Args:
        name: folder or hub name, as the user gave it.
        network: causal language model, perhaps compressed and with adapters, in evaluation mode on the CPU.
        tokenizer: tokenizer of the model.
        identity: text that identifies the weights, including their number format where that is a choice; the model's
            name where its files are not available locally.
        average_bits: bits per weight of the decoder linears, scales included; None where nothing was compressed.
    """

    name: str
    network: Any
    tokenizer: Any
    identity: str
    average_bits: float | None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: DType = "auto",
        trust_remote_code: bool = False,
        say: Callable[[str], object] = print,
    ) -> Self:
        """Loads the model of a run's folder, of a compressed model's folder, or any transformers model.

        Args:
            name: folder of a run, of a compressed model or of a transformers model, a hub name, or
                ``qpruner/stories``.
            dtype: number format of the weights of a model that is not compressed; see `qpruner.pretrained.held_in`.
            trust_remote_code: whether code that comes with the model may run.
            say: function that receives messages for the user about the model, such as that it was quantized.

        Raises:
            UserError: there is no such model, the run has left none, or it is damaged.
        """
        folder = compressed_folder(name)
        if folder is None:
            network = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, say=say)
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
            identity = f"{model_fingerprint(name) or name} in {str(network.dtype).removeprefix('torch.')}"
            return cls(name, network.eval(), tokenizer, identity, None)
        network = load_compressed(folder)
        manifest = read_manifest(folder)
        compresses = manifest["state"] != "dense"
        bits = average_bits(read_plan(folder), network.dtype.itemsize) if compresses else None
        content = [manifest["files"], manifest.get("adapters") if has_adapters(folder) else None]
        return cls(name, network, load_tokenizer(str(folder)), hash_json(content), bits)


def read_subject_config(name: str, *, trust_remote_code: bool) -> Any:
    """The configuration of the model that `Subject.load` loads, without its weights.

    Raises:
        UserError: there is no such model, or the run has left none.
    """
    return read_base_config(str(compressed_folder(name) or name), trust_remote_code=trust_remote_code)


def compressed_folder(name: str) -> Path | None:
    """The compressed model's folder that a name refers to, directly or as a run; None for any other model.

    Raises:
        UserError: the name is the folder of a search, or of a run that is unfinished or has left no compressed model.
    """
    folder = Path(name).expanduser()
    if is_compressed(folder):
        return folder
    run = RunFolder(folder)
    if not run.config.exists():
        return None
    # The present model of an unfinished run is not the final one, but would be reported as the result of the run.
    kept = run.kept_base
    return run.finished_model("" if kept is None else f", or name the model that it came to: {kept}")
