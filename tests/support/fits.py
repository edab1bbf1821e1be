"""Fits of the tiny Llama in this process: its module, Trainers, and what is left of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import KeepModel, RunCheckpoint
from qpruner.datamodules import StoriesDataModule
from qpruner.pruning.selection import SelectionConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

PRUNING: dict[str, Any] = {
    "ratio": 0.05,
    "criterion": "param_first",
    "selection": SelectionConfig(scope="local"),
    "calibration": CalibrationConfig(num_sequences=6, length=8),
    "compensation": "none",
}
"""Slices of the dense weights, alike in all layers, whose scores a plain reference can compute."""


def finetuner(base: Path, **changes: Any) -> LoRAFinetuner:
    options = {"lora": LoRAConfig(r=2), "optimizer": OptimizerConfig(lr=0.01, schedule="constant")}
    return LoRAFinetuner(base=str(base), seed=3, **options | changes)


def trainer(*callbacks: Callback, steps: int = 2, precision: Any = "32-true") -> Trainer:
    return Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=any(isinstance(callback, RunCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )


def fit(module: LoRAFinetuner, data: StoriesDataModule, *callbacks: Callback, **options: Any) -> LoRAFinetuner:
    if module.kept_in is not None:
        callbacks = *callbacks, KeepModel(module.kept_in, module.kept_in)
    trainer(*callbacks, **options).fit(module, datamodule=data)
    return module


def adapters(module: LoRAFinetuner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


class Losses(Callback):
    """The loss of every training step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(float(outputs["loss"]))


class AtStart(Callback):
    """Runs a function before the first step."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look, self.seen = look, None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen = self.look(pl_module)
