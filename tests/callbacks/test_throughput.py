"""Tokens per second, by a clock of the test's own."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from support.fits import finetuner

from qpruner.callbacks import throughput
from qpruner.callbacks.throughput import Throughput
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.records.report import scalars


class Clock(Callback):
    """Time that passes in batches alone: batch n takes n + 1 seconds, and one of validation 100."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.now += len(self.tokens)

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 100


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("accumulated", "ends"),
    [(1, [1, 2, 3, 4]), (4, [4, 5, 9, 10])],  # an epoch has five batches
)
def test_it_is_tokens_without_padding_by_seconds_without_validation(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, accumulated: int, ends: list[int]
) -> None:
    """``ends`` are numbers of batches after which optimizer steps end."""
    data = StoriesDataModule(
        tokenizer=str(tiny_llama), max_length=200, num_train=22, num_validation=6, num_test=6, num_choices=0,
        loader=LoaderConfig(batch_size=4),
    )  # fmt: skip
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    running = Trainer(
        accelerator="cpu", max_steps=4, val_check_interval=1, limit_val_batches=1, log_every_n_steps=every,
        logger=TensorBoardLogger(tmp_path, name="", version=""), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=accumulated,
        callbacks=[clock, Throughput()],
    )  # fmt: skip
    running.fit(finetuner(tiny_llama), datamodule=data)
    assert len(clock.tokens) == ends[-1] and len({*clock.tokens}) > 1
    logged = [0, *ends[every - 1 :: every]]
    expected = [
        (number * every - 1, pytest.approx(sum(clock.tokens[first:last]) / sum(range(first + 1, last + 1))))
        for number, (first, last) in enumerate(pairwise(logged), 1)
    ]
    assert scalars(tmp_path, "train/tokens_per_second") == expected
