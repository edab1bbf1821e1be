"""A run as a list of phases, each of which is one fit that begins with what the previous phase left."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from qpruner.callbacks import (
    Compression,
    GridPolishing,
    LoRAGuidedPruning,
    MixedPrecisionQuantization,
    PlannedPruning,
    StructuredPruning,
)
from qpruner.callbacks.compression import CompressionInTraining, check_order
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunFolder
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig


@dataclass(frozen=True)
class PhaseConfig:
    """A further fit of a run: it begins with the base and the adapters that the previous phase left.

    A callback that quantizes first merges these adapters into the base, and starts new ones by LoftQ. Everything else
    is as in the first phase.

    Args:
        max_epochs: number of passes over the training data; None to give steps.
        max_steps: number of optimizer steps; -1 to give epochs.
        optimizer: how the adapters are trained; by default as in the first phase.
        callbacks: callbacks that act in this phase, such as `MixedPrecisionQuantization`; those of the first phase that
            do not compress also act here.
    """

    max_epochs: int | None = None
    max_steps: int = -1
    optimizer: OptimizerConfig | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        if (self.max_epochs or 0) < -1 or self.max_steps < -1:
            raise UserError(
                f"A phase has max_epochs {self.max_epochs} and max_steps {self.max_steps}; neither is below -1, which "
                f"stands for no limit."
            )
        if (self.max_epochs or 0) < 1 and self.max_steps < 1:
            raise UserError("A phase has neither max_epochs nor max_steps, and would have no end. Give one of them.")


@dataclass(frozen=True)
class Phase:
    """One fit of a run.

    Args:
        number: number of the fit in the run, from 1.
        folder: folder of the run, in this phase.
        callbacks: callbacks that the user gave.
        config: options of a further phase; None in the first.
        continues_from: folder that the previous phase left; None for a phase without one.
    """

    number: int
    folder: RunFolder
    callbacks: list[Callback]
    config: PhaseConfig | None = None
    continues_from: Path | None = None

    @property
    def compressing(self) -> list[Compression]:
        return [callback for callback in self.callbacks if isinstance(callback, Compression)]

    @property
    def compresses_in_training(self) -> bool:
        """Whether the base that the phase leaves differs from the one that it trains on."""
        return any(isinstance(callback, CompressionInTraining) for callback in self.compressing)

    @property
    def length(self) -> dict[str, Any]:
        """The options of a Trainer that set how long the phase trains, where those of the run do not apply."""
        return {} if self.config is None else {"max_epochs": self.config.max_epochs, "max_steps": self.config.max_steps}

    @property
    def kept_in(self) -> Path:
        """The folder that keeps the base that the phase trains on."""
        return self.folder.base if self.compresses_in_training else self.folder.model

    def module(self, described: LoRAFinetuner) -> LoRAFinetuner:
        """The module to train: the described one in the first phase, else one like it that continues from the base.

        Args:
            described: module with the options of the first phase.
        """
        if self.config is None:
            return described
        module = renewed(described, optimizer=self.config.optimizer or described.optimizer_config)
        module.continues_from = self.continues_from
        return module

    def end(self) -> None:
        """Records that the phase is over, and removes what only its training needed."""
        if self.folder.phase is not None:
            self.folder.record_finished()
        if self.folder.phase is not None or self.compresses_in_training:
            self.folder.drop_training_state()


def renewed(module: LoRAFinetuner, **changes: Any) -> LoRAFinetuner:
    """A fresh module with the options of another one, some of them changed."""
    return type(module)(**{**module.hparams, **changes})


def carrying_out(callbacks: Sequence[Callback], plan: CompressionPlan) -> list[Callback]:
    """The callbacks, with those that decide on a compression replaced by those that carry out a plan."""
    configured = next((callback for callback in callbacks if isinstance(callback, MixedPrecisionQuantization)), None)
    quantization = [MixedPrecisionQuantization.of_plan(plan, configured)] if plan.quantized else []
    pruning = (callback for callback in callbacks if isinstance(callback, StructuredPruning | LoRAGuidedPruning))
    compensating = next((callback.compensating for callback in pruning), None)
    others = [callback for callback in callbacks if not decides(callback)]
    return [PlannedPruning.of_plan(plan, compensating), *quantization, *others]


def decides(callback: Callback) -> bool:
    """Whether a callback decides on the contents of a plan: which units stay, and in how many bits."""
    return isinstance(callback, Compression) and not isinstance(callback, GridPolishing)


def phases_of(folder: RunFolder, first: Sequence[Callback], further: Sequence[PhaseConfig]) -> list[Phase]:
    """The phases of a run.

    Args:
        folder: folder of the run.
        first: callbacks of the first phase.
        further: options of the phases after it.

    Raises:
        UserError: callbacks in a wrong order, a phase that leaves nothing for the next one, or pruning in a phase after
            the first.
    """
    shared = [callback for callback in first if not isinstance(callback, Compression)]
    # A callback's observations in one phase mean nothing to the next; a resumed run would not have them either.
    callbacks = [list(first), *([*copy.deepcopy(shared), *config.callbacks] for config in further)]
    places = [RunFolder(folder.path, number) for number in range(1, len(callbacks))] + [folder]
    phases = [
        Phase(
            number + 1,
            places[number],
            callbacks[number],
            further[number - 1] if number else None,
            places[number - 1].model if number else None,
        )
        for number in range(len(callbacks))
    ]
    for phase in phases:
        check_order(phase.callbacks)
        if phase.number > 1 and not all(
            isinstance(callback, MixedPrecisionQuantization | GridPolishing) for callback in phase.compressing
        ):
            names = ", ".join(type(callback).__name__ for callback in phase.compressing)
            raise UserError(
                f"Phase {phase.number} has {names}; a run prunes in its first phase, and the others may "
                f"quantize and polish. Move the callback to trainer.callbacks."
            )
    if further and not phases[0].compressing:
        raise UserError(
            "The run has phases, and its first compresses nothing, so that it leaves no compressed base to go on from. "
            "Give trainer.callbacks one that compresses, or drop phases."
        )
    return phases
