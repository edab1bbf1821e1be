"""Shows how gates arrive at a plan, and writes the plan."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from qpruner.anatomy import unit_weights
from qpruner.joint.gates import entropy
from qpruner.joint.learner import PlanLearner
from qpruner.joint.price import bits_of_layers, smooth_bytes
from qpruner.joint.projection import hard
from qpruner.joint.space import Gates, unit_bytes
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunFolder
from qpruner.records.pictures import save_figure
from qpruner.records.pictures_of_learning import learning_figure

LOOKS = 40
"""Number of times that the gates are inspected in the course of a fit."""
SHORT = 0.02
"""Share of the weights that a fixed ratio leaves that a plan may lack, due to legal widths, before the log says so."""


class LearnedPlan(Callback):
    """Follows gates while they learn, and writes the plans that they arrive at.

    on_train_start, on_train_batch_end
        Compares the gates with the best so far, before a checkpoint of the same step is written. Now and then, notes
        what each layer would keep and in how many bits, for the picture, and how undecided the gates are
        (``joint/entropy``, in bits) for TensorBoard.
    on_train_end
        Stops the run if a loss was not finite.
    on_fit_end
        Projects the best gates to their budgets and writes the plan of each budget and the picture, on rank zero; the
        other ranks wait. A run that was killed between its last checkpoint and this has no step left to do, so that
        only this hook is called when it is repeated.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.steps: list[int] = []
        self.history: list[dict[str, list[float]]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.history = state_dict["steps"], state_dict["history"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _compare(pl_module)
        if not self.steps:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _compare(pl_module)
        step, every = trainer.global_step, max(int(trainer.max_steps) // LOOKS, 1)
        if step > self.steps[-1] and (step % every == 0 or step == trainer.max_steps):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlanLearner)
        pl_module.check_losses()  # before a plan marks the learning as finished; checkpoints may be rarer than steps

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlanLearner)
        if trainer.is_global_zero:
            plans = pl_module.plans()
            assert pl_module.best is not None
            tokens = pl_module.ground.text.num_scored * len(plans)
            rank_zero_info(
                f"The gates after {pl_module.best.step} of {trainer.max_steps} steps are best on the rows that they "
                f"began with, with a loss of {pl_module.best.loss / tokens:.4f} nats per token."
            )
            for limit, plan in zip(pl_module.limits, plans, strict=True):
                for note in notes_of(pl_module, limit, plan):
                    rank_zero_info(note)
            figure = learning_figure(self.history, self.steps, pl_module.limits[0])
            save_figure(figure, self.folder.learning_picture)
            if isinstance(trainer.logger, TensorBoardLogger):
                trainer.logger.experiment.add_figure("joint/layers", figure, trainer.global_step)
            for number, plan in enumerate(plans[1:], 1):
                self.folder.plans.mkdir(exist_ok=True)
                plan.write(self.folder.plans / f"budget-{number}.json")
            plans[0].write(self.folder.learned_plan)  # written last: it marks the learning as finished
        trainer.strategy.barrier("learned_plan")

    @torch.no_grad()
    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlanLearner)
        above = pl_module.above_threshold(pl_module.limits[0])
        gates = hard(above, dict.fromkeys(above, 0.0))
        self.steps.append(trainer.global_step)
        self.history.append(seen(pl_module, gates))
        if trainer.logger is not None:
            undecided = entropy(above, pl_module.temperature)
            trainer.logger.log_metrics({"joint/entropy": undecided}, step=trainer.global_step)


def _compare(learner: LightningModule) -> None:
    assert isinstance(learner, PlanLearner)
    if learner.comparison_is_due:
        learner.compare_with_best()


def notes_of(learner: PlanLearner, limit: int, plan: CompressionPlan) -> Iterator[str]:
    """What to say about the plan of a budget: its bytes, and what of the configuration could not be kept to.

    Args:
        learner: learner that has arrived at the plan.
        limit: bytes of the budget.
        plan: plan of the budget.
    """
    space, config = learner.space, learner.config
    if config.constraint == "penalty":
        above = learner.above_threshold(limit)
        stored = float(smooth_bytes(space, hard(above, dict.fromkeys(above, 0.0))))
        if stored > limit:
            yield (
                f"The penalty has left the gates at {stored:,.0f} bytes, above the budget of {limit:,}: the plan is "
                f"projected to it. Raise joint.penalty, which is {config.penalty:g}, or set joint.constraint to "
                f"projection."
            )
    kept = unit_weights(plan.widths)
    if space.pins_weights and space.most_weights is not None and kept < (1 - SHORT) * space.most_weights:
        yield (
            f"The plan keeps {kept:,} weights of the decoder's units, fewer than the {space.most_weights:,} that "
            f"StructuredPruning.ratio leaves: more do not fit into {limit:,} bytes. Raise the budget or the ratio."
        )
    stored_by_plan = unit_bytes(plan, space.dense_size)
    yield f"Learned a plan of {stored_by_plan:,} bytes for the decoder's units, within {limit:,}."


def seen(learner: PlanLearner, gates: Gates) -> dict[str, list[float]]:
    """What each layer keeps if gates are made hard; see `learning_figure`."""
    space = learner.space
    kept = {
        name: [float(part.mean()) for part in space.by_layer(gates[kind], kind)]
        if kind in gates
        else [1.0] * space.num_layers
        for name, kind in (("kv_groups", "groups"), ("ffn_channels", "channels"))
    }
    return {**kept, "bits": bits_of_layers(space, gates).tolist(), "bytes": [float(smooth_bytes(space, gates))]}
