"""Runs any task of lm-evaluation-harness on a model in memory, with records from the hub or from local files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from qpruner.datamodules.documents import Skipped, read_file
from qpruner.datamodules.layout import Layout, read_layout
from qpruner.datamodules.questions import TASKS, Record
from qpruner.errors import UserError, cut, listed, nearest
from qpruner.files import hash_file
from qpruner.modes import evaluating
from qpruner.records.evaluation import Item, TaskScore, accuracies

INSTALL = "pip install 'qpruner[eval]'"


@dataclass(frozen=True)
class HarnessScore:
    """Results of a model on a task of the harness, or on a group of tasks.

    Args:
        metrics: every metric that the harness reports, by its name there, without the filter suffix ``none``.
        items: the model's answer to each question; empty for groups and for tasks that are not multiple choice.
        score: accuracies of the items; None where there are none.
    """

    metrics: dict[str, float]
    items: tuple[Item, ...]
    score: TaskScore | None


@dataclass(frozen=True)
class Harness:
    """The harness, opened for some tasks, all of which exist; opening it needs no model.

    Args:
        manager: task manager of the harness.
        local: local records by the name of their task; empty where records come from the hub.
    """

    manager: Any
    local: "dict[str, _Local]"

    @classmethod
    def open(cls, tasks: Sequence[str], folder: str | Path | None = None) -> Self:
        """Opens the harness, and reads local records.

        Args:
            tasks: tasks, groups or tags of the harness, such as ``mmlu`` or ``gsm8k``.
            folder: folder with local records, ``folder/TASK/test.jsonl`` or ``validation.jsonl``, in the columns that
                the task has on the hub or in a variant that `qpruner.datamodules.questions` reads; None to use the hub.

        Raises:
            UserError: the harness is not installed, there is no such task, or its local records are invalid.
        """
        _, _, manager = _library()
        for name in tasks:
            if name not in manager.all_tasks:
                close = nearest(name, manager.all_tasks)
                raise UserError(f"lm-evaluation-harness has no task {name!r}.{close} `lm_eval ls tasks` lists them.")
            if folder is not None and name not in manager.all_subtasks:
                raise UserError(
                    f"{name!r} is a group of tasks; name its tasks to score local records, or leave out the folder."
                )
        return cls(manager, {} if folder is None else {name: _local_records(Path(folder), name) for name in tasks})

    def source(self, name: str) -> str | None:
        """The files of a task's local records, each with its SHA-256; None for those of the hub."""
        return self.local[name].source if name in self.local else None

    def run(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        limit: int | None = None,
        batch_size: int = 8,
        num_fewshot: int | None = None,
    ) -> dict[str, HarnessScore]:
        """Scores of a task, or of all tasks in a group or tag, by name.

        The model is in evaluation mode meanwhile, and each of its modules in its original mode afterwards; the
        tokenizer is not changed.

        Args:
            model: causal model of transformers or PEFT on the device that it is to run on, such as the result of
                `load_compressed`.
            tokenizer: tokenizer of the model.
            name: task, group or tag that the harness was opened for.
            limit: maximum number of items of a task, the first ones; None for all.
            batch_size: number of texts in a batch.
            num_fewshot: number of solved examples before each question; None for the task's own number.

        Raises:
            UserError: the records of the task cannot be loaded.
        """
        lm_eval, HFLM, _ = _library(self.manager)
        local = self.local.get(name)
        start = perf_counter()
        with _loading(name):
            loaded = self.manager.load([local.group(name) if local else name])
        groups = [loaded["groups"][name]] if name in loaded["groups"] else []
        with evaluating(model):
            # The harness adds a padding token to the tokenizer, hence the copy, and calls `eval` on the model.
            harnessed = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), backend="causal", batch_size=batch_size)
            results = lm_eval.simple_evaluate(
                harnessed, tasks=groups or list(loaded["tasks"].values()), task_manager=self.manager, limit=limit,
                num_fewshot=num_fewshot, random_seed=None, numpy_random_seed=None, torch_random_seed=None,
            )  # fmt: skip
        seconds = (perf_counter() - start) / sum(len(results["samples"][task]) for task in loaded["tasks"])
        scores: dict[str, HarnessScore] = {}
        for scored, values in results["results"].items():
            task = loaded["tasks"].get(scored)
            items = () if task is None else tuple(_items(task, results["samples"][scored]))
            metrics = _metrics(values)
            score = _score(scored, task, items, metrics, self.local.get(scored), seconds) if items else None
            scores[scored] = HarnessScore(metrics, items, score)
        return scores


