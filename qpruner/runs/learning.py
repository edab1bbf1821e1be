"""Learns the plan of a run, in a fit of its own before the phases, from what the run's callbacks ask for."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from qpruner.allocation.budget import Budget
from qpruner.anatomy import architecture_of, refuse_experts, unit_shapes, unit_weights
from qpruner.callbacks import MixedPrecisionQuantization, RunCheckpoint, StructuredPruning, Throughput
from qpruner.callbacks.bits_under_budget import drop_scaffolding
from qpruner.callbacks.compression import Compression, CompressionJob, Rehearsal
from qpruner.compressed import CompressedModel
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.joint.config import JointConfig
from qpruner.joint.learner import Ground, PlanLearner
from qpruner.joint.network import GatedNetwork
from qpruner.joint.prior import Text
from qpruner.joint.space import JointSpace
from qpruner.memory import num_parameters, place_
from qpruner.model_folder import build_skeleton, rehearse_saving
from qpruner.plan import DENSE, UNITS, CompressionPlan
from qpruner.pretrained import held_in
from qpruner.pricing import price_narrowed
from qpruner.pruning.order import reorder_hidden_
from qpruner.pruning.supplies import round_to, supplies
from qpruner.pruning.widths import with_widths
from qpruner.quantization.apply import LoftQSettings, check_rank, starts_of
from qpruner.quantization.embedding import table_precisions
from qpruner.records.folder import RunFolder
from qpruner.runs.learned_plan import LearnedPlan
from qpruner.runs.trainers import make_trainer
from qpruner.training.checkpoint_file import GatesCheckpoint, read_checkpoint
from qpruner.training.module import LoRAFinetuner
from qpruner.training.preflight import check_trainer
from qpruner.training.processes import processes_of
from qpruner.training.sharding import FSDP2, splits


@dataclass(frozen=True)
class Learning:
    """Gates that are learned for a run.

    Args:
        folder: folder of the run.
        model: module of the run, which determines the base and the adapters that it will have.
        data: data module of the run.
        config: how gates are learned.
        quantization: callback that has the budget and the widths.
        pruning: callback that determines whether and how units may be removed; None where none may.
    """

    folder: RunFolder
    model: LoRAFinetuner
    data: TokenDataModule
    config: JointConfig
    quantization: MixedPrecisionQuantization
    pruning: StructuredPruning | None

    @classmethod
    def of(
        cls,
        folder: RunFolder,
        model: LoRAFinetuner,
        data: TokenDataModule,
        callbacks: Sequence[Callback],
        config: JointConfig,
    ) -> "Learning":
        """The part of a run's callbacks that is left to be learned.

        Raises:
            UserError: a callback that decides otherwise, no budget, or a fixed ratio without a callback that gives one.
        """
        compressing = [callback for callback in callbacks if isinstance(callback, Compression)]
        quantizations = [callback for callback in compressing if isinstance(callback, MixedPrecisionQuantization)]
        pruning = [callback for callback in compressing if isinstance(callback, StructuredPruning)]
        if others := {*compressing} - {*quantizations, *pruning}:
            names = ", ".join(sorted(type(callback).__name__ for callback in others))
            raise UserError(
                f"joint learns a plan before the fit, and {names} would change what it says. Leave it out, or carry "
                f"the plan out in a run of its own by --plan."
            )
        if not quantizations or quantizations[0].allocator is None:
            raise UserError(
                "joint learns a plan within a budget, and there is none. Add MixedPrecisionQuantization with a budget, "
                "such as {share: 0.15}, to trainer.callbacks."
            )
        allocator = quantizations[0].allocator
        for name, budget in _named(allocator.budget, config.further_budgets):
            if budget.average_bits is not None:
                raise UserError(
                    f"The {name} of joint is {budget}, whatever is pruned, so that pruning would gain nothing. Give a "
                    f"share of the dense bytes, or bytes."
                )
            if budget.multiply_adds not in (None, allocator.budget.multiply_adds):
                raise UserError(
                    f"The {name} of joint is {budget}, and multiply-adds are limited for all budgets at once, by the "
                    f"budget of MixedPrecisionQuantization. Set multiply_adds there, or drop it."
                )
        if allocator.config.leave_alone:
            raise UserError(
                f"deciding.leave_alone is {list(allocator.config.leave_alone)}, and joint decides on all layers. Leave "
                f"it out; selection.leave_alone of StructuredPruning keeps layers from being pruned."
            )
        if allocator.budget.multiply_adds is not None and not pruning:
            raise UserError(
                f"budget.multiply_adds is {allocator.budget.multiply_adds:g}, and nothing may be pruned. Add "
                f"StructuredPruning to trainer.callbacks, or drop it."
            )
        if pruning and pruning[0].selection.uniform:
            raise UserError(
                "selection.uniform is true, and joint gives each layer widths of its own. Drop one of both."
            )
        if config.fixed_ratio and not pruning:
            raise UserError(
                "joint.fixed_ratio is true, and nothing says a ratio. Add StructuredPruning with one, or drop it."
            )
        if config.fixed_ratio and allocator.budget.multiply_adds is not None:
            raise UserError(
                f"joint.fixed_ratio is true, so that the ratio of StructuredPruning alone says how many weights stay, "
                f"and budget.multiply_adds is {allocator.budget.multiply_adds:g}, which says so, too. Drop one of both."
            )
        return cls(folder, model, data, config, quantizations[0], pruning[0] if pruning else None)

    @property
    def part(self) -> RunFolder:
        """The folder in which the plan is learned."""
        return RunFolder(self.folder.learning)

    def run(self, options: Mapping[str, Any], checkpoint_every_n_steps: int) -> None:
        """Learns the plan, or resumes learning it, and writes it.

        Args:
            options: options of the run's Trainer, of which the length of the fit and validation are ignored.
            checkpoint_every_n_steps: number of optimizer steps between two checkpoints.

        Raises:
            UserError: the strategy splits the model among devices, or a loss is not finite.
        """
        of_fit = {"max_steps": self.config.steps, "max_epochs": -1, "max_time": None, "limit_val_batches": 0}
        callbacks = [
            LearnedPlan(self.folder),
            Throughput(),
            RunCheckpoint(self.part.checkpoint, checkpoint_every_n_steps),
        ]
        trainer = make_trainer({**options, **of_fit}, self.part, callbacks, keeps_checkpoint=True)
        check_trainer(trainer)
        if splits(trainer.strategy):
            raise UserError(
                f"joint puts gates on whole layers, and --trainer.strategy {FSDP2} splits them among devices. Learn "
                f"the plan with ddp, and carry it out in another run by --plan."
            )
        learner = PlanLearner(self.config, self.lay_ground, self.model.seed)
        begins_with = None
        if self.part.checkpoint.exists():
            read_checkpoint(self.part.checkpoint, GatesCheckpoint)  # so that damage is reported
            begins_with = str(self.part.checkpoint)
            rank_zero_info(f"Going on from {begins_with}.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed in a `val_dataloader`")  # which gates do not use
            trainer.fit(learner, datamodule=self.data.for_another_trainer(), ckpt_path=begins_with, weights_only=True)
        if trainer.is_global_zero:  # the other ranks do not need it any more either: all have reached the end
            drop_scaffolding(self.part)

    def check(self, options: Mapping[str, Any]) -> None:
        """Checks, without weights, the base, the budgets and the requested options.

        Args:
            options: options of the run's Trainer.

        Raises:
            UserError: a check fails.
        """
        precision = str(options.get("precision"))
        if precision in ("bf16-true", "16-true"):
            raise UserError(
                f"--trainer.precision is {precision}, in which the gates that joint learns would be too coarse for "
                f"their steps. Use {precision.replace('true', 'mixed')}, with --model.dtype for the weights of the "
                f"model."
            )
        config = self.model.check_base()
        self.data.check_model(config)
        skeleton = build_skeleton(config).to(held_in(config, self.model.dtype_of_base))
        refuse_experts(skeleton.config, "joint", "StructuredPruning and MixedPrecisionQuantization without it")
        plan = Rehearsal(skeleton, self.model.lora).plan.with_precision(
            [dict.fromkeys(UNITS, DENSE)] * architecture_of(config).num_layers, **self.quantization.tables
        )
        table_precisions(config, plan.embedding, plan.head)
        space, _ = self._space(skeleton, plan)
        self._check_rank(config, space)
        if space.lifts:  # the channels of the residual stream are put into another order by the plan
            reorder_hidden_(build_skeleton(config), range(plan.architecture.hidden_size))
        if self.pruning is not None:
            self.pruning.compensating.check(skeleton)
        if self.quantization.calibrated is not None:
            self.quantization.calibrated.check_text(max(columns for _, columns in _shapes(plan)))
        rehearse_saving(self.model.base, config, self.data.tokenizer, trust_remote_code=self.model.trust_remote_code)

    def lay_ground(self, learner: PlanLearner) -> tuple[Ground, list[int]]:
        """Loads the dense model, fills the bank and inserts the gates; returns these and the bytes of each budget."""
        trainer = learner.trainer
        processes = processes_of(trainer)
        described = self.model
        model = CompressedModel.load(
            described.base,
            dtype=described.dtype_of_base,
            trust_remote_code=described.trust_remote_code,
            say=rank_zero_info,
        )
        self.data.check_model(model.network.config)
        allocator = self.quantization.allocator
        assert allocator is not None
        plan = model.known_plan()
        plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers), **self.quantization.tables)
        space, limits = self._space(model.network, plan)
        job = CompressionJob(model, self.data, processes, described.lora, described.seed, folder=self.part)
        of_codes = replace(allocator, loftq_iterations=0)
        bank = of_codes.bank(job, plan)
        place_(model.network, processes.device)  # gates learn on the model as a whole
        gated = GatedNetwork(model.network, bank, space)
        data = learner.trainer.datamodule  # type: ignore[attr-defined]  # which knows what the fit reads
        rows = data.train_dataloader().read_in(0, math.inf)[-self.config.start_rows :]
        text = Text.share(data.examples("train"), rows, data.loader.batch_size, processes)
        return Ground(gated, text, processes), limits

    def _space(self, network: Any, plan: CompressionPlan) -> tuple[JointSpace, list[int]]:
        """The gates, and the bytes of each budget."""
        allocator, pruning = self.quantization.allocator, self.pruning
        assert allocator is not None
        dense_size = network.dtype.itemsize
        lora = self.model.lora
        price = price_narrowed(network, plan, rank=lora.r, targets=lora.target_modules)
        budgets: list[Budget] = [allocator.budget, *self.config.further_budgets]
        limits = [budget.limit(price, plan) for budget in budgets]
        selection = None if pruning is None else pruning.selection
        offers = [] if selection is None else supplies(network, selection, plan.architecture)
        alone = () if selection is None else selection.leave_alone
        space = JointSpace(
            dense=plan,
            offered=tuple(sorted(allocator.precisions, key=lambda precision: precision.bits)),
            dense_size=dense_size,
            most_weights=self._most_weights(plan, num_parameters(network)),
            pins_weights=self.config.fixed_ratio,
            prunes=selection is not None,
            lifts=self.config.lifts,
            multiple=1 if selection is None else round_to(network, selection),
            alone=frozenset(layer % len(plan.layers) for layer in alone),
            least=tuple((offer.least_groups, offer.least_channels) for offer in offers),
        )
        for limit in limits:
            space.check(limit)
        return space, limits

    def _check_rank(self, config: Any, space: JointSpace) -> None:
        """Checks, on the shapes of the narrowest layers, that no adapter of the run can get too high a rank.

        Args:
            config: configuration of the dense model.
            space: gates that may be learned.

        Raises:
            UserError: an adapter's rank is above that of its linear once all is pruned that may be.
        """
        groups, channels = space.fewest
        narrowest = build_skeleton(with_widths(config, replace(space.widths, kv_groups=groups, ffn_channels=channels)))
        packed = space.dense.with_precision([dict.fromkeys(UNITS, space.offered[0])] * space.num_layers)
        loftq = LoftQSettings.of(self.model.lora, self.quantization.loftq_iterations, self.model.seed)
        check_rank(narrowest, starts_of(narrowest, packed, loftq))

    def _most_weights(self, plan: CompressionPlan, parameters: int) -> int | None:
        """The most weights that the units may keep, which equals the multiply-adds per token."""
        if self.config.fixed_ratio:
            assert self.pruning is not None
            return unit_weights(plan.architecture) - round(self.pruning.ratio * parameters)
        assert self.quantization.allocator is not None
        return self.quantization.allocator.budget.most_multiply_adds(plan)


def _named(budget: Budget, further: Sequence[Budget]) -> Iterator[tuple[str, Budget]]:
    """All budgets, each with the name of its option."""
    yield "budget", budget
    for number, further_budget in enumerate(further):
        yield f"further_budgets[{number}]", further_budget


def _shapes(plan: CompressionPlan) -> Iterator[tuple[int, int]]:
    """Shapes [out, in] of all linears of the decoder's units."""
    for layer in range(plan.widths.num_layers):
        for shapes in unit_shapes(plan.widths, layer).values():
            yield from shapes
