"""Shows how gates arrive at a plan, and writes the plan."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from qpruner.joint.gates import entropy
from qpruner.joint.learner import PlanLearner
from qpruner.joint.price import bits_of_layers, smooth_bytes
from qpruner.joint.projection import hard
from qpruner.joint.space import Gates, unit_bytes
from qpruner.records.folder import RunFolder
from qpruner.records.pictures import save_figure
from qpruner.records.pictures_of_learning import learning_figure

LOOKS = 40
"""Number of times that the gates are inspected in the course of a fit."""


class LearnedPlan(Callback):
    """Follows gates while they learn, and writes the plans that they arrive at.

    on_train_batch_end
        Now and then: what each layer would keep and in how many bits, for the picture, and how undecided the gates are
        (``joint/entropy``, in bits) for TensorBoard.
    on_train_end
        Stops the run if a loss was not finite. Otherwise projects the gates to their budgets and writes the plan of
        each budget and the picture, on rank zero; the other ranks wait.

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
        if not self.steps:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, max(int(trainer.max_steps) // LOOKS, 1)
        if step > self.steps[-1] and (step % every == 0 or step == trainer.max_steps):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlanLearner)
        pl_module.check_losses()  # before a plan marks the learning as finished; checkpoints may be rarer than steps
        if trainer.is_global_zero:
            limits, space = pl_module.limits, pl_module.space
            plans = pl_module.plans()
            assert pl_module.best is not None
            tokens = pl_module.ground.text.num_scored * len(limits)
            rank_zero_info(
                f"The gates after {pl_module.best.step} of {trainer.max_steps} steps are best on the rows that they "
                f"began with, with a loss of {pl_module.best.loss / tokens:.4f} nats per token."
            )
            for limit, plan in zip(limits, plans, strict=True):
                stored = unit_bytes(plan, space.dense_size)
                rank_zero_info(f"Learned a plan of {stored:,} bytes for the decoder's units, within {limit:,}.")
            figure = learning_figure(self.history, self.steps, limits[0])
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
