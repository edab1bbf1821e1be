"""Writes the results of `predict`, in the order of the data."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from qpruner.files import write_text


class PredictionsWriter(Callback):
    """Gathers the records of all ranks at the end of a prediction and writes them as JSON lines.

    ``qpruner predict`` adds it by default; from Python::

        Trainer(callbacks=[PredictionsWriter(Path("predictions.jsonl"))]).predict(module, datamodule=data)

    on_predict_start
        Discards the records of an earlier prediction.
    on_predict_batch_end
        Collects the records of the batch.
    on_predict_end
        Writes the records of all ranks, in the order of the data.

    Args:
        path: file to write; it appears at the end, complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._records = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[dict[str, Any]],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._records += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = [self._records]
        if trainer.world_size > 1:
            ranks = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, self._records)
        if trainer.is_global_zero:
            # Rows first, then the questions of each task, each in the order of the split.
            together = [record for rank in ranks for record in rank]
            tasks = {task: place for place, task in enumerate(dict.fromkeys(r.get("task", "") for r in together), 1)}
            records = sorted(together, key=lambda r: (tasks[r["task"]], r["example"]) if "task" in r else (0, r["row"]))
            if unscored := sum(not math.isfinite(record.get("nll", 0.0)) for record in records):
                rank_zero_warn(
                    f"The loss of {unscored} of {len(records)} records is not finite; their nll is written as text."
                )
            write_text(self.path, "".join(_line(record) for record in records))


def _line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, whose numbers are all finite."""
    return json.dumps({name: _finite(value) for name, value in record.items()}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
