"""The LightningModule that learns gates for structure and precision; the language model itself is frozen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qpruner.datamodules.rows import Batch
from qpruner.errors import UserError
from qpruner.joint.config import JointConfig
from qpruner.joint.gates import Hypernetwork, LayerGates, PlainGates, opened, sampled
from qpruner.joint.network import GatedNetwork
from qpruner.joint.price import smooth_bytes
from qpruner.joint.prior import Text, balanced, fisher_logits, loss_of
from qpruner.joint.projection import Thresholds, differentiable_bytes, plan_within, relative, thresholds_within
from qpruner.joint.space import Gates, JointSpace, Logits, acting
from qpruner.likelihood import IGNORED, Head, Scored, losses_in_chunks, nll_of_logits
from qpruner.plan import CompressionPlan
from qpruner.processes import Processes
from qpruner.seeds import derive_seed
from qpruner.training.distillation import forward_kl
from qpruner.training.finite import LossWatch

COMPARISONS = 10
"""Largest number of times that gates are compared with the best so far, after the start."""


@dataclass(frozen=True)
class Ground:
    """What gates are learned on.

    Args:
        gated: frozen dense model with gates in it, on the device of the fit.
        text: training rows by which gates are initialised and compared.
        processes: processes that learn together.
    """

    gated: GatedNetwork
    text: Text
    processes: Processes


@dataclass(frozen=True)
class Best:
    """The best gates so far.

    Args:
        step: number of optimizer steps that led to these gates.
        loss: total negative log-likelihood by which these gates are the best.
        gates: state of the module that emits the gates.
    """

    step: int
    loss: float
    gates: dict[str, Tensor]


class PlanLearner(L.LightningModule):
    """Learns which units stay and which width each has, by gradients of the loss at the end of the compressed model.

    At every step logits become gates of 0 and 1 within the budget; the model computes as the compressed one would,
    except for compensation, for rounding in the groups that are left, and for adapters; and the loss moves the logits.
    Nothing of the model itself is trained, and checkpoints hold only gates. `qpruner.runs.learned_plan` says when gates
    are compared with the best so far, and writes the plan.

    ``train/loss`` and, with the divergence as the loss, ``train/kl`` are those of the compressed model at the step;
    ``joint/bytes`` is the size of its units, ``joint/entropy`` how undecided gates are, in bits.

    setup
        Lays the ground: loads the model, fills the bank, and inserts gates; then creates the parameters.
    on_fit_start
        Starts from the Fisher information of the dense model, unless a checkpoint has restored the start.

    Args:
        config: how gates are learned.
        lay_ground: function that loads what gates are learned on, called in ``setup`` of the fit; it returns that, and
            the bytes of each budget, the main one first.
        seed: seed of the noise, and of a hypernetwork.
    """

    def __init__(
        self,
        config: JointConfig,
        lay_ground: Callable[["PlanLearner"], tuple[Ground, Sequence[int]]],
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.lay_ground = lay_ground
        self.seed = seed
        self.best: Best | None = None
        self.compared_at = -1
        self._costs: list[Tensor] | None = None
        self._losses = LossWatch()
        self._ground: list[Ground] = []  # in a list, so that it is no submodule

    # What it learns on.

    @property
    def ground(self) -> Ground:
        return self._ground[0]

    @property
    def space(self) -> JointSpace:
        return self.ground.gated.space

    def setup(self, stage: str) -> None:
        if self._ground:
            return
        ground, self.limits = self.lay_ground(self)
        self._ground.append(ground)
        space = self.space
        self.gates = make_gates(self.config, space, derive_seed(self.seed, "gates"))
        for kind, shape in space.shapes.items():
            self.register_buffer(f"start_{kind}", torch.full(shape, math.nan))

    def on_fit_start(self) -> None:
        if self.start_is_known:
            return
        ground = self.ground
        order = fisher_logits(ground.gated, ground.text, ground.processes)
        start = balanced(ground.gated, order, self.limits[0], ground.text, ground.processes)
        for kind, values in start.items():
            getattr(self, f"start_{kind}").copy_(values)

    @property
    def start_is_known(self) -> bool:
        return not any(bool(getattr(self, f"start_{kind}").isnan().any()) for kind in self.space.shapes)

    def logits(self, limit: int) -> Logits:
        """The logits learned for a budget."""
        shifts: Logits = self.gates(math.log(limit / self.limits[0]))
        return {kind: getattr(self, f"start_{kind}") + shift for kind, shift in shifts.items()}

    # Learning.

    @property
    def comparison_is_due(self) -> bool:
        """Whether to compare the gates with the best: at the start, and after each tenth of the steps and the last."""
        every = math.ceil(self.config.steps / COMPARISONS)
        at_end = self.global_step == self.config.steps
        return self.global_step != self.compared_at and (self.global_step % every == 0 or at_end)

    def compare_with_best(self) -> None:
        """Remembers the gates if they are the best so far on the rows that initialised them, within their budgets.

        Gates learn from noisy samples of themselves, and what is best on average need not be so without the noise.
        """
        ground, self.compared_at = self.ground, self.global_step
        loss = sum(
            loss_of(ground.gated, self.logits(limit), limit, ground.text, ground.processes) for limit in self.limits
        )
        if self.best is None or loss < self.best.loss:
            state = {name: values.detach().cpu().clone() for name, values in self.gates.state_dict().items()}
            self.best = Best(self.global_step, loss, state)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        limit = self.limits[self.global_step % len(self.limits)]
        gates = self.gates_of_step(limit, batch_idx)
        self.ground.gated.open(gates)
        mean, parts = self.loss(batch)
        # As in a fit of adapters: a mean of the means of micro-batches and ranks would give tokens of those with few
        # more weight than others.
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        loss: Tensor = mean * num_tokens / batch.get("step_tokens", num_tokens.clamp(min=1))
        if self.config.constraint == "penalty":
            stored = differentiable_bytes(self.space, gates)
            loss = loss + self.config.penalty * (stored / limit).log().abs().float()
        else:
            stored = smooth_bytes(self.space, gates)
            self._add_costs(stored)
        self._losses.see(loss, self.global_step + 1)
        size = len(batch["input_ids"])
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, prog_bar=True, batch_size=size)
        self.log("joint/bytes", stored.detach().float(), batch_size=size)
        return loss

    def _add_costs(self, stored: Tensor) -> None:
        """Adds the gradient of the bytes to that of the micro-batches before, while the graph of the gates exists."""
        costs = torch.autograd.grad(
            stored, [*self.gates.parameters()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        before = self._costs or [torch.zeros_like(cost) for cost in costs]
        self._costs = [total + cost for total, cost in zip(before, costs, strict=True)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best, self.compared_at = Best(**checkpoint["best"]), checkpoint["compared_at"]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Lets gates learn along the budget: the component that would change the bytes is removed from the gradient.

        The loss alone would open nearly every gate. With gradients g of the loss and b of the bytes, a step along
        g - (g b / b b) b leaves the bytes as they are, to first order, and opens gates whose effect on the loss per
        byte is above the mean; g b / b b is the Lagrange multiplier of the budget. AdamW rescales that step gate by
        gate, so the bytes do move, and every step is projected to the budget.
        """
        if self._costs is not None:
            slopes = [parameter.grad for parameter in self.gates.parameters()]
            pairs = [(slope, cost) for slope, cost in zip(slopes, self._costs, strict=True) if slope is not None]
            take_out(*zip(*pairs, strict=True))
            self._costs = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the best gates; no checkpoint is written with gates that are not finite.

        Raises:
            UserError: a loss so far was not finite.
        """
        assert self.best is not None
        checkpoint["best"], checkpoint["compared_at"] = vars(self.best), self.compared_at
        self.check_losses()

    def check_losses(self) -> None:
        """Makes sure that all losses so far were finite; a collective call of all processes.

        Raises:
            UserError: a loss was not.
        """
        strategy = self.trainer.strategy
        step = self._losses.first_broken(self.device, lambda number: strategy.reduce(number, reduce_op="min"))
        if step is not None:
            raise UserError(
                f"The loss at step {step} of the gates is not finite. Lower joint.lr, which is "
                f"{self.config.learning_rate:g}, or compute in another --trainer.precision."
            )

    def gates_of_step(self, limit: int, batch_idx: int) -> Gates:
        """Gates of 0 and 1, with gradients; the same on all processes."""
        logits = acting(self.logits(limit))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "noise", self.current_epoch, batch_idx))
        noisy = sampled(logits, self.temperature, generator)
        thresholds = self.thresholds(noisy, limit)
        above, noisy_above = relative(logits, thresholds), relative(noisy, thresholds)
        return opened(above, noisy_above, self.temperature, self.config.estimator)

    @property
    def temperature(self) -> float:
        """The temperature of the step, which falls to a tenth."""
        return self.config.temperature * (1 - 0.9 * self.global_step / self.config.steps)

    def thresholds(self, logits: Logits, limit: int) -> Thresholds:
        """The thresholds above which gates are open: those of the budget, or with a penalty those of the start."""
        projects = self.config.constraint == "projection"
        return thresholds_within(self.space, logits, limit) if projects else self.start_thresholds(limit)

    def start_thresholds(self, limit: int) -> Thresholds:
        """The thresholds at which the initial gates are within a budget."""
        start = {kind: getattr(self, f"start_{kind}") for kind in self.space.shapes}
        return thresholds_within(self.space, acting(start), limit)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the scored tokens of a batch under the gates, 0 if there are none, and its parts, without a
        gradient.
        """
        network = self.ground.gated.network
        scored = Scored.of(network, batch["input_ids"], batch["labels"], batch["attention_mask"])
        head, num_tokens = Head.of(network), max(len(scored.targets), 1)
        if self.config.loss == "cross_entropy":
            nll, _ = losses_in_chunks(
                head, scored.hidden, lambda logits, part: (nll_of_logits(logits, scored.targets[part]),)
            )
            mean = nll.sum() / num_tokens
            return mean, {"loss": mean.detach()}
        with torch.no_grad(), self.ground.gated.unchanged():
            taught = Scored.of(network, batch["input_ids"], batch["labels"], batch["attention_mask"]).hidden

        def losses(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
            with torch.no_grad():
                of_dense = head(taught[part])
            return nll_of_logits(logits, scored.targets[part]), forward_kl(logits, of_dense, 1.0)

        total, values = losses_in_chunks(head, scored.hidden, losses, (0.0, 1.0), heads=2)
        means = values.sum(0) / num_tokens
        return total.sum() / num_tokens, dict(zip(("loss", "kl"), means.unbind(), strict=True))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decay = 0.05 if self.config.gates == "hypernetwork" else 0.0  # DISP-LLM's
        optimizer = torch.optim.AdamW(self.gates.parameters(), lr=self.config.learning_rate, weight_decay=decay)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / self.config.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # What comes out.

    def above_threshold(self, limit: int) -> Gates:
        """Logits of gates for a budget, relative to the threshold; without noise, gates above 0 are open.

        Gates that a penalty draws to the budget are open as in a step, whether within the budget or not.
        """
        logits = acting(self.logits(limit))
        return relative(logits, self.thresholds(logits, limit))

    def plans(self) -> list[CompressionPlan]:
        """The plan of the best gates, which are taken back, for each budget; within it to the byte."""
        assert self.best is not None
        self.gates.load_state_dict(self.best.gates)
        return [plan_within(self.space, self.logits(limit), limit) for limit in self.limits]


def take_out(slopes: Sequence[Tensor], costs: Sequence[Tensor]) -> None:
    """Removes the component along costs from slopes, in place; both belong to the same parameters."""
    along = sum((slope * cost).sum() for slope, cost in zip(slopes, costs, strict=True))
    length = sum(cost.square().sum() for cost in costs)
    for slope, cost in zip(slopes, costs, strict=True):
        slope.sub_(cost * (along / length) if float(length) > 0 else 0.0)


def make_gates(config: JointConfig, space: JointSpace, seed: int) -> nn.Module:
    """The module that emits the logits."""
    if config.gates == "plain":
        return PlainGates(space.shapes)
    if config.gates == "layers":
        return LayerGates(space.shapes, space.sizes)
    return Hypernetwork(space.shapes, space.sizes, seed)
