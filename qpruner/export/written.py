"""What an export has written, and what its engine reads there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Written:
    """What an export has written.

    Args:
        files: paths of the files, tensors and all else, within the folder of the export.
        predicted_bytes: bytes of the tensors, counted before the work.
        changes: what the export holds otherwise than the compressed model does, as sentences without a full stop.
        read: gives, for the name of a parameter of the dense model, the value that the engine computes with; float32,
            of the shape that `Source.weight` gives. It may read the files, and holds as long as these lie where they
            were written.
    """

    files: tuple[Path, ...]
    predicted_bytes: int
    changes: tuple[str, ...]
    read: Callable[[str], Tensor]
