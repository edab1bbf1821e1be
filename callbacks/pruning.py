"""Makes the base narrower before the fit that recovers it."""

import hashlib
from dataclasses import asdict
from typing import Any, Self

from lightning.pytorch.utilities import rank_zero_info

from qpruner.anatomy import architecture_of
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.callbacks.calibration import calibration_of
from qpruner.callbacks.compensation import Compensating
from qpruner.callbacks.compression import CompressionInSetup, CompressionJob, Rehearsal
from qpruner.compressed import State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.pruning.compensation import COMPENSATION_TEXT, Compensation
from qpruner.pruning.criteria import Aggregate, Criterion
from qpruner.pruning.rounds import Size, asked_for, describe, prune_
from qpruner.pruning.scores import LayerScores, check_criterion, needs_text, score_units
from qpruner.pruning.selection import Kept, SelectionConfig
from qpruner.pruning.surgery import apply_pruning_


class StructuredPruning(CompressionInSetup):
    """Removes KV groups and FFN channels of the base, the least important first (LLM-Pruner, arXiv 2305.11627).

    ```yaml
    trainer:
      callbacks:
        - class_path: StructuredPruning
          init_args: {ratio: 0.2, selection: {scope: global}}
    ```

    setup
        Scores the units, narrows the base and lets the weights that stay make up for what went, once: where the base
        comes from the folder that it is kept in, nothing is done and the dense model is not needed. With several
        devices each works on its share of the micro-batches, the first decides, and all keep the same.

    Args:
        ratio: share of all parameters to remove, in (0, 1).
        criterion: how a unit is scored; see `qpruner.pruning.criteria`.
        aggregate: what a unit's coupled weights make together.
        rounds: number of times that units are scored and removed, at least 1; later rounds score the model that earlier
            ones left.
        selection: how layers share what is removed.
        calibration: calibration text for criteria that need one.
        compensation: what the weights that stay make up for after each round: nothing, what each linear lost by itself,
            or also what the layers before it got wrong; see `qpruner.pruning.compensation`.
        compensation_text: calibration text of the compensation; more tokens than a layer has FFN channels.

    Raises:
        UserError: a ratio that no legal widths reach, an unsupported model family, no room on the device, too little
            calibration text, or a gradient that is not finite.
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
        """Finds, before any work, what the options ask and cannot be had.

        Raises:
            UserError: a ratio that no legal widths reach, or too little text.
        """
        check_criterion(rehearsal.model, self.criterion)
        self.compensating.check(rehearsal.model)
        rehearsal.prune(self.ratio, self.selection)

    def check_text(self, data: TokenDataModule) -> None:
        self.compensating.check_text(data)
        if needs_text(self.criterion):
            data.calibration(self.calibration.num_sequences, self.calibration.length)

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
        asked = asked_for(self.ratio, model.network, self.selection)
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
            model.known_plan().architecture,
            ratio=self.ratio,
            rounds=self.rounds,
            selection=self.selection,
            score=score,
            narrow=narrow,
        )
        plan = model.known_plan()
        rank_zero_info(describe(plan, before, Size.of(model.network), asked, self.selection.leave_alone))

    def _calibration(self, job: CompressionJob) -> Calibration | None:
        """This device's share of the text, with the model moved to the device; None where no text is needed."""
        if not needs_text(self.criterion):
            return None
        return calibration_of(
            job.model.network, job.data, self.calibration, job.processes, f"The criterion {self.criterion!r}"
        )


class PlannedPruning(CompressionInSetup):
    """Narrows the base and orders what stays as a plan says, instead of making one: no scores.

    From Python, or by ``qpruner fit --plan plan.json``, which puts it in the place of what decides on a compression::

        Trainer(callbacks=[PlannedPruning(CompressionPlan.read(Path("plan.json")))])

    setup
        Narrows the base, once; one that comes from the folder that it is kept in is narrow already.

    Args:
        plan: plan that is carried out, as far as it says which units stay and in which order, in which order the
            channels of the hidden states come, and what ranks adapters have.
        compensation: what the weights that stay make up for; see `StructuredPruning`.
        compensation_text: calibration text of the compensation.

    Raises:
        UserError: the plan is for a model of another shape or orders what cannot be ordered, or too little text.
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
        """What carries a plan out, with the compensation of the callback that would have made one, if any."""
        return cls(plan) if compensating is None else cls(plan, compensating.how, compensating.text)

    def check(self, rehearsal: Rehearsal) -> None:
        """Finds, before any work, whether the plan is for another model.

        Raises:
            UserError: it is.
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
            model.reorder(self.plan.hidden)  # before the dense model is remembered, which it is compared with
        dense = self.compensating.remember(model) if self._prunes else None
        model.rank_adapters(self.plan.ranks)
        model.prune([(list(layer.kv_groups), list(layer.ffn_channels)) for layer in self.plan.layers])
        self.compensating.apply(model, dense, job.data, job.processes)
        rank_zero_info(describe(model.known_plan(), before, Size.of(model.network), "as the plan says", ()))
