"""Checks a run before it does any work."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.callbacks import Compression, GridPolishing, LoRAGuidedPruning
from qpruner.callbacks.compression import Rehearsal
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.joint.config import JointConfig
from qpruner.model_folder import build_skeleton, rehearse_saving
from qpruner.pretrained import held_in
from qpruner.runs.phases import Phase, PhaseConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.preflight import check_lengths, check_monitored


def check_fit(phases: Sequence[PhaseConfig], plan: str | None, joint: JointConfig | None) -> None:
    """Checks that the options of a fit are compatible with each other.

    Args:
        phases: further phases, after the first.
        plan: file of the plan to carry out; None for none.
        joint: how a plan is learned; None where none is.

    Raises:
        UserError: some are not.
    """
    if joint is not None and plan is not None:
        raise UserError(f"--plan names {plan!r}, and joint learns a plan of its own. Leave one of both out.")
    if joint is not None and phases:
        raise UserError(
            "joint learns a plan, which is carried out in one fit, and the run has phases. Leave --phases out."
        )
    if phases and plan is not None:
        raise UserError(
            "--plan carries out a plan in one fit, and the run has phases. Leave --phases out to recover the plan."
        )


def check_search(
    callbacks: Sequence[Callback], phases: Sequence[PhaseConfig], plan: str | None, joint: JointConfig | None
) -> None:
    """Checks that all options are compatible with a search.

    Args:
        callbacks: callbacks that the search begins with.
        phases: further phases, after the first.
        plan: file of a plan to carry out; None for none.
        joint: how a plan is learned; None where none is.

    Raises:
        UserError: some are not.
    """
    if joint is not None:
        raise UserError(
            "joint learns a plan in `qpruner fit`, and a search tries plans. Leave it out; a search can start from a "
            "plan that was learned."
        )
    if plan is not None:
        raise UserError("A search makes plans; --plan is for `qpruner fit`, which carries one out.")
    if any(isinstance(callback, LoRAGuidedPruning) for callback in callbacks):
        raise UserError(
            "LoRAGuidedPruning prunes in the course of a fit, and a search prunes before its trials. Search with "
            "StructuredPruning, or `qpruner merge` a run that pruned in training and search on its result."
        )
    if any(isinstance(callback, GridPolishing) for callback in callbacks):
        raise UserError(
            "GridPolishing trains the base of a fit, and the trials of a search train adapters. Leave it out, and "
            "polish when the plan that is found has been carried out."
        )
    if phases:
        raise UserError("A search has no phases; they are for `qpruner fit`. Leave --phases out.")


def rehearse(
    model: LoRAFinetuner,
    data: TokenDataModule,
    phases: Sequence[Phase],
    *,
    decides_on_widths: bool = False,
    ranks: Sequence[int] = (),
) -> None:
    """Checks the base, whether it can be saved, and whether it has what the callbacks require.

    Args:
        model: module whose base is inspected without loading it.
        data: data module whose tokens the base must know.
        phases: all phases of the run.
        decides_on_widths: whether a search decides on the widths of layers.
        ranks: ranks of adapters that a search decides between; empty where it does not.

    Raises:
        UserError: a check fails.
    """
    compressing = [callback for phase in phases for callback in phase.compressing]
    config = model.check_base()
    data.check_model(config)
    if compressing:
        skeleton = build_skeleton(config)
        dense = skeleton.to(held_in(config, model.dtype_of_base))
        least_rank = min(ranks, default=None)
        rehearsal = Rehearsal(dense, model.lora, decides_on_widths=decides_on_widths, least_rank=least_rank)
        for callback in compressing:
            callback.check(rehearsal)
        rehearse_saving(model.base, config, data.tokenizer, trust_remote_code=model.trust_remote_code)


class Preflight(Callback):
    """Checks, in ``setup`` of a fit and before the model is loaded, that the options are compatible with the data.

    Args:
        phase: phase whose fit is about to begin.
        later: callbacks that compress in later phases.

    Raises:
        UserError: some are not.
    """

    def __init__(self, phase: Phase, later: Sequence[Compression]) -> None:
        self.phase = phase
        self.later = later

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, LoRAFinetuner) and isinstance(data, TokenDataModule)
        steps = check_lengths(trainer, data)
        pl_module.optimizer_config.check(steps)
        check_monitored(trainer, data, pl_module.distillation)
        if not trainer.strategy.broadcast(self.phase.folder.summary.exists()):  # nothing has been measured yet
            for callback in (*self.phase.compressing, *self.later):
                callback.check_text(data)
            for callback in self.phase.compressing:
                callback.check_steps(steps)
