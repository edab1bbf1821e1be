"""Writes the gradients and the loss of the first optimizer step on 16 rows of uneven length, dealt out as told.

Usage: gradients_of_a_step.py MODEL OUTPUT RANKS ROWS_OF_A_MICRO_BATCH MICRO_BATCHES
"""

import sys
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from qpruner.adapters.lora import LoRAConfig
from qpruner.datamodules.rows import IGNORED, Batch
from qpruner.training.module import LoRAFinetuner


def ragged_rows() -> Batch:
    """16 rows, of which each has its own number of scored tokens, the first none."""
    tokens = torch.randint(5, 1000, (16, 20), generator=torch.Generator().manual_seed(2))
    labels = tokens.where(torch.arange(20) <= torch.arange(16)[:, None], IGNORED)
    return Batch(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels,
        num_bytes=torch.zeros(16), example=torch.arange(16),
    )  # fmt: skip


class RaggedRows(LightningDataModule):
    """The rows, shared out among ranks and micro-batches in order."""

    def __init__(self, size: int, num: int) -> None:
        super().__init__()
        self.size, self.num = size, num

    def train_dataloader(self) -> Any:
        first = self.trainer.global_rank * self.size * self.num
        starts = range(first, first + self.size * self.num, self.size)
        batches = [{k: v[start : start + self.size] for k, v in ragged_rows().items()} for start in starts]
        return DataLoader(batches, batch_size=None)


class WritingFinetuner(LoRAFinetuner):
    """Writes what its optimizer is given."""

    output = ""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        gradients = {name: p.grad for name, p in self.named_parameters() if p.requires_grad}
        if self.global_rank == 0:
            torch.save({"gradients": gradients, "loss": self.trainer.callback_metrics["train/loss"]}, self.output)


def finetuner(model: str) -> WritingFinetuner:
    """Without dropout, and with both factors of its adapters drawn at random."""
    module = WritingFinetuner(base=model, lora=LoRAConfig(r=2, dropout=0.0))
    module.configure_model()
    for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return module


def write_gradients(model: str, output: str, ranks: int, size: int, num: int) -> None:
    module = finetuner(model)
    module.output = output
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=1, logger=False,
        accumulate_grad_batches=num, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RaggedRows(size, num))


if __name__ == "__main__":
    model, output, *numbers = sys.argv[1:]
    write_gradients(model, output, *map(int, numbers))
