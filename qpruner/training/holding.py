"""The interface that callbacks which compress a model need from the LightningModule that holds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qpruner.adapters.lora import LoRAConfig
from qpruner.compressed import CompressedModel


class HoldsModel(Protocol):
    """A LightningModule that holds a model under compression, and trains its adapters or other parameters.

    Attributes:
        lora: options of the adapters that the model has or will get.
        seed: seed of all random draws of the fit.
        kept_in: folder that the base will be written to; None where none was given.
        trains_grids: whether scales and minima of the packed base are trained in place of the adapters.
        after_clipping: functions to call before an optimizer step, once its gradients are unscaled and clipped, with
            whether they were finite; callbacks have no hook at that point.
    """

    lora: LoRAConfig
    seed: int
    kept_in: Path | None
    trains_grids: bool
    after_clipping: list[Callable[[bool], None]]

    @property
    def compressed(self) -> CompressedModel:
        """The model, which must be loaded."""
        ...

    def load_base(self) -> None:
        """Loads the model unless it is loaded."""
        ...

    def merge_inherited(self) -> None:
        """Merges base and adapters into one dense base, where an earlier fit left them."""
        ...

    def release(self) -> None:
        """Drops the model; `load_base` loads it again."""
        ...

    def unite(self) -> None:
        """Makes a model that is sharded across devices whole again; a collective call of all ranks."""
        ...

    def keep_base(self, folder: Path, *, trained: bool = False) -> None:
        """Writes the base, and adapters unless they start as PEFT has them, to a folder; called on all ranks."""
        ...

    def keep_adapters(self) -> None:
        """Writes the trained adapters into the folder of their base."""
        ...


def expect_holder(module: Any) -> HoldsModel:
    """The given LightningModule, after checking that it holds a model.

    Raises:
        TypeError: the module holds none.
    """
    # Not by isinstance, which before Python 3.12 reads the property, and that needs a loaded model.
    needed = ("compressed", "load_base", "merge_inherited", "keep_base", "keep_adapters")
    if not all(hasattr(type(module), name) for name in needed):
        raise TypeError(f"Compression acts on a module that holds a model, not on a {type(module).__name__}.")
    holder: HoldsModel = module
    return holder
