"""Compares models by what was measured of each, and states what cannot be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.files import write_text
from qpruner.records.evaluation import Item, says_nothing
from qpruner.records.measured import Measured, MeasuredText, read_items, read_measured
from qpruner.records.pictures import save_figure
from qpruner.records.pictures_of_tasks import OnTasks, Panel, Point, bars_figure, fronts_figure
from qpruner.records.statistics import Estimate, PairedComparison, compare_counts, compare_paired, mean_over_tasks
from qpruner.records.tables import markdown_table, percent
from qpruner.schema import Record


@dataclass(frozen=True)
class Against:
    """A model compared with the first one, on the questions that both were asked.

    Args:
        name: name of the model.
        tasks: comparison by task.
        together: comparison over the questions of all these tasks; None where there are none.
        left_out: reason why a task that both models have could not be compared by question, by name of the task.
    """

    name: str
    tasks: dict[str, PairedComparison]
    together: PairedComparison | None
    left_out: dict[str, str]


@dataclass(frozen=True)
class Comparison(Record):
    """Contents of ``comparison.json``.

    Args:
        models: what was measured of each model, by its name.
        shared: tasks that all models with tasks have in common; means are over these.
        means: mean over the shared tasks by model, where there are at least two.
        against_first: comparison of every other model with the first.
        notes: differences between the models in how they were measured, a sentence each.
    """

    remedy = "Delete the file and repeat `qpruner compare`."

    models: dict[str, Measured]
    shared: tuple[str, ...]
    means: dict[str, Estimate]
    against_first: tuple[Against, ...]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for model in self.models.values() for task in model.tasks))

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Names of texts with their protocols."""
        return list(dict.fromkeys((text.name, text.protocol) for model in self.models.values() for text in model.texts))


