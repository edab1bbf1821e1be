"""What callbacks that compress the base have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.adapters.lora import LoRAConfig, target_linears
from qpruner.anatomy import architecture_of
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import CompressionPlan
from qpruner.pruning.rounds import check_ratio, round_to, supplies
from qpruner.pruning.selection import SelectionConfig, local_widths
from qpruner.pruning.surgery import narrow_
from qpruner.quantization.packed import PackedLinear
from qpruner.records.folder import RunFolder
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

    Raises:
        UserError: the adapters have no linear to be on.
    """

    model: Any
    lora: LoRAConfig
    exact: bool = True

    def __post_init__(self) -> None:
        target_linears(self.model, self.lora.target_modules)
        self._dense = CompressionPlan.dense(architecture_of(self.model.config), None)

    @property
    def plan(self) -> CompressionPlan:
        widths = architecture_of(self.model.config)
        kept = zip(widths.kv_groups, widths.ffn_channels, strict=True)
        return self._dense.keeping([(range(groups), range(channels)) for groups, channels in kept])

    def prune(self, ratio: float, selection: SelectionConfig) -> None:
        """Narrows the model as pruning would, where that does not depend on scores.

        Raises:
            UserError: a ratio that no legal widths reach.
        """
        offers, total = supplies(self.model, selection), num_parameters(self.model)
        check_ratio(ratio, offers, total)
        if selection.scope == "local":
            widths = local_widths(offers, round(total * ratio), round_to(self.model, selection))
            narrow_(self.model, [(range(groups), range(channels)) for groups, channels in widths])
        else:
            self.exact = False


class Compression(Callback):
    """Compresses the base of a `LoRAFinetuner` at the start of a fit or in its course."""

    leaves: ClassVar[Literal["pruned", "quantized", "pruned in training"]]
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

    def check_steps(self, num_steps: float) -> None:  # most need none
        """Finds, before any work with the model, that the fit is too short.

        Args:
            num_steps: optimizer steps of the fit.

        Raises:
            UserError: it is.
        """

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> LoRAFinetuner:
        """The module, with its base loaded, found to be one that the callbacks of the fit can compress."""
        if not isinstance(pl_module, LoRAFinetuner):
            raise TypeError(f"Compression acts on a LoRAFinetuner, not on a {type(pl_module).__name__}.")
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        pl_module.load_base()
        return pl_module

    def check_unadapted(self, module: LoRAFinetuner) -> None:
        """Makes sure that the base has no adapters yet.

        Raises:
            UserError: it has.
        """
        if module.adapted:
            raise UserError(
                f"{type(self).__name__} compresses a base before it gets adapters, and this module has them already. "
                f"Make a new LoRAFinetuner for the fit."
            )

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class CompressionInSetup(Compression):
    """Compresses the base in ``setup`` of a fit, before adapters and optimizers exist.

    Does so once: where the base comes compressed from the folder that it is kept in, nothing is done. What an earlier
    fit of the run left is made one dense base before.
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
        module = self.begin(trainer, pl_module)
        module.merge_inherited()
        if not self.is_done(module):
            self.check_unadapted(module)
            check_dense(module)
            self.compress(trainer, module)


def check_order(callbacks: Sequence[Callback]) -> None:
    """Makes sure that a fit prunes, then quantizes, then prunes in training, each at most once.

    Raises:
        UserError: it does not.
    """
    stages = [callback.leaves for callback in callbacks if isinstance(callback, Compression)]
    order = ["pruned", "quantized", "pruned in training"]
    if stages != [stage for stage in order if stage in stages]:
        raise UserError(
            f"The callbacks leave the base {', then '.join(stages)}; a fit prunes at most once, then quantizes at most "
            f"once, since packed weights cannot be scored, then prunes at most once while it trains. Reorder or drop "
            f"callbacks; to quantize what was pruned in training, add a phase to the run (see phases)."
        )


def check_dense(module: LoRAFinetuner) -> None:
    """Makes sure that the weights of the base are not packed.

    Raises:
        UserError: they are.
    """
    if any(isinstance(part, PackedLinear) for part in module.model.modules()):
        raise UserError(
            f"The base {module.base!r} is quantized already; packed weights can be neither scored nor quantized again. "
            f"Give the model that it was made from, or `qpruner merge` its run first."
        )
