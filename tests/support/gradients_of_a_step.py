"""Writes the gradients of the first optimizer step on 16 rows of uneven length, dealt out as told.

Usage: gradients_of_a_step.py MODEL OUTPUT RANKS ROWS_OF_A_MICRO_BATCH MICRO_BATCHES [DISTILLATION]

DISTILLATION is JSON; what is recorded goes to the folder of OUTPUT.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.optim import Optimizer

from qpruner.adapters.lora import LoRAConfig
from qpruner.datamodules.loader import ResumableLoader
from qpruner.datamodules.rows import Row, TextExamples, TokenRows
from qpruner.training.distillation import DistillationConfig
from qpruner.training.module import LoRAFinetuner


def ragged_rows() -> TextExamples:
    """16 rows, of which each has its own length and number of scored tokens, one of them none."""
    tokens = np.random.default_rng(2).integers(5, 1000, (16, 20)).astype(np.int32)
    places = np.arange(20)
    nothing = np.zeros(20, np.int32)
    rows = [Row(tokens[n], places <= n, nothing)[: 3 + n] for n in range(16)]
    return TextExamples(TokenRows.of(rows), pad_token=0)


class RaggedRows(LightningDataModule):
    """The rows, dealt to ranks and micro-batches in a random order."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        assert trainer is not None
        return ResumableLoader(
            ragged_rows(), batch_size=self.size, seed=3, rank=trainer.global_rank,
            world_size=trainer.world_size, accumulate=trainer.accumulate_grad_batches,
        )  # fmt: skip


class WritingFinetuner(LoRAFinetuner):
    """Writes what its optimizer is given."""

    output = ""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = {name: p.grad for name, p in self.named_parameters() if p.requires_grad}
        if self.global_rank == 0:
            torch.save(gradients, self.output)


def finetuner(model: str, distillation: DistillationConfig | None = None) -> WritingFinetuner:
    """Without dropout, and with both factors of its adapters drawn at random."""
    module = WritingFinetuner(base=model, lora=LoRAConfig(r=2, dropout=0.0), distillation=distillation)
    module.configure_model()
    for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return module


def write_gradients(
    model: str, output: str, ranks: int, size: int, num: int, distillation: DistillationConfig | None = None
) -> None:
    module = finetuner(model, distillation)
    module.output = output
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=1, logger=False,
        accumulate_grad_batches=num, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, default_root_dir=Path(output).parent,
    )  # fmt: skip
    trainer.fit(module, datamodule=RaggedRows(size))


if __name__ == "__main__":
    model, output, ranks, size, num, *distillation = sys.argv[1:]
    config = DistillationConfig(**json.loads(distillation[0])) if distillation else None
    write_gradients(model, output, int(ranks), int(size), int(num), config)