def compare_folders(folders: Sequence[Path], names: Sequence[str] | None = None) -> Comparison:
    """Compares what was measured in folders.

    Args:
        folders: folders of runs or evaluations, at least one.
        names: name of each model; None for the names of the folders, made distinct.

    Raises:
        UserError: the number of names differs from that of folders, a name is given twice, or nothing was measured in
            a folder.
    """
    if names is not None and (len(names) != len(folders) or len(set(names)) != len(names)):
        raise UserError(
            f"There are {len(folders)} folders and the names {', '.join(names) or 'of none'}; --names takes one for "
            f"each folder, and all different."
        )
    named = dict(zip(names or distinct_names(folders), folders, strict=True))
    models = {name: read_measured(folder) for name, folder in named.items()}
    with_tasks = [model for model in models.values() if model.tasks]
    shared = [task for task in (with_tasks[0].tasks if with_tasks else ()) if all(task in m.tasks for m in with_tasks)]
    means = {
        name: mean_over_tasks([model.tasks[task].estimate for task in shared])
        for name, model in models.items()
        if model.tasks and len(shared) > 1
    }
    first, *others = models
    against = [_against(name, models[name], models[first], named[name], named[first]) for name in others]
    return Comparison(models, tuple(shared), means, tuple(against), tuple(_notes(models, shared)))


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, with as much of the path as makes them distinct; a folder that occurs again is numbered."""
    parts = [folder.expanduser().absolute().parts[1:] or (str(folder),) for folder in folders]
    names: list[str] = []
    for number, part in enumerate(parts):
        rivals = [other for other in parts if other != part]
        length = next(n for n in range(1, len(part) + 1) if n == len(part) or all(part[-n:] != r[-n:] for r in rivals))
        before = parts[:number].count(part)
        names.append("/".join(part[-length:]) + (f" ({before + 1})" if before else ""))
    return names


def pair_items(first: dict[int, Item], other: dict[int, Item], measure: str) -> PairedComparison | str:
    """Compares two models on the questions that both answered, or returns the reason why that is not possible."""
    if not first or not other:
        return "what was said of every question was not kept for both"
    both = sorted(first.keys() & other.keys())
    if not both:
        return "they have no question in common"
    if any((first[n].gold, first[n].lengths) != (other[n].gold, other[n].lengths) for n in both):
        return "questions of the same number are different ones"
    if any(says_nothing(items[n].log_likelihoods) for items in (first, other) for n in both):
        return "the likelihoods of a model say nothing"
    return compare_paired([first[n].outcome[measure] for n in both], [other[n].outcome[measure] for n in both])


def _against(name: str, model: Measured, first: Measured, folder: Path, first_folder: Path) -> Against:
    tasks: dict[str, PairedComparison] = {}
    left_out: dict[str, str] = {}
    for task, result in model.tasks.items():
        if task in first.tasks:
            measure = first.tasks[task].measure
            if measure is None or measure != result.measure:
                compared: PairedComparison | str = "what was said of every question was not kept for both"
                if measure is not None and result.measure is not None:
                    compared = f"it is reported by {measure} and by {result.measure}"
            elif first.tasks[task].split != result.split:
                compared = "the splits are different ones"
            elif first.tasks[task].few_shot != result.few_shot:
                compared = "the numbers of solved examples before a question are different ones"
            else:
                compared = pair_items(read_items(first_folder, task), read_items(folder, task), measure)
            if isinstance(compared, str):
                left_out[task] = compared
            else:
                tasks[task] = compared
    pairs = tasks.values()
    together = compare_counts(
        sum(pair.items for pair in pairs),
        sum(pair.only_first for pair in pairs),
        sum(pair.only_second for pair in pairs),
    )
    return Against(name, tasks, together if tasks else None, left_out)


def _notes(models: dict[str, Measured], shared: Sequence[str]) -> list[str]:
    """Differences in how the models were measured."""
    notes = [f"{name} is not finished; measured is its last stage." for name, m in models.items() if not m.finished]
    tasks = dict.fromkeys(task for model in models.values() for task in model.tasks)
    labels = {
        "split": "split", "source": "source", "items": "number of questions", "measure": "measure",
        "few_shot": "number of solved examples before a question",
    }  # fmt: skip
    for task in tasks:
        having = {name: model.tasks[task] for name, model in models.items() if task in model.tasks}
        for entry, label in labels.items():
            notes += _difference(f"{task}: the {label}", {n: getattr(result, entry) for n, result in having.items()})
    by_text: dict[tuple[str, str], dict[str, MeasuredText]] = {}
    for name, model in models.items():
        for text in model.texts:
            by_text.setdefault((text.name, text.protocol), {})[name] = text
    for (text_name, protocol), texts in by_text.items():
        for entry, label in (("source", "source"), ("tokens", "number of scored tokens")):
            notes += _difference(
                f"{text_name} ({protocol}): the {label}", {n: getattr(text, entry) for n, text in texts.items()}
            )
    notes += _difference("The meaning of peak memory", {name: model.peak_of for name, model in models.items()})
    notes += _difference("What the time was spent with", {name: model.seconds_of for name, model in models.items()})
    if len(shared) < len(tasks) and len(shared) > 1:
        notes.append(f"The mean is over the tasks that all models with tasks have: {', '.join(shared)}.")
    return notes


def _difference(what: str, values: dict[str, Any]) -> list[str]:
    """A sentence, if the models do not all have the same value."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    if len(groups) < 2:
        return []
    said = [f"{'unknown' if value is None else value} for {', '.join(names)}" for value, names in groups.items()]
    return [f"{what} differs: {'; '.join(said)}."]


def models_table(comparison: Comparison) -> str:
    """A row for each model."""
    texts, tasks = comparison.texts, comparison.tasks
    header = [
        "model", "parameters", "bytes", "average bits", *(f"perplexity, {name}: {how}" for name, how in texts), *tasks,
        *([f"mean of {len(comparison.shared)}"] if comparison.means else []), "peak memory", "time",
    ]  # fmt: skip
    rows = []
    for name, model in comparison.models.items():
        perplexities = {(text.name, text.protocol): text.perplexity for text in model.texts}
        estimates = [model.tasks[task].estimate if task in model.tasks else None for task in tasks]
        estimates += [comparison.means.get(name)] if comparison.means else []
        rows.append(
            [
                name,
                f"{model.parameters:,}",
                f"{model.tensor_bytes:,}",
                _or_dash(model.average_bits, lambda bits: f"{bits:.2f}"),
                *(_or_dash(perplexities.get(text), lambda value: f"{value:.3f}") for text in texts),
                *("-" if estimate is None else _points(estimate) for estimate in estimates),
                _or_dash(model.peak_inference, lambda peak: f"{peak / 2**20:,.0f} MiB"),
                f"{model.seconds:,.1f} s",
            ]
        )
    return markdown_table(header, rows)


