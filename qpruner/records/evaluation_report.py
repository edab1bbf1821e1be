"""Tables of an evaluation: its tasks with their errors, its texts with their protocols, and the generated texts."""

import re
from collections.abc import Sequence
from pathlib import Path

from qpruner.files import write_text
from qpruner.records.evaluation import Evaluation, Sample
from qpruner.records.statistics import Estimate, mean_over_tasks, standard_error
from qpruner.records.tables import markdown_table, mebibytes, number, percent

REPORT = "report.md"
LONGEST_TEXT = 600
"""Largest number of characters of a text that a report shows."""


def write_evaluation_report(folder: Path, evaluation: Evaluation) -> None:
    """Writes ``report.md`` into the folder of an evaluation."""
    lines = [
        f"# Evaluation of {evaluation.model}",
        "",
        f"{evaluation.parameters:,} parameters, adapters included; {evaluation.tensor_bytes:,} bytes of tensors; "
        f"average bits of the decoder linears, scales included: {number(evaluation.average_bits, '.2f')}; peak memory "
        f"in evaluation ({evaluation.peak_of}): {mebibytes(evaluation.peak_inference)}. Identity of the weights: "
        f"`{evaluation.identity}`.",
    ]
    if table := evaluation_table(evaluation):
        lines += ["", table, "", *sources(evaluation)]
    if evaluation.samples:
        lines += ["", samples_section(evaluation.samples)]
    write_text(folder / REPORT, "\n".join(lines) + "\n")


def evaluation_table(evaluation: Evaluation) -> str:
    """The tasks and the texts of an evaluation as Markdown tables, which read well as plain text, too.

    Accuracies are in percent with their standard error. Each task is reported by one of its two accuracies, and the
    mean over tasks is that of the reported ones.
    """
    tables = (_tasks_table(evaluation), _harness_table(evaluation), _texts_table(evaluation))
    return "\n\n".join(filter(None, tables))


def samples_section(samples: Sequence[Sample]) -> str:
    """The texts that a model generated, as a section of a report: a table of numbers, and the start of each text."""
    numbers = range(1, max(len(sample.distinct) for sample in samples) + 1)
    header = ["text", *(f"distinct-{n}" for n in numbers), "repetition"]
    rows = [
        [str(place), *(number(share, ".2f") for share in sample.distinct), number(sample.repetition, ".1%")]
        for place, sample in enumerate(samples, 1)
    ]
    lines = [
        "## What the model writes",
        "",
        "Always the likeliest token. distinct-n: share of different ones among the n-grams of tokens. Repetition: "
        "share of tokens that lie in a 4-gram that came before.",
        "",
        markdown_table(header, rows),
    ]
    for place, sample in enumerate(samples, 1):
        lines += [
            "",
            f"Text {place}, behind its prompt and ‖:",
            "",
            _fenced(f"{sample.prompt} ‖{_beginning(sample.text)}"),
        ]
    return "\n".join(lines)


def sources(evaluation: Evaluation) -> list[str]:
    """Where tasks and texts come from, as lines of a list without repetitions."""
    named = [(name, score.source) for name, score in evaluation.tasks.items()]
    named += [(score.name, score.source) for score in evaluation.texts]
    return [f"- {name}: {source}" for name, source in dict.fromkeys(named)]


def _tasks_table(evaluation: Evaluation) -> str:
    if not evaluation.tasks:
        return ""
    header = ["task", "split", "items", "acc, %", "acc_norm, %", "reported by", "accuracy, %", "seconds"]
    rows = [
        [
            name,
            score.split,
            f"{score.items:,}",
            _with_error(score.acc, score.items),
            _with_error(score.acc_norm, score.items),
            score.measure,
            _with_error(score.accuracy, score.items),
            f"{score.seconds:.1f}",
        ]
        for name, score in evaluation.tasks.items()
    ]
    if len(rows) > 1:
        scores = list(evaluation.tasks.values())
        items = sum(score.items for score in scores)
        seconds = sum(score.seconds for score in scores)
        mean = mean_over_tasks(
            [Estimate(score.accuracy, standard_error(score.accuracy, score.items)) for score in scores]
        )
        accuracy = percent(mean.value, mean.error, "")
        rows.append([f"mean of {len(rows)}", "", f"{items:,}", "", "", "", accuracy, f"{seconds:.1f}"])
    return markdown_table(header, rows)


def _harness_table(evaluation: Evaluation) -> str:
    """The harness's results on groups, and on tasks other than questions with options; the rest is in another table."""
    rows = [
        [task, metric, number(value, ".4f")]
        for asked in evaluation.harness.values()
        for task, metrics in asked.metrics.items()
        if task not in evaluation.tasks
        for metric, value in metrics.items()
    ]
    return markdown_table(["task or group of the harness", "metric", "value"], rows) if rows else ""


def _texts_table(evaluation: Evaluation) -> str:
    if not evaluation.texts:
        return ""
    header = ["text", "protocol", "tokens scored", "dropped", "perplexity", "bits per byte", "seconds"]
    rows = [
        [
            score.name,
            score.protocol,
            f"{score.tokens:,}",
            f"{score.dropped:,}",
            number(score.perplexity, ",.3f"),
            number(score.bits_per_byte, ".4f"),
            f"{score.seconds:.1f}",
        ]
        for score in evaluation.texts
    ]
    return markdown_table(header, rows)


def _with_error(accuracy: float, items: int) -> str:
    return percent(accuracy, standard_error(accuracy, items), "")


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."


def _fenced(text: str) -> str:
    """A text verbatim, in a fence that nothing in the text closes."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
