"""Folders of evaluations, written as `qpruner evaluate` does."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qpruner.records.evaluation import Evaluation, Item, TaskScore, TextScore


def items_of(right: Sequence[bool], first: int = 0) -> list[Item]:
    """Questions with two options, of which the first is right; it is the likelier where the model is right."""
    return [
        Item(first + number, 0, (-1.0, -2.0) if is_right else (-2.0, -1.0), (5, 5))
        for number, is_right in enumerate(right)
    ]


def write_evaluation(
    place: Path,
    right: Mapping[str, Sequence[bool]],
    *,
    kept: bool = True,
    texts: Sequence[TextScore] = (),
    **others: Any,
) -> Path:
    """An evaluation in which a model was right where ``right`` says so, by task.

    Args:
        place: folder that gets ``evaluation.json`` and ``items/``.
        right: whether the model is right, of each question of each task.
        kept: whether what it said of every question is there, too.
        texts: scores of texts.
        others: entries of the scores of all tasks that are otherwise, and ``tensor_bytes``.
    """
    num_bytes = others.pop("tensor_bytes", 4_000_000)
    score = replace(TaskScore(1, 0, 0, "acc", "questions.jsonl", "test", 1.5), **others)
    tasks = {
        task: replace(
            score, items=len(outcomes), acc=sum(outcomes) / len(outcomes), acc_norm=sum(outcomes) / len(outcomes)
        )
        for task, outcomes in right.items()
    }
    (place / "items").mkdir(parents=True)
    Evaluation("m", "ab12", 1_000_000, num_bytes, 4.5, "of the process", 2**28, tasks, tuple(texts), ()).write(
        place / "evaluation.json"
    )
    for task, outcomes in right.items() if kept else ():
        lines = [json.dumps(asdict(item)) + "\n" for item in items_of(outcomes)]
        (place / "items" / f"{task}.jsonl").write_text("".join(lines))
    return place
