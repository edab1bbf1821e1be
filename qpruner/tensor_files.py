"""Reads tensors from disk: only safetensors, with damage reported by file name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
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
    with _naming(path):
        return load_file(path)


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors of a safetensors file, which are read alone.

    Raises:
        UserError: there is none, or it is damaged.
    """
    with _naming(path), safe_open(path, "pt") as file:
        return list(file.keys())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns the errors of a damaged file into a `UserError` that names it."""
    try:
        yield
    except (*MALFORMED, SafetensorError, KeyError, RuntimeError) as error:  # the last two: a dtype unknown to torch
        raise UserError(f"{str(path)!r} is not a safetensors file: {cut(error)}. {COPY_AGAIN}") from error
