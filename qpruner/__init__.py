"""Structured pruning, mixed-precision quantization and LoRA recovery of language models under a memory budget."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpruner.model_folder import load_compressed as load_compressed

__version__ = version("qpruner")


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first asked for, so that ``import qpruner`` stays light."""
    if name == "load_compressed":
        from qpruner.model_folder import load_compressed

        return load_compressed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
