"""What studies measure of a compression: its seconds and memory, and the model that it leaves before the first step."""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
from studies import evaluated_on

from qpruner.datamodules import TextDataModule
from qpruner.memory import read_peak, reset_peak
from qpruner.training.module import LoRAFinetuner


@dataclass(frozen=True)
class Report:
    """A text that perplexity is measured on.

    Args:
        name: name of the text in rows and tables.
        file: file of the text.
        rows: number of rows from its start; None for all.
    """

    name: str
    file: str
    rows: int | None

    @classmethod
    def read(cls, text: str) -> "Report":
        name, _, rest = text.partition("=")
        file, _, rows = rest.partition(":")
        return cls(name, file, int(rows) if rows else None)

    def perplexity(self, given: argparse.Namespace, trainer: L.Trainer, module: L.LightningModule) -> float:
        data = TextDataModule(
            tokenizer=given.base, validation=self.file, held_out=0.0, max_length=given.length or given.max_length
        )
        number = len(data.examples("validation"))
        return round(evaluated_on(trainer, module, data, min(number, self.rows or number))["perplexity"], 3)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a study that measures perplexity on texts."""
    parser.add_argument("--dtype", default="auto", help="number format of the base")
    parser.add_argument("--report", type=Report.read, action="append", help="NAME=FILE or NAME=FILE:ROWS", default=[])
    parser.add_argument("--length", type=int, help="tokens in a reported row; by default those of a training row")


def perplexities(given: argparse.Namespace, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
    """Perplexity on each reported text."""
    return {report.name: report.perplexity(given, trainer, module) for report in given.report}


class Cost:
    """Seconds and peak memory of a stretch of work on a model, above what was held before."""

    seconds: float | None = None
    megabytes: float | None = None

    def begin(self, model: Any) -> None:
        for parameter in model.parameters():  # weights that are mapped from a file are not in memory until read
            parameter.detach().sum()
        gc.collect()
        with suppress(OSError, AttributeError):  # what earlier work freed goes back to the system, where that is glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._device = next(model.parameters()).device
        reset_peak(self._device)
        self._held = read_peak(self._device) or 0
        self._since = time.perf_counter()

    def end(self) -> None:
        self.seconds = round(time.perf_counter() - self._since, 2)
        self.megabytes = round(((read_peak(self._device) or 0) - self._held) / 1e6, 1)

    @contextmanager
    def of_work(self, model: Any) -> Iterator[None]:
        self.begin(model)
        yield
        self.end()


class BeforeCompression(L.Callback):
    """Loads the model and begins to measure."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LoRAFinetuner)
        pl_module.load_base()
        self.cost.begin(pl_module.model)


class AfterCompression(L.Callback):
    """Ends the measurement of the cost, if any, and measures the model as the callbacks before it left it."""

    perplexities: dict[str, float] | None = None

    def __init__(self, cost: Cost | None, measure: Callable[[L.Trainer, L.LightningModule], dict[str, float]]) -> None:
        self.cost = cost
        self.measure = measure

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LoRAFinetuner)
        if self.cost is not None:
            self.cost.end()
        pl_module.load_base()
        self.perplexities = self.measure(trainer, pl_module)
