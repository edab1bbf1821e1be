"""What callbacks that compress a model need of the LightningModule that holds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qpruner.adapters.lora import LoRAConfig
from qpruner.compressed import CompressedModel


class HoldsModel(Protocol):
    """A LightningModule that holds a model under compression, and trains its adapters or something else on it.

    Attributes:
        lora: the adapters that the model has or is going to have.
        seed: seed of all random draws of the fit.
        kept_in: folder that is going to keep the base; None where nobody named one.
        trains_grids: whether scales and minima of the packed base are trained in place of the adapters.
        after_clipping: what to call once the gradients of an optimizer step are unscaled and clipped, before the step,
            with whether they were finite: no hook of a callback lies there.
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
        """Loads the model unless it is there."""
        ...

    def merge_inherited(self) -> None:
        """Makes one dense base of what an earlier fit left, where the model is that."""
        ...

    def release(self) -> None:
        """Lets go of the model; `load_base` loads it again."""
        ...

    def unite(self) -> None:
        """Makes a model that is split among devices whole again, on all ranks together."""
        ...

    def keep_base(self, folder: Path, *, trained: bool = False) -> None:
        """Writes the base, and adapters that do not start as PEFT has it, to a folder; the same on all ranks."""
        ...

    def keep_adapters(self) -> None:
        """Puts the adapters, as trained, to the base in its folder."""
        ...


def expect_holder(module: Any) -> HoldsModel:
    """A LightningModule, found to be one that holds a model.

    Raises:
        TypeError: it is not.
    """
    # Not by isinstance: before Python 3.12 that reads the property, which needs the model to be loaded.
    needed = ("compressed", "load_base", "merge_inherited", "keep_base", "keep_adapters")
    if not all(hasattr(type(module), name) for name in needed):
        raise TypeError(f"Compression acts on a module that holds a model, not on a {type(module).__name__}.")
    holder: HoldsModel = module
    return holder
