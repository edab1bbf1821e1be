"""What callbacks that compress the base have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy import architecture_of
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.quantization.packed import PackedLinear
from qpruner.runs.folder import RunFolder
from qpruner.training.module import LoRAFinetuner


@dataclass
class Rehearsal:
    """A fit without weights, in which callbacks find what cannot be had before any work is done.

    Args:
        model: on the meta device, as the callbacks so far would leave it.
        lora: the adapters that it is going to have.
        exact: whether its widths are those of the fit; they are not where they depend on scores.

    Attributes:
        plan: of the model, all of it dense; which units are kept is made up.
    """

    model: Any
    lora: LoRAConfig
    exact: bool = True

    def __post_init__(self) -> None:
        self._dense = CompressionPlan.dense(architecture_of(self.model.config), None)

    @property
    def plan(self) -> CompressionPlan:
        widths = architecture_of(self.model.config)
        kept = zip(widths.kv_groups, widths.ffn_channels, strict=True)
        return self._dense.keeping([(range(groups), range(channels)) for groups, channels in kept])


class Compression(Callback):
    """Compresses the base of a `LoRAFinetuner` in ``setup`` of a fit, before adapters and optimizers exist.

    Does so once: where the base comes compressed from the folder that it is kept in, nothing is done.
    """

    leaves: ClassVar[str]
    """Name of the stage in which it leaves the model."""
    folder: RunFolder | None = None
    """Of the run, where it leaves what it found; nowhere when there is none."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What it was asked for, as plain data."""

    @abstractmethod
    def check(self, rehearsal: Rehearsal) -> None:
        """Finds what the options ask and cannot be had, and leaves the model's widths as the fit would.

        Raises:
            UserError: something cannot be had.
        """

    def check_text(self, data: TokenDataModule) -> None:  # most need none
        """Finds, before any work with the model, that the data are too few.

        Raises:
            UserError: they are.
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
