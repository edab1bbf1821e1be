"""Narrows the base before the fit that recovers it."""

import hashlib
from dataclasses import asdict
from typing import Any, Self

from lightning.pytorch.utilities import rank_zero_info

from qpruner.anatomy import architecture_of
from qpruner.calibration.gram import MASSIVE_POSITIONS, check_length
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.callbacks.calibration import calibration_of, text_of
from qpruner.callbacks.compensation import Compensating
from qpruner.callbacks.compression import CompressionInSetup, CompressionJob, Rehearsal
from qpruner.compressed import State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.pruning.compensation import COMPENSATION_TEXT, Compensation
from qpruner.pruning.criteria import Aggregate, Criterion
from qpruner.pruning.rounds import Size, describe, prune_
from qpruner.pruning.scores import LayerScores, check_criterion, needs_text, score_units
from qpruner.pruning.selection import Kept, SelectionConfig
from qpruner.pruning.supplies import asked_for
from qpruner.pruning.surgery import apply_pruning_

TEXT = "StructuredPruning.calibration"
"""What messages call the text that units are scored on."""


class StructuredPruning(CompressionInSetup):
    """Removes KV groups and FFN channels of the base, the least important first (LLM-Pruner, arXiv 2305.11627).

    ```yaml
    trainer:
      callbacks:
        - class_path: StructuredPruning
          init_args: {ratio: 0.2, selection: {scope: global}}
    ```

    setup
        Scores the units, narrows the base and compensates the remaining weights for what was removed. This happens
        once: if the base is loaded from the folder it was saved in, nothing is done and the dense model is not needed.
        With several devices, each works on its share of the micro-batches, the first decides, and all keep the same
        units.

    Args:
        ratio: share of all parameters to remove, in (0, 1).
        criterion: criterion by which units are scored; see `qpruner.pruning.criteria`.
        aggregate: how the scores of a unit's coupled weights are combined.
        rounds: number of times that units are scored and removed, at least 1; later rounds score the model that earlier
            ones left.
        selection: how the removal is distributed over layers.
        calibration: calibration text for criteria that need it.
        compensation: what the remaining weights compensate for after each round: nothing, the loss within each linear,
            or also the errors of the preceding layers; see `qpruner.pruning.compensation`.
        compensation_text: calibration text for the compensation; it must have more tokens than a layer has FFN
            channels.

    Raises:
        UserError: a ratio that no legal widths reach or that removes nothing, an unsupported model family, no room on
            the device, too little calibration text, or a gradient that is not finite.
    """

    leaves = State.PRUNED

    def __init__(
        self,
        ratio: float,
        criterion: Criterion = "fisher",
        aggregate: Aggregate = "sum",
        rounds: int = 1,
        selection: SelectionConfig = SelectionConfig(),  # noqa: B008  # frozen
        calibration: CalibrationConfig = CalibrationConfig(64, 128),  # noqa: B008  # frozen
        compensation: Compensation = "sequential",
        compensation_text: CalibrationConfig = COMPENSATION_TEXT,
    ) -> None:
        if not 0 < ratio < 1:
            raise UserError(f"StructuredPruning has ratio {ratio}; the share of all parameters to remove is in (0, 1).")
        if rounds < 1:
            raise UserError(f"StructuredPruning has rounds {rounds}; it takes at least 1.")
        self.ratio = ratio
        self.criterion: Criterion = criterion
        self.aggregate: Aggregate = aggregate
        self.rounds = rounds
        self.selection = selection
        self.calibration = calibration
        self.compensating = Compensating(compensation, compensation_text)

    def check(self, rehearsal: Rehearsal) -> None:
        """Checks, before any work, that the options can be satisfied.

        Raises:
            UserError: a ratio that no legal widths reach or that removes nothing, or too little text.
        """
        check_criterion(rehearsal.model, self.criterion)
        if self.criterion == "reconstruction":
            check_length(self.calibration.length, MASSIVE_POSITIONS)
        self.compensating.check(rehearsal.model)
        rehearsal.prune(self.ratio, self.selection)

    def check_text(self, data: TokenDataModule) -> None:
        self.compensating.check_text(data)
        if needs_text(self.criterion):
            text_of(data, self.calibration, TEXT)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "criterion": self.criterion,
            "aggregate": self.aggregate,
            "rounds": self.rounds,
            "selection": {**asdict(self.selection), "leave_alone": list(self.selection.leave_alone)},
            "calibration": asdict(self.calibration),
            **self.compensating.options,
        }

    def compress(self, job: CompressionJob) -> None:
        model = job.model
        before = Size.of(model.network)
        architecture = model.known_plan().architecture
        asked = asked_for(self.ratio, model.network, self.selection, architecture)
        self.compensating.begin(model, job.data)
        dense = self.compensating.remember(model)
        calibration = self._calibration(job)

        def score(network: Any) -> list[LayerScores]:
            return score_units(network, self.criterion, self.aggregate, calibration, seed=job.seed)

        def narrow(kept: Kept) -> None:
            model.prune(job.processes.broadcast(kept))
            self.compensating.apply(model, dense, job.data, job.processes)

        prune_(
            model.network,
            architecture,
            ratio=self.ratio,
            rounds=self.rounds,
            selection=self.selection,
            score=score,
            narrow=narrow,
        )
        plan = model.known_plan()
        rank_zero_info(describe(plan, before, Size.of(model.network), asked, self.selection.leave_alone))

    def _calibration(self, job: CompressionJob) -> Calibration | None:
        """This device's share of the text, with the model moved to the device; None if no text is needed."""
        if not needs_text(self.criterion):
            return None
        return calibration_of(job.model.network, job.data, self.calibration, job.processes, TEXT)