def _library(manager: Any = None) -> tuple[Any, Any, Any]:
    """The harness, its class for transformers models and a task manager, which takes seconds to build."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"Tasks of lm-evaluation-harness need the extra `eval` ({cut(error)}). Install it: {INSTALL}"
        ) from error
    return lm_eval, HFLM, manager or TaskManager()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:  # no connection, no such data set, columns of mixed types
        raise UserError(
            f"Cannot load the records of {name!r}: {cut(error)}. "
            f"Check the connection, or give a folder with local records."
        ) from error


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and "," in name  # other entries are no metrics
    }


def _items(task: Any, samples: Sequence[dict[str, Any]]) -> Iterator[Item]:
    """The answer to each multiple-choice question of the task that has a single correct option."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for sample in samples:
        options = task.doc_to_choice(sample["doc"])
        # Where the options are part of the context, the harness swaps target and text.
        gold = (task.doc_to_text if task.multiple_input else task.doc_to_target)(sample["doc"])
        gold = options.index(gold) if isinstance(gold, str) and gold in options else gold
        if isinstance(gold, int):
            # The likelihoods of the options may be followed by those of the options without context.
            likelihoods = tuple(float(response[0]) for response in sample["filtered_resps"][: len(options)])
            yield Item(sample["doc_id"], gold, likelihoods, tuple(max(len(option), 1) for option in options))


def _score(
    name: str,
    task: Any,
    items: Sequence[Item],
    metrics: dict[str, float],
    local: "_Local | None",
    seconds: float,
) -> TaskScore:
    share = accuracies(items)
    if name in TASKS:
        measure: str = TASKS[name].measure
    else:
        measure = "acc_norm" if "acc_norm" in metrics else "acc"
    hub = " ".join(filter(None, (task.config.dataset_path, task.config.dataset_name)))
    return TaskScore(
        items=len(items),
        acc=share["acc"],
        acc_norm=share["acc_norm"],
        measure=measure,
        source=hub if local is None else local.source,
        split=task.config.test_split or task.config.validation_split,
        seconds=seconds * len(items),
        few_shot=int(task.config.num_fewshot or 0),
    )


@dataclass(frozen=True)
class _Local:
    """Local records of a task that replace those of the hub.

    Args:
        records: records of each split, in the columns of the hub.
        scored: name of the split that is scored.
        examples: name of the split that few-shot examples are taken from.
        source: names of the scored files, each with its SHA-256.
        options: further overrides of the task's own configuration.
    """

    records: dict[str, list[dict[str, Any]]]
    scored: str
    examples: str
    source: str
    options: dict[str, Any]

    def group(self, name: str) -> dict[str, Any]:
        """A group with this task alone: in a group, the harness allows overrides of a task's configuration."""
        import datasets

        data = {split: datasets.Dataset.from_list(records) for split, records in self.records.items()}
        # The harness prefers the test split to the validation split for scoring. Where it takes examples from the
        # scored split, it leaves out the question itself.
        splits = {"training_split": None, "validation_split": None, "test_split": self.scored}
        source = {"custom_dataset": lambda **_: data, "dataset_kwargs": None, "fewshot_split": self.examples}
        return {"group": "local", "task": [{"task": name, **splits, **source, **self.options}]}


def _local_records(folder: Path, name: str) -> _Local:
    if not (folder / name).is_dir():
        there = listed(sorted(path.name for path in folder.glob("*/"))) if folder.is_dir() else "no such folder"
        raise UserError(f"There is no folder {str(folder / name)!r} with records of the task {name!r} ({there}).")
    layout = read_layout(folder / name)
    scored = None if layout is None else layout.split("test") or layout.split("validation")
    if layout is None or scored is None:
        raise UserError(
            f"{str(folder / name)!r} has no split to score. Name a file for it: test.jsonl or validation.jsonl."
        )
    examples = layout.split("train") or layout.split("validation") or scored
    records = {split: _read(layout, split, name) for split in {scored, examples}}
    options: dict[str, Any] = {}
    if name == "hellaswag" and "ctx_a" not in records[scored][0]:
        options["process_docs"] = None  # these records are cleaned already
    source = "; ".join(f"{file.name}, SHA-256 {hash_file(file)}" for file in layout.files(scored))
    return _Local(records, scored, examples, source, options)


def _read(layout: Layout, split: str, name: str) -> list[dict[str, Any]]:
    """The records of a split in the columns of the hub, each one validated where qpruner knows the task."""
    skipped = Skipped()
    records = [placed for file in layout.files(split) for placed in read_file(file, skipped)]
    if skipped.counts or not records:
        raise UserError(f"{str(layout.folder)!r}, split {split!r}: {skipped or 'no records'}. Restore the file.")
    if name in TASKS:
        for place, record in records:
            try:
                TASKS[name].question(record)
            except UserError as error:
                raise UserError(f"{layout.folder / place}: {error}") from error
    as_on_hub = HUB_COLUMNS.get(name, dict)
    return [as_on_hub(record) for _, record in records]


def _boolq_as_on_hub(record: Record) -> dict[str, Any]:
    return {"label": int(record["answer"]), **record} if "answer" in record else dict(record)


def _hellaswag_as_on_hub(record: Record) -> dict[str, Any]:
    """The record with the columns that the harness derives, where it is cleaned already."""
    if "ctx_a" in record:
        return dict(record)
    return {"query": f"{record['activity_label']}: {record['ctx']}", "choices": record["endings"], **record}


HUB_COLUMNS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "boolq": _boolq_as_on_hub,
    "hellaswag": _hellaswag_as_on_hub,
}
"""Functions that convert the other accepted variants of a record to the columns of the hub, by task."""
