"""Results from the folder of a run or of an evaluation, in the same form for both."""

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from qpruner.errors import UserError
from qpruner.files import reading
from qpruner.records.evaluation import Evaluation, Item
from qpruner.records.folder import RunFolder
from qpruner.records.report import Stage, Summary
from qpruner.records.statistics import Estimate, accuracies, mean_accuracy, standard_error
from qpruner.schema import conform

EVALUATION = "evaluation.json"
ITEMS = "items"


@dataclass(frozen=True)
class MeasuredTask:
    """A model's accuracy on a task, and the questions that it was measured on.

    Args:
        accuracy: accuracy that the task is reported by, in [0, 1].
        error: standard error of the accuracy; nan where it is unknown.
        items: number of questions; None where it is unknown, as may be everything below.
        measure: ``acc`` or ``acc_norm``.
        split: part of the task's questions.
        source: where the questions come from.
        few_shot: number of solved examples before each question.
    """

    accuracy: float
    error: float
    items: int | None = None
    measure: str | None = None
    split: str | None = None
    source: str | None = None
    few_shot: int | None = None

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.accuracy, self.error)


@dataclass(frozen=True)
class MeasuredText:
    """How well a model predicts a text.

    Args:
        name: name of the text, such as ``wikitext2``.
        protocol: how the text was cut into rows and what was scored.
        perplexity: exponential of the mean loss.
        tokens: number of scored tokens; None where it is unknown.
        source: where the text comes from; None where it is unknown.
    """

    name: str
    protocol: str
    perplexity: float
    tokens: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Measured:
    """A model and what was measured of it.

    Args:
        folder: folder that was named.
        measured_in: file with the measurements, and the stage of a run that they belong to.
        finished: whether the run that measured is over.
        parameters: number of parameters, adapters included.
        tensor_bytes: bytes of the model's tensors.
        average_bits: bits per weight of the decoder linears, scales included; None where nothing was compressed.
        tasks: results on tasks by name.
        texts: results on texts.
        peak_of: meaning of the memory peak on the device, in words.
        peak_inference: peak memory use in evaluation, in bytes; None where it is unknown.
        seconds: seconds spent on what ``seconds_of`` names.
        seconds_of: what the seconds were spent on.
    """

    folder: str
    measured_in: str
    finished: bool
    parameters: int
    tensor_bytes: int
    average_bits: float | None
    tasks: dict[str, MeasuredTask]
    texts: tuple[MeasuredText, ...]
    peak_of: str
    peak_inference: int | None
    seconds: float
    seconds_of: str


def read_measured(path: Path) -> Measured:
    """What was measured in a folder: its evaluation or, without one, the last stage of its run.

    Raises:
        UserError: there is no such folder, nothing was measured there, or a file is damaged.
    """
    folder = RunFolder(path)
    evaluation = None if (place := evaluation_in(path)) is None else Evaluation.read(place / EVALUATION)
    if evaluation is not None and (evaluation.tasks or evaluation.texts):
        return _of_evaluation(path, evaluation)
    for file, spent in ((folder.test_summary, "the evaluation"), (folder.summary, "reaching the stage")):
        if file.exists() and (summary := Summary.read(file)).stages:
            return _of_summary(path, summary, file.name, spent)
    if evaluation is not None:
        return _of_evaluation(path, evaluation)
    there = "holds nothing that was measured" if path.is_dir() else "is no folder"
    raise UserError(
        f"{str(path)!r} {there}: it must be the folder of a run with {folder.test_summary.name}, {folder.summary.name} "
        f"or {folder.evaluation.name}/{EVALUATION}, or hold {EVALUATION}. `qpruner evaluate` measures a model or a run."
    )


def evaluation_in(path: Path) -> Path | None:
    """The folder of an evaluation: that of a run, or the folder itself; None where nothing was evaluated."""
    places = (RunFolder(path).evaluation, path)
    return next((place for place in places if (place / EVALUATION).is_file()), None)


def read_items(path: Path, task: str) -> dict[int, Item]:
    """Measurements of every question of a task, by the question's name; empty where they were not kept.

    Args:
        path: folder of a run or of an evaluation.
        task: name of the task.

    Raises:
        UserError: the file is damaged, or names a question twice.
    """
    place = evaluation_in(path)
    if place is None or not (file := place / ITEMS / f"{task}.jsonl").is_file():
        return {}
    items: dict[int, Item] = {}
    with reading(file, Evaluation.remedy):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            item = conform(json.loads(line), Item, f"line {number}")
            if items.setdefault(item.item, item) is not item:
                raise UserError(f"line {number}: question {item.item} stands there twice.")
    return items


def _of_evaluation(path: Path, evaluation: Evaluation) -> Measured:
    tasks = {
        name: MeasuredTask(
            score.accuracy,
            standard_error(score.accuracy, score.items),
            score.items,
            score.measure,
            score.split,
            score.source,
            score.few_shot,
        )  # fmt: skip
        for name, score in evaluation.tasks.items()
    }
    texts = [
        MeasuredText(text.name, text.protocol, text.perplexity, text.tokens, text.source) for text in evaluation.texts
    ]
    seconds = sum(score.seconds for score in evaluation.tasks.values())
    seconds += sum(text.seconds for text in evaluation.texts)
    return Measured(
        folder=str(path),
        measured_in=EVALUATION,
        finished=True,
        parameters=evaluation.parameters,
        tensor_bytes=evaluation.tensor_bytes,
        average_bits=evaluation.average_bits,
        tasks=tasks,
        texts=tuple(texts),
        peak_of=evaluation.peak_of,
        peak_inference=evaluation.peak_inference,
        seconds=seconds,
        seconds_of="the evaluation",
    )


def _of_summary(path: Path, summary: Summary, file: str, seconds_of: str) -> Measured:
    """The results of the last stage; its overall accuracy where the run has no named tasks."""
    stage: Stage = summary.stages[-1]
    results = stage.results
    tasks = {
        name: MeasuredTask(estimate.value, estimate.error, _count(results.get(f"{name}/examples")), split="test")
        for name, estimate in accuracies(results).items()
    }
    if not tasks and (accuracy := mean_accuracy(results)) is not None:
        tasks = {
            "accuracy": MeasuredTask(accuracy.value, accuracy.error, _count(results.get("examples")), split="test")
        }
    texts = []
    if "perplexity" in results:
        texts.append(MeasuredText("test split", summary.protocol, results["perplexity"], _count(results.get("tokens"))))
    return Measured(
        folder=str(path),
        measured_in=f"{file}, stage {stage.name}",
        finished=summary.finished,
        parameters=stage.parameters,
        tensor_bytes=stage.tensor_bytes,
        average_bits=stage.average_bits,
        tasks=tasks,
        texts=tuple(texts),
        peak_of=summary.peak_of,
        peak_inference=stage.peak_inference,
        seconds=stage.seconds,
        seconds_of=seconds_of,
    )


def _count(value: float | None) -> int | None:
    return int(value) if value is not None and isfinite(value) else None