def against_table(against: Against, first: str) -> str:
    """A row for each task, and one for all questions together."""
    pairs = [*against.tasks.items()]
    if against.together is not None and len(pairs) > 1:
        pairs.append(("all together", against.together))
    rows = [
        [
            task,
            f"{pair.items:,}",
            f"{100 * pair.difference:+.1f}" + (f" ± {100 * pair.error:.1f}" if isfinite(pair.error) else ""),
            f"{pair.only_second:,}",
            f"{pair.only_first:,}",
            f"{pair.p_value:.4f}" if pair.p_value >= 1e-4 else "< 0.0001",
        ]
        for task, pair in pairs
    ]
    header = ["task", "questions of both", "difference", f"only {against.name} right", f"only {first} right", "p"]
    return markdown_table(header, rows)


def describe(comparison: Comparison) -> list[str]:
    """The tables and the notes on how to read them, as lines of Markdown."""
    first = next(iter(comparison.models))
    measured = [f"{name} in {m.measured_in} of {m.folder}" for name, m in comparison.models.items()]
    lines = [models_table(comparison), "", f"Measured: {'; '.join(measured)}."]
    lines += ["Bytes: all tensors. Average bits: of the decoder linears, scales included."]
    if comparison.tasks:
        tasks_by_measure: dict[str, dict[str, None]] = {}
        for task, result in (pair for model in comparison.models.values() for pair in model.tasks.items()):
            how = f"by {result.measure}" if result.measure else "as the run reports it"
            counted = f" on {result.items:,} questions" if result.items is not None else ""
            tasks_by_measure.setdefault(f"{how}{counted}", {})[task] = None
        said = (f"{how}: {', '.join(tasks)}" for how, tasks in tasks_by_measure.items())
        lines += [f"Accuracies: percent ± standard error; {'; '.join(said)}."]
    for against in comparison.against_first:
        if against.tasks or against.left_out:
            lines += ["", f"## {against.name} against {first}, on the same questions"]
        if against.tasks:
            lines += ["", against_table(against, first)]
        if against.left_out:
            lines += ["", *(f"{task} was not compared: {why}." for task, why in against.left_out.items())]
    if any(against.tasks for against in comparison.against_first):
        lines += [
            "",
            "Difference: of the accuracies in points ± its paired standard error. p: McNemar's exact test with two "
            "sides, not corrected for the number of comparisons.",
        ]
    if comparison.notes:
        lines += ["", "## Not measured alike", "", *(f"- {note}" for note in comparison.notes)]
    return lines


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes ``comparison.md``, ``comparison.json`` and, where there are tasks, ``tasks.png`` and ``fronts.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Comparison", "", *describe(comparison)]
    if any(model.tasks for model in comparison.models.values()):
        save_figure(bars_figure(_on_tasks(comparison)), folder / "tasks.png")
        save_figure(fronts_figure(_panels(comparison)), folder / "fronts.png")
        lines += [
            "",
            "![Accuracy on each task, ± standard error, and bytes](tasks.png)",
            "",
            "![Accuracy against bytes; models that no other beats in both are joined](fronts.png)",
        ]
    comparison.write(folder / "comparison.json")
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")


def _on_tasks(comparison: Comparison) -> list[OnTasks]:
    return [
        OnTasks(
            name,
            model.tensor_bytes,
            {task: result.estimate for task, result in model.tasks.items()},
            comparison.means.get(name),
        )
        for name, model in comparison.models.items()
    ]


def _panels(comparison: Comparison) -> dict[str, Panel]:
    points: dict[str, list[Point]] = {task: [] for task in comparison.tasks}
    for name, model in comparison.models.items():
        for task, result in model.tasks.items():
            points[task].append(Point(name, model.tensor_bytes, result.estimate))
    if comparison.means:
        points["mean"] = [
            Point(name, comparison.models[name].tensor_bytes, mean) for name, mean in comparison.means.items()
        ]
    return {task: Panel(of_task, of_task) for task, of_task in points.items()}


def _points(estimate: Estimate) -> str:
    return percent(estimate.value, estimate.error, unit="")


def _or_dash(value: Any, said: Callable[[Any], str]) -> str:
    return "-" if value is None else said(value)
