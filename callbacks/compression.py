"""What callbacks that compress the base have in common."""

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule

from qpruner.training.module import LoRAFinetuner


class Compression(Callback):
    """Compresses the base of a `LoRAFinetuner` in ``setup`` of a fit, before adapters and optimizers exist."""

    leaves: ClassVar[str]
    """Name of the stage in which it leaves the model."""

    @abstractmethod
    def check(self, config: Any) -> None:
        """Finds, from a model's configuration alone, what the options ask and cannot be had.

        Raises:
            UserError: something cannot be had.
        """

    @property
    def described(self) -> str:
        """Its name and what it was asked for, for the log."""
        return type(self).__name__


def expect_finetuner(pl_module: LightningModule) -> LoRAFinetuner:
    if not isinstance(pl_module, LoRAFinetuner):
        raise TypeError(f"Compression acts on a LoRAFinetuner, not on a {type(pl_module).__name__}.")
    return pl_module
