"""Results of an evaluation: ``evaluation.json`` and, beside it, what was measured of every single item."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.files import write_text
from qpruner.schema import Record


@dataclass(frozen=True)
class TaskScore:
    """A model's accuracy on the questions of a task.

    Args:
        items: number of questions.
        acc: fraction of questions whose correct option is the likeliest, in [0, 1].
        acc_norm: fraction of questions whose correct option is the likeliest per character, in [0, 1].
        measure: measure that the task is reported by: ``acc`` or ``acc_norm``.
        source: where the questions come from, such as a file with its SHA-256.
        split: part of the task's questions: ``validation``, ``test`` or ``all``.
        seconds: seconds that the evaluation of the task took.

    Raises:
        UserError: an accuracy outside [0, 1], or a measure that is neither.
    """

    items: int
    acc: float
    acc_norm: float
    measure: str
    source: str
    split: str
    seconds: float
    few_shot: int = 0

    def __post_init__(self) -> None:
        for name in ("acc", "acc_norm"):
            if not (math.isnan(accuracy := getattr(self, name)) or 0 <= accuracy <= 1):
                raise UserError(f"{name} is {accuracy}; an accuracy lies in [0, 1].")
        if self.measure not in ("acc", "acc_norm"):
            raise UserError(f"measure is {self.measure!r}; it must be acc or acc_norm.")

    @property
    def accuracy(self) -> float:
        """The accuracy that the task is reported by."""
        return self.acc if self.measure == "acc" else self.acc_norm


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Args:
        name: name of the text, such as ``wikitext2``.
        protocol: how the text was cut into rows and what was scored, such as ``2,048 tokens, disjoint``.
        tokens: number of scored tokens.
        perplexity: exponential of the mean loss.
        bits_per_byte: bits per byte of the scored text; None where it is unknown.
        source: where the text comes from, such as a file with its SHA-256.
        seconds: seconds that the evaluation of the text took.
        dropped: number of tokens at the end of the text that the protocol leaves out, because they fill no window.
    """

    name: str
    protocol: str
    tokens: int
    perplexity: float
    bits_per_byte: float | None
    source: str
    seconds: float
    dropped: int = 0


@dataclass(frozen=True)
class Sample:
    """A text that a model generated.

    Args:
        prompt: text that the model was given.
        text: text that the model generated after the prompt.
        distinct: fraction of distinct n-grams among its n-grams of tokens, for n from 1, each in [0, 1].
        repetition: fraction of its tokens that lie in a 4-gram of tokens that occurred before, in [0, 1].
    """

    prompt: str
    text: str
    distinct: tuple[float, ...]
    repetition: float


@dataclass(frozen=True)
class HarnessTask:
    """Results of lm-evaluation-harness on a task or group that was asked for.

    Args:
        options: how the task was run: folder of local records, number of items, number of solved examples.
        metrics: every number that the harness reports, of the task itself and of its subtasks, by name.
    """

    options: dict[str, Any]
    metrics: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation(Record):
    """Contents of ``evaluation.json``.

    Args:
        model: folder or hub name of the model.
        identity: text that identifies the model's weights.
        parameters: number of parameters, adapters included.
        tensor_bytes: bytes of the model's tensors.
        average_bits: bits per weight of the decoder linears, scales included; None where nothing was compressed.
        peak_of: meaning of the memory peak on the device, in words.
        peak_inference: peak memory use, in bytes; None where it is unknown.
        tasks: scores of tasks by name, in the order in which they were asked for.
        texts: scores of texts.
        samples: texts that the model generated.
        harness: results of lm-evaluation-harness, by the name under which each task was asked for.
    """

    remedy = "Delete the file and repeat the command: it measures again."

    model: str
    identity: str
    parameters: int
    tensor_bytes: int
    average_bits: float | None
    peak_of: str
    peak_inference: int | None
    tasks: dict[str, TaskScore]
    texts: tuple[TextScore, ...]
    samples: tuple[Sample, ...]
    harness: dict[str, HarnessTask] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A model's answer to one question; a line of ``items/TASK.jsonl``.

    Args:
        item: name of the question, which does not depend on what else was measured: its index in the source file.
        gold: index of the correct option, from 0.
        log_likelihoods: log-likelihood of each option, in nats.
        lengths: number of characters of each option.

    Raises:
        UserError: no log-likelihood and length for each option, no option with the index ``gold``, or an empty option.
    """

    item: int
    gold: int
    log_likelihoods: tuple[float, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.log_likelihoods) or not 0 <= self.gold < len(self.lengths):
            raise UserError(
                f"Question {self.item} has {len(self.log_likelihoods)} log-likelihoods, {len(self.lengths)} lengths "
                f"and the right option at {self.gold}; each option has one of both, and the right one is among them."
            )
        if min(self.lengths) < 1:
            raise UserError(f"Question {self.item} has an option of {min(self.lengths)} characters; it must have some.")

    @property
    def outcome(self) -> dict[str, bool]:
        """Whether the answer is correct by each measure."""
        scores: dict[str, Any] = {
            "acc": self.log_likelihoods,
            "acc_norm": [score / length for score, length in zip(self.log_likelihoods, self.lengths, strict=True)],
        }
        return {name: max(range(len(values)), key=values.__getitem__) == self.gold for name, values in scores.items()}


ITEMS = "items"
"""Folder with the measurements of every question, inside the folder of an evaluation."""


def accuracies(items: Sequence[Item]) -> dict[str, float]:
    """Fraction of correct answers by each measure; nan where the likelihoods of a question are meaningless.

    They are if one of them is nan or all options are impossible; then no answer of the model can be trusted.
    """
    if any(says_nothing(item.log_likelihoods) for item in items):
        return {"acc": math.nan, "acc_norm": math.nan}
    outcomes = [item.outcome for item in items]
    return {name: sum(outcome[name] for outcome in outcomes) / len(items) for name in ("acc", "acc_norm")}


def says_nothing(log_likelihoods: Sequence[float]) -> bool:
    return any(map(math.isnan, log_likelihoods)) or max(log_likelihoods) == -math.inf


def items_file(folder: Path, task: str) -> Path:
    """The file with the measurements of a task's questions, in the folder of an evaluation."""
    return folder / ITEMS / f"{task}.jsonl"


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Writes one question per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{_line(item)}\n" for item in items))


def _line(item: Item) -> str:
    scores = [score if math.isfinite(score) else str(score) for score in item.log_likelihoods]
    return json.dumps({"item": item.item, "gold": item.gold, "log_likelihoods": scores, "lengths": item.lengths})
