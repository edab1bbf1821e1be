"""Prunes the base while its adapters train, guided by them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from qpruner.adapters.lora import LoRAConfig, is_target
from qpruner.anatomy import family_of, refuse_experts
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks.compensation import Compensating
from qpruner.callbacks.compression import CompressionInTraining, Rehearsal, check_dense, data_of
from qpruner.callbacks.pruning_event import PruningEvent
from qpruner.compressed import State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.plan import format_ranges
from qpruner.pruning.compensation import COMPENSATION_TEXT, Compensation
from qpruner.pruning.gradual import GradualPruning, agreement
from qpruner.pruning.lora_guided import MovingAverage, Variant, score_adapted
from qpruner.pruning.rounds import Size, describe
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import SelectionConfig, Supply
from qpruner.pruning.supplies import asked_for
from qpruner.pruning.weight_gradients import WeightGradients
from qpruner.training.holding import HoldsModel, expect_holder
from qpruner.training.processes import processes_of

SCORER = "LoRAGuidedPruning, which scores by adapters,"


class LoRAGuidedPruning(CompressionInTraining):
    """Removes KV groups and FFN channels during LoRA training, by the adapters' gradients (LoRAPrune, 2305.18403).

    No gradient of a base weight is stored, except by `criterion: gradient`, so the base may be quantized: put
    `MixedPrecisionQuantization` before this callback. It comes after every other callback that compresses. To quantize
    the result, add a phase to the run.

    ```yaml
    trainer:
      callbacks:
        - class_path: LoRAGuidedPruning
          init_args: {ratio: 0.2, schedule: {every_n_steps: 20}}
    ```

    setup
        Determines what there is to prune, and checks that the adapters can score it.
    on_fit_start
        Starts observing the gradients of each optimizer step, after clipping: each unit is scored from the adapters'
        weights and gradients (equation 10), and the score goes into a moving average (equation 11).
    on_train_start
        Makes sure that the schedule fits the number of optimizer steps.
    on_train_batch_end
        At each event of the schedule, masks the units with the lowest averages, more each time; masked units stay
        masked.
    on_train_end
        Masks whatever the schedule had not yet reached if the fit ended early.
    on_fit_end
        Removes the masked units from the base and the adapters, and compensates if asked to.
    on_exception
        Stops observing gradients, so that the module can be fitted again.
    state_dict, load_state_dict
        Keep the averages and the share of the pruning that is done in a checkpoint.

    Args:
        ratio: share of all parameters of the incoming model to remove, in (0, 1).
        criterion: gradients used for scoring: ``lora`` for those of the adapters; ``gradient`` for those of the weights
            themselves, unclipped, at the memory cost of one float32 gradient per weight, as a reference to compare
            with.
        variant: how an element's gradient and weight are combined into a score; see `qpruner.pruning.lora_guided`.
        decay: share of the moving average that is retained at each step, in [0, 1).
        schedule: schedule of the steps at which units are masked, and of how many.
        selection: how the removal is distributed over layers. By default layers do not compete: these scores are
            first-order and misjudge KV groups relative to channels, most of all on large models.
        compensation: what the remaining weights compensate for at the end of the fit, relative to the model with its
            adapters and without masks; see `StructuredPruning`. The base must not be packed.
        compensation_text: calibration text for the compensation.

    Raises:
        UserError: a ratio that no legal widths reach or that removes nothing, an unsupported model family, a layer that
            may lose units of a kind without an adapter on any of their linears, a schedule longer than the fit, or no
            step with finite gradients before an event.
    """

    leaves = "pruned in training"
    needs_whole_model = "scores and masks units across whole layers as they train"

    def __init__(
        self,
        ratio: float,
        criterion: Literal["lora", "gradient"] = "lora",
        variant: Variant = "code",
        decay: float = 0.9,
        schedule: CubicSchedule = CubicSchedule(),  # noqa: B008  # frozen
        selection: SelectionConfig = SelectionConfig(scope="local"),  # noqa: B008  # frozen
        compensation: Compensation = "none",
        compensation_text: CalibrationConfig = COMPENSATION_TEXT,
    ) -> None:
        if not 0 < ratio < 1:
            raise UserError(f"LoRAGuidedPruning has ratio {ratio}; the share of all parameters to remove is in (0, 1).")
        if not 0 <= decay < 1:
            raise UserError(f"LoRAGuidedPruning has decay {decay}; the share of the average that stays is in [0, 1).")
        self.ratio = ratio
        self.criterion = criterion
        self.variant: Variant = variant
        self.decay = decay
        self.schedule = schedule
        self.selection = selection
        self.compensating = Compensating(compensation, compensation_text)
        self._observing = ExitStack()

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "criterion": self.criterion,
            "variant": self.variant,
            "decay": self.decay,
            "schedule": asdict(self.schedule),
            "selection": {**asdict(self.selection), "leave_alone": list(self.selection.leave_alone)},
            **self.compensating.options,
        }

    @property
    def needs_dense_base(self) -> bool:
        return self.compensating.how != "none"

    def check(self, rehearsal: Rehearsal) -> None:
        refuse_experts(rehearsal.model.config, SCORER, "StructuredPruning")
        self.compensating.check(rehearsal.model)
        offers = rehearsal.prune(self.ratio, self.selection)
        self._check_adapters(rehearsal.model, rehearsal.lora, offers)

    def check_text(self, data: TokenDataModule) -> None:
        self.compensating.check_text(data)

    def check_steps(self, num_steps: float) -> None:
        self.schedule.check(num_steps)

    def _check_adapters(self, model: Any, lora: LoRAConfig, offers: Sequence[Supply]) -> None:
        if lora.pooled:
            raise UserError(
                "LoRAGuidedPruning removes columns of trained adapters, and --model.lora.pooled ties columns to the "
                "groups of the base, which are others once some are gone. Drop one of both, or prune before the fit, "
                "by StructuredPruning."
            )
        _, family = family_of(model.config)
        targets = lora.target_modules
        for units, names, losing in (
            ("KV groups", ("q", "k", "v", "o"), [n for n, offer in enumerate(offers) if offer.loses_groups]),
            ("FFN channels", ("gate", "up", "down"), [n for n, offer in enumerate(offers) if offer.loses_channels]),
        ):
            paths = [family.projections[first] for first, *_ in family.fused(names)]
            without = [
                number
                for number in losing
                if not any(is_target(f"{family.layers}.{number}.{path}", targets) for path in paths)
            ]
            if without:
                ends = ", ".join(path.rpartition(".")[2] for path in paths)
                remedy = "Add some of them"
                others = any(offer.parameters for number, offer in enumerate(offers) if number not in without)
                if others and not self.selection.uniform:
                    remedy += ", or name these layers in selection.leave_alone, which spares all their units"
                raise UserError(
                    f"LoRAGuidedPruning scores {units} by the adapters on {ends}, and there are none in layers "
                    f"{format_ranges(without)}: --model.lora.target_modules is "
                    f"{targets if isinstance(targets, str) else ', '.join(targets)}. {remedy}."
                )

    # In the order of a fit.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = self.begin(trainer, pl_module)
        model = module.compressed
        self.check_unadapted(model)
        if model.base_state is State.DENSE:
            check_dense(model)
        refuse_experts(model.network.config, SCORER, "StructuredPruning")
        if self.criterion == "gradient" and trainer.precision == "16-mixed":
            raise UserError(
                "With criterion gradient the gradients of weights would be those of a scaled loss under "
                "--trainer.precision 16-mixed. Use bf16-mixed or 32-true, or criterion lora."
            )
        dense = model.known_plan().architecture
        self.gradual = GradualPruning.of(model.network, self.ratio, self.selection, dense)
        self._check_adapters(model.network, module.lora, self.gradual.dense)
        self.compensating.begin(model, data_of(trainer))
        self._before = Size.of(model.network)
        self._asked = asked_for(self.ratio, model.network, self.selection, dense)
        zeros = [
            LayerScores(*(torch.zeros(n, dtype=torch.float64) for n in (supply.kv_groups, supply.ffn_channels)))
            for supply in self.gradual.dense
        ]
        self._average = MovingAverage(self.decay, zeros)
        self._last_scores: list[LayerScores] | None = None  # of the previous event
        self._share = 0.0  # of the pruning that is done
        self._step = 0  # optimizer steps seen so far
        self._weights: WeightGradients | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = expect_holder(pl_module)
        if module.compressed.masks is None:  # otherwise they come from a checkpoint
            module.compressed.mask(
                [(list(range(s.kv_groups)), list(range(s.ffn_channels))) for s in self.gradual.dense]
            )
        if self._share == 1:  # resumed in the cool-down
            return
        observer = partial(self._observe, trainer, module)
        module.after_clipping.append(observer)
        self._observing.callback(module.after_clipping.remove, observer)
        if self.criterion == "gradient":
            self._weights = WeightGradients(module.compressed.network.get_base_model())
            self._observing.callback(self._weights.remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.check_steps(steps)
        self._total_steps = int(steps)
        self._step = trainer.global_step

    def _observe(self, trainer: Trainer, module: HoldsModel, finite: bool) -> None:
        """Scores the units from the gradients of an optimizer step."""
        gradients = None
        if self._weights is not None:
            gradients = self._weights.take(lambda gradient: trainer.strategy.reduce(gradient, reduce_op="mean"))
        if finite:
            self._average.add(score_adapted(module.compressed.network.get_base_model(), self.variant, gradients))
        else:
            self._average.skipped += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self.schedule.is_event(self._step, self._total_steps):
                self._prune(trainer, expect_holder(pl_module), self.schedule.share(self._step, self._total_steps))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._share < 1:
            rank_zero_warn(
                f"The fit ended after {trainer.global_step} of {self._total_steps} optimizer steps, before its pruning "
                f"schedule did. What is left to prune is pruned now."
            )
            self._prune(trainer, expect_holder(pl_module), 1.0)

    def _prune(self, trainer: Trainer, module: HoldsModel, share: float) -> None:
        """Masks the units that must be gone once a given share of the pruning is done."""
        if self._average.steps == 0:
            raise UserError(
                f"The gradients of all {self._average.skipped} steps so far were not finite, so that nothing says "
                f"which units matter. Use --trainer.precision bf16-mixed or 32-true, or a lower --model.optimizer.lr."
            )
        masks = module.compressed.masks
        assert masks is not None
        scores = [LayerScores(layer.kv_groups.cpu(), layer.ffn_channels.cpu()) for layer in self._average.scores]
        alive = masks.kept
        kept = trainer.strategy.broadcast(self.gradual.keep(scores, alive, share))
        same = None
        if self._last_scores is not None:
            same = agreement(alive, kept, self.gradual.keep(self._last_scores, alive, share))
        module.compressed.mask(kept)
        self._last_scores, self._share = scores, share
        if share == 1:  # scores are no longer needed
            self._observing.close()
        event = PruningEvent(trainer.global_step, self.gradual, kept, scores, same, self._average.skipped)
        rank_zero_info(event.line)
        event.log(trainer.loggers)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = expect_holder(pl_module).compressed
        assert model.masks is not None
        kept = model.masks.kept
        model.unmask()
        whole = self.compensating.remember(model)
        after, rounded = model.prune(kept)
        self.compensating.apply(model, whole, data_of(trainer), processes_of(trainer))
        model.record(self.step)
        rank_zero_info(describe(model.known_plan(), self._before, after, self._asked, self.selection.leave_alone))
        if rounded:
            rank_zero_info(
                f"{len(rounded)} packed linears lost columns that share scales with others and were rounded anew: "
                f"their weights changed by {sum(rounded.values()) / len(rounded):.1%} of their norm in the mean, "
                f"{max(rounded.values()):.1%} at most."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._observing.close()

    # Between sessions.

    def state_dict(self) -> dict[str, Any]:
        return {
            "average": _tensors(self._average.scores),
            "last_scores": self._last_scores and _tensors(self._last_scores),
            "steps": self._average.steps,
            "skipped": self._average.skipped,
            "share": self._share,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        scores = [LayerScores(*layer) for layer in state_dict["average"]]
        self._average = MovingAverage(self.decay, scores, state_dict["steps"], state_dict["skipped"])
        last = state_dict["last_scores"]
        self._last_scores = last and [LayerScores(*layer) for layer in last]
        self._share = state_dict["share"]


def _tensors(scores: Sequence[LayerScores]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.kv_groups, layer.ffn_channels) for layer in scores]
