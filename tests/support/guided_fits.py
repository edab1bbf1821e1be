"""Fits of the tiny Llama that prune while they train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from qpruner.callbacks import KeepModel, LoRAGuidedPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.memory import num_parameters
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.selection import Kept, SelectionConfig
from qpruner.training.module import LoRAFinetuner
from support.fits import adapters, logits, trainer

STEPS, EVENTS, LAST = 10, [2, 4, 6, 8], 8

SCHEDULE = CubicSchedule(warmup=0.1, cooldown=0.2, every_n_steps=2)
"""Between steps 1 and `LAST` of `STEPS`; no score is asked for after that."""

RATIO, ASKED = 0.08, 6484
"""One of two KV groups and 18 of 48 channels in each layer; 81,056 parameters in all."""


def guided(**changes: Any) -> LoRAGuidedPruning:
    return LoRAGuidedPruning(
        **{"ratio": RATIO, "schedule": SCHEDULE, "selection": SelectionConfig(scope="local")} | changes
    )


def fit(
    module: LoRAFinetuner,
    data: StoriesDataModule,
    *callbacks: Callback,
    steps: int = STEPS,
    clip: float | None = None,
    accumulate: int = 1,
    path: Path | None = None,
) -> LoRAFinetuner:
    if module.kept_in is not None:
        callbacks = *callbacks, KeepModel(module.kept_in, module.kept_in)
    running = trainer(*callbacks, steps=steps)
    running.gradient_clip_val, running.accumulate_grad_batches = clip, accumulate
    running.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return module


def kept_of(module: LoRAFinetuner) -> Kept:
    assert module.plan is not None
    return [([*layer.kv_groups], [*layer.ffn_channels]) for layer in module.plan.layers]


def scores_of(pruning: LoRAGuidedPruning) -> list[Tensor]:
    return [scores for one in pruning._average.scores for scores in (one.kv_groups, one.ffn_channels)]


def size_of_base(module: LoRAFinetuner) -> int:
    with_adapters = module.model.get_base_model()
    return num_parameters(with_adapters) - sum(t.numel() for t in adapters(module).values())


class At(Callback):
    """Calls a function with what a hook is given, trainer and module first, and keeps what it gives."""

    def __init__(self, hook: str, look: Callable[..., Any]) -> None:
        self.seen: list[Any] = []

        def call(*given: Any) -> None:
            self.seen.append(look(*given))

        setattr(self, hook, call)


def masked_logits(trainer: Trainer, module: LoRAFinetuner) -> Tensor:
    found = logits(module.model)
    module.model.train()
    return found
