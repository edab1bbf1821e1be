"""The file of predictions: its order, ranks, and numbers that are not finite."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qpruner.callbacks.predictions import PredictionsWriter

ROWS: list[dict[str, Any]] = [{"row": n, "tokens": 3, "nll": n / 2} for n in range(3)]
EXAMPLES: list[dict[str, Any]] = [{"task": "endings", "example": n, "option": n % 2, "gold": 1} for n in range(2)]


def write(writer: PredictionsWriter, *batches: list[dict[str, Any]], rank: int = 0, world_size: int = 1) -> None:
    trainer: Any = SimpleNamespace(world_size=world_size, is_global_zero=rank == 0)
    module: Any = None
    writer.on_predict_start(trainer, module)
    for number, batch in enumerate(batches):
        writer.on_predict_batch_end(trainer, module, batch, None, number)
    writer.on_predict_end(trainer, module)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_first_and_examples_after_them_each_in_order(tmp_path: Path) -> None:
    writer = PredictionsWriter(tmp_path / "predictions.jsonl")
    write(writer, EXAMPLES[::-1], ROWS[2:], ROWS[:2])
    assert written(writer.path) == ROWS + EXAMPLES


def test_an_earlier_prediction_is_forgotten(tmp_path: Path) -> None:
    writer = PredictionsWriter(tmp_path / "predictions.jsonl")
    write(writer, ROWS)
    write(writer, ROWS[:1])
    assert written(writer.path) == ROWS[:1]


def test_the_first_of_two_ranks_writes_the_records_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(into: list[Any], own: Any) -> None:
        into[:] = [own, ROWS[1::2]]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    first, second = (PredictionsWriter(tmp_path / name) for name in ("first", "second"))
    write(first, ROWS[::2], world_size=2)
    write(second, ROWS[1::2], rank=1, world_size=2)
    assert written(first.path) == ROWS and not second.path.exists()


def test_numbers_that_are_not_finite_are_text(tmp_path: Path) -> None:
    writer = PredictionsWriter(tmp_path / "predictions.jsonl")
    with pytest.warns(UserWarning, match="The loss of 2 of 3 records is not finite"):
        write(writer, [{"row": n, "nll": value} for n, value in enumerate((math.inf, 1.5, math.nan))])
    assert [record["nll"] for record in written(writer.path)] == ["inf", 1.5, "nan"]
