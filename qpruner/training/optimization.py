"""Optimizer and learning-rate schedule of the recovery fit."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qpruner.errors import UserError, check_ranges

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay.

    Args:
        name: name of the optimizer: ``adamw`` of torch; ``adamw_8bit`` of bitsandbytes, which holds its state in 8
            bits; the ``paged`` ones also move the state to main memory when a CUDA device runs out of memory.
        lr: peak learning rate, above 0.
        weight_decay: decoupled weight decay, at least 0.
        beta1: decay of the moving average of gradients, in [0, 1).
        beta2: decay of the moving average of squared gradients, in [0, 1).
        schedule: schedule of the learning rate after warm-up: ``cosine`` or ``linear`` to ``final_lr`` at the last
            step, or ``constant``.
        warmup_steps: number of optimizer steps over which the learning rate rises from 0.
        final_lr: share of ``lr`` that is left at the last step, in [0, 1].
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "optimizer",
            lr=("above 0 and finite", 0 < self.lr < math.inf),
            weight_decay=("at least 0 and finite", 0 <= self.weight_decay < math.inf),
            beta1=("at least 0 and below 1", 0 <= self.beta1 < 1),
            beta2=("at least 0 and below 1", 0 <= self.beta2 < 1),
            warmup_steps=("at least 0", self.warmup_steps >= 0),
            final_lr=("from 0 to 1", 0 <= self.final_lr <= 1),
        )

    def check(self, num_steps: float) -> None:
        """Checks that the fit has a last step if the schedule needs one.

        Args:
            num_steps: number of optimizer steps of the fit; infinite if only time ends it.

        Raises:
            UserError: the fit has no last step, and the schedule needs one.
        """
        if math.isinf(num_steps) and self.schedule != "constant":
            raise UserError(
                f"--model.optimizer.schedule is {self.schedule!r}, which ends with the last step, and the fit has no "
                f"last step. Give --trainer.max_steps or --trainer.max_epochs, or the schedule 'constant'."
            )


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Parameter]) -> Optimizer:
    """The optimizer of those parameters that require gradients, distinguished by identity."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(trained, **options)  # type: ignore[arg-type]
    import bitsandbytes.optim as bnb

    classes = {"adamw_8bit": bnb.AdamW8bit, "paged_adamw_8bit": bnb.PagedAdamW8bit, "paged_adamw": bnb.PagedAdamW}
    return classes[config.name](trained, **options)


def lr_factor(config: OptimizerConfig, step: int, total_steps: float) -> float:
    """Learning rate at an optimizer step, counted from 0, as a share of the peak learning rate."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    decay = {
        "constant": 0.0,
        "linear": min(1.0, done),
        "cosine": 0.5 - 0.5 * math.cos(math.pi * min(1.0, done)),
    }[config.schedule]
    return 1 - (1 - config.final_lr) * decay


def make_scheduler(config: OptimizerConfig, optimizer: Optimizer, total_steps: Callable[[], float]) -> LambdaLR:
    """The schedule; the number of steps is only requested when a step after the first is due.

    An earlier request would make Lightning build the training loader before it restores the loader's state, which would
    then be lost.
    """
    return LambdaLR(optimizer, lambda step: lr_factor(config, step, total_steps() if step else 1))
