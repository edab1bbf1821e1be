"""The result of an export: the files written, and the values that the engine reads from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Written:
    """The result of an export.

    Args:
        files: paths of the files, tensors and all else, within the folder of the export.
        predicted_bytes: bytes of the tensors, computed before the export.
        changes: differences between the export and the compressed model, as sentences without a full stop.
        read: function that gives, for the name of a parameter of the dense model, the value that the engine computes
            with; float32, of the shape that `Source.weight` gives. It may read the files, and works as long as these
            are where they were written.
    """

    files: tuple[Path, ...]
    predicted_bytes: int
    changes: tuple[str, ...]
    read: Callable[[str], Tensor]
