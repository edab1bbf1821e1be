"""Reads tensors from disk: only safetensors, with damage reported by file name."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qpruner.errors import UserError, cut
from qpruner.files import MALFORMED
from qpruner.folder_manifest import COPY_AGAIN


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return load_file(path)
    except (*MALFORMED, SafetensorError, KeyError, RuntimeError) as error:  # the last two: a dtype unknown to torch
        raise UserError(f"{str(path)!r} is not a safetensors file: {cut(error)}. {COPY_AGAIN}") from error