class PlannedPruning(CompressionInSetup):
    """Narrows the base, and orders the remaining units, as a given plan says; it computes no scores.

    From Python, or by ``qpruner fit --plan plan.json``, where it replaces the callbacks that decide on a compression::

        Trainer(callbacks=[PlannedPruning(CompressionPlan.read(Path("plan.json")))])

    setup
        Narrows the base, once; a base loaded from the folder it was saved in is narrow already.

    Args:
        plan: plan to carry out, as far as it says which units stay and in which order, in which order the channels of
            the hidden states come, and what ranks adapters have.
        compensation: what the remaining weights compensate for; see `StructuredPruning`.
        compensation_text: calibration text for the compensation.

    Raises:
        UserError: the plan is for a model of another shape or reorders what cannot be reordered, or there is too little
            text.
    """

    leaves = State.PRUNED

    def __init__(
        self,
        plan: CompressionPlan,
        compensation: Compensation = "sequential",
        compensation_text: CalibrationConfig = COMPENSATION_TEXT,
    ) -> None:
        self.plan = plan
        self.compensating = Compensating(compensation, compensation_text)

    @classmethod
    def of_plan(cls, plan: CompressionPlan, compensating: Compensating | None) -> Self:
        """The callback that carries out a plan, with the compensation of the one that would have made it, if any."""
        return cls(plan) if compensating is None else cls(plan, compensating.how, compensating.text)

    def check(self, rehearsal: Rehearsal) -> None:
        """Checks, before any work, that the plan is for this model.

        Raises:
            UserError: it is for another model.
        """
        self.plan.check(architecture_of(rehearsal.model.config), None)
        if self._prunes:
            self.compensating.check(rehearsal.model)
        apply_pruning_(rehearsal.model, self.plan)
        rehearsal.rank_adapters(self.plan.ranks)

    def check_text(self, data: TokenDataModule) -> None:
        if self._prunes:
            self.compensating.check_text(data)

    @property
    def _prunes(self) -> bool:
        return self.plan.widths != self.plan.architecture

    @property
    def options(self) -> dict[str, Any]:
        sha256 = hashlib.sha256(self.plan.to_json().encode()).hexdigest()
        return {"plan_sha256": sha256, **self.compensating.options}

    def compress(self, job: CompressionJob) -> None:
        model = job.model
        before = Size.of(model.network)
        self.plan.check(architecture_of(model.network.config), model.base_sha256)
        if self._prunes:
            self.compensating.begin(model, job.data)
        if self.plan.hidden is not None:
            model.reorder(self.plan.hidden)  # before the dense model, which the result is compared with, is remembered
        dense = self.compensating.remember(model) if self._prunes else None
        model.rank_adapters(self.plan.ranks)
        model.prune([(list(layer.kv_groups), list(layer.ffn_channels)) for layer in self.plan.layers])
        self.compensating.apply(model, dense, job.data, job.processes)
        rank_zero_info(describe(model.known_plan(), before, Size.of(model.network), "as the plan says", ()))
