"""What is evaluated: the model of a run, of a folder or of the hub, with its adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qpruner.adapter_files import has_adapters
from qpruner.errors import UserError
from qpruner.files import hash_json
from qpruner.folder_manifest import is_compressed, read_manifest
from qpruner.model_folder import load_compressed, read_plan
from qpruner.pretrained import DType, load_model, load_tokenizer, model_fingerprint
from qpruner.pricing import average_bits
from qpruner.records.folder import RunFolder


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, ready to be evaluated.

    Args:
        name: folder or hub name, as it was given.
        network: causal language model, perhaps compressed and with adapters, in evaluation mode on the CPU.
        tokenizer: tokenizer of the model.
        identity: text that tells its weights from others; of weights that are not at hand, their name.
        average_bits: bits per weight of the decoder linears, scales included; None where nothing was compressed.
    """

    name: str
    network: Any
    tokenizer: Any
    identity: str
    average_bits: float | None

    @classmethod
    def load(cls, name: str, *, dtype: DType = "auto", trust_remote_code: bool = False) -> Self:
        """Loads the model of a run's folder, of a compressed model's folder, or any of transformers.

        Args:
            name: folder of a run, of a compressed model or of a model of transformers, a hub name, or
                ``qpruner/stories``.
            dtype: number format of the weights of a model that is not compressed; see `qpruner.pretrained.held_in`.
            trust_remote_code: whether code that comes with the model may run.

        Raises:
            UserError: there is no such model, a run that has left none, or it is damaged.
        """
        folder = compressed_folder(name)
        if folder is None:
            network = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, say=print)
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
            return cls(name, network.eval(), tokenizer, model_fingerprint(name) or name, None)
        network = load_compressed(folder)
        manifest = read_manifest(folder)
        compresses = manifest["state"] != "dense"
        bits = average_bits(read_plan(folder), network.dtype.itemsize) if compresses else None
        content = [manifest["files"], manifest.get("adapters") if has_adapters(folder) else None]
        return cls(name, network, load_tokenizer(str(folder)), hash_json(content), bits)


def compressed_folder(name: str) -> Path | None:
    """The folder of a compressed model that a name stands for: itself, or that of a run; None for any other model.

    Raises:
        UserError: the folder of a run that has left no model yet.
    """
    folder = Path(name).expanduser()
    if is_compressed(folder):
        return folder
    run = RunFolder(folder)
    if not run.config.exists():
        return None
    if (kept := run.kept_base) is None:
        raise UserError(
            f"The run {name!r} has left no model yet. Finish it first, or name the model that it begins with."
        )
    return kept
