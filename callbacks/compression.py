"""What callbacks that compress the base have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.errors import UserError
from qpruner.quantization.packed import PackedLinear
from qpruner.training.module import LoRAFinetuner


class Compression(Callback):
    """Compresses the base of a `LoRAFinetuner` in ``setup`` of a fit, before adapters and optimizers exist.

    Does so once: where the base comes compressed from the folder that it is kept in, nothing is done.
    """

    leaves: ClassVar[str]
    """Name of the stage in which it leaves the model."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What it was asked for, as plain data."""

    @abstractmethod
    def check(self, config: Any) -> None:
        """Finds, from a model's configuration alone, what the options ask and cannot be had.

        Raises:
            UserError: something cannot be had.
        """

    @abstractmethod
    def is_done(self, module: LoRAFinetuner) -> bool:
        """Whether the base is already as this callback would leave it."""

    @abstractmethod
    def compress(self, trainer: Trainer, module: LoRAFinetuner) -> None:
        """Compresses the base, the same on all devices."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, LoRAFinetuner):
            raise TypeError(f"Compression acts on a LoRAFinetuner, not on a {type(pl_module).__name__}.")
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        pl_module.load_base()
        if not self.is_done(pl_module):
            if pl_module.adapted:
                raise UserError(
                    f"{type(self).__name__} compresses a base before it gets adapters, and this module has them "
                    f"already. Make a new LoRAFinetuner for the fit."
                )
            if any(isinstance(module, PackedLinear) for module in pl_module.model.modules()):
                raise UserError(
                    f"The base {pl_module.base!r} is quantized already; packed weights can be neither narrowed nor "
                    f"quantized again. Give the model that it was made from, or `qpruner merge` its run first."
                )
            self.compress(trainer, pl_module)

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def check_order(callbacks: Sequence[Callback]) -> None:
    """Makes sure that a fit prunes at most once, and before it quantizes.

    Raises:
        UserError: it does not.
    """
    stages = [callback.leaves for callback in callbacks if isinstance(callback, Compression)]
    if stages not in ([], ["pruned"], ["quantized"], ["pruned", "quantized"]):
        raise UserError(
            f"The callbacks leave the base {', then '.join(stages)}; a fit prunes at most once, then quantizes at most "
            f"once, since packed weights cannot be narrowed. Reorder or drop callbacks."
        )
