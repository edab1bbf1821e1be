"""The table of a run's stages, as text for the terminal and as a report with the loss curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.allocation.decision import Allocation
from qpruner.errors import UserError
from qpruner.files import write_text
from qpruner.plan import CompressionPlan
from qpruner.records.allocation_report import allocation_figure, allocation_section
from qpruner.records.folder import RESTORE, RunFolder
from qpruner.records.pictures import loss_figure, plan_figure, ratio_figure, save_figure
from qpruner.records.pictures_of_tasks import OnTasks, bars_figure
from qpruner.records.statistics import Estimate, accuracies, mean_accuracy
from qpruner.records.tables import markdown_table, mebibytes, number, percent
from qpruner.schema import LARGEST, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("train/loss", "val/loss", "pruning/ratio")
"""Curves that a report draws."""


@dataclass(frozen=True)
class Stage:
    """One row of the table: a state of the model and its results on the test split.

    Args:
        name: state of the model: ``dense``, ``pruned``, ``quantized``, ``recovered``, ...
        parameters: number of parameters of the model, adapters included.
        tensor_bytes: bytes of the model's tensors.
        average_bits: bits per weight of the decoder linears, scales included; None where nothing was compressed.
        results: values of the metrics: ``perplexity``, ``bits_per_byte``, ``accuracy``, ``tokens``, ...; unknown values
            are left out, nan and inf were measured.
        seconds: seconds that reaching the state took, by loading or training; seconds of the evaluation where the state
            is only measured.
        peak_training: peak memory use in training, in bytes; None where nothing was trained or it is unknown.
        peak_inference: peak memory use in evaluation, in bytes.

    Raises:
        UserError: a number of tokens that cannot be a count.
    """

    name: str
    parameters: int
    tensor_bytes: int
    average_bits: float | None
    results: dict[str, float]
    seconds: float
    peak_training: int | None
    peak_inference: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.results.get("tokens", 0) < LARGEST:
            raise UserError(f"The stage {self.name!r} scored {self.results['tokens']} tokens; it must be a count.")


@dataclass(frozen=True)
class Summary(Record):
    """Contents of ``summary.json``.

    Args:
        finished: whether the run is over.
        protocol: how the text was laid out and what was scored.
        peak_of: meaning of the memory peaks on the device, in words.
        stages: rows of the table.
    """

    remedy = RESTORE

    finished: bool
    protocol: str
    peak_of: str
    stages: tuple[Stage, ...]


def table(summary: Summary) -> str:
    """The stages as a Markdown table, aligned so that it also reads well as plain text."""
    header = [
        "stage", "parameters", "bytes", "average bits", "perplexity", "bits per byte", "accuracy", "time",
        "peak training memory", "peak inference memory",
    ]  # fmt: skip
    rows = [
        [
            stage.name,
            f"{stage.parameters:,}",
            f"{stage.tensor_bytes:,}",
            number(stage.average_bits, ".2f"),
            number(stage.results.get("perplexity"), ".3f"),
            number(stage.results.get("bits_per_byte"), ".4f"),
            _accuracy(mean_accuracy(stage.results)),
            f"{stage.seconds:.1f} s",
            mebibytes(stage.peak_training),
            mebibytes(stage.peak_inference),
        ]
        for stage in summary.stages
    ]
    return markdown_table(header, rows)


def tasks_table(summary: Summary) -> str | None:
    """The accuracy of each stage on each task, and their mean; None where no stage has more than one task."""
    tasks = [accuracies(stage.results) for stage in summary.stages]
    if all(len(of_stage) < 2 for of_stage in tasks):
        return None
    names = list(dict.fromkeys(name for of_stage in tasks for name in of_stage))
    rows = [
        [stage.name, *(_accuracy(of_stage.get(name)) for name in names), _accuracy(mean_accuracy(stage.results))]
        for stage, of_stage in zip(summary.stages, tasks, strict=True)
    ]
    return markdown_table(["stage", *names, "mean"], rows)


def protocol_line(summary: Summary, split: str = "test") -> str:
    tokens = {int(stage.results["tokens"]) for stage in summary.stages if "tokens" in stage.results}
    counted = " and ".join(f"{count:,}" for count in sorted(tokens))
    perplexity = f"Perplexity on the {split} split: {summary.protocol}; {counted} tokens scored. " if tokens else ""
    return (
        f"{perplexity}Bytes: all tensors as held here and on disk. "
        f"Average bits: of the decoder linears, scales included. Peak memory: {summary.peak_of}."
    )


def show_summary(summary: Summary, split: str = "test") -> None:
    """Prints the tables of a summary, and how it was measured on a split."""
    tables = "\n\n".join(filter(None, (table(summary), tasks_table(summary))))
    print(f"\n{tables}\n\n{protocol_line(summary, split)}")


def tasks_figure(summary: Summary) -> "Figure | None":
    """Accuracy of each stage on each task; None unless several stages have several tasks."""
    stages = [_on_tasks(stage) for stage in summary.stages if len(accuracies(stage.results)) > 1]
    return bars_figure(stages) if len(stages) > 1 else None


def write_report(folder: RunFolder) -> None:
    """Writes ``report.md`` and its pictures from the contents of the run folder."""
    summary = Summary.read(folder.summary)
    phases = folder.all_phases
    curves, borders = joined([{tag: scalars(phase.tensorboard, tag) for tag in CURVES} for phase in phases])
    losses = {tag: curves[tag] for tag in ("train/loss", "val/loss")}
    lines = [f"# Run {folder.path.name}", "", table(summary)]
    if (tasks := tasks_table(summary)) is not None:
        lines += ["", tasks]
    lines += ["", protocol_line(summary)]
    if (bars := tasks_figure(summary)) is not None:
        save_figure(bars, folder.tasks_picture)
        lines += ["", f"![Accuracy of each stage on each task]({folder.tasks_picture.name})"]
    if any(losses.values()):
        save_figure(loss_figure(losses, borders), folder.loss_picture)
        lines += ["", f"![Loss over the optimizer steps]({folder.loss_picture.name})"]
    if curves["pruning/ratio"]:
        save_figure(ratio_figure(curves["pruning/ratio"], borders), folder.ratio_picture)
        lines += ["", f"![How much was pruned when]({folder.ratio_picture.name})"]
    if earlier := [f"`{phase.model.relative_to(folder.path)}/`" for phase in phases[:-1] if phase.model.exists()]:
        lines += ["", f"What the earlier phases left is in {', '.join(earlier)}."]
    if folder.plan.exists():
        save_figure(plan_figure(CompressionPlan.read(folder.plan)), folder.plan_picture)
        lines += [
            "",
            f"The compressed model is in `{folder.model.name}/`; `{folder.plan.name}` says what it keeps of the dense:",
            "",
            f"![What each layer keeps]({folder.plan_picture.name})",
        ]
    elif folder.model.exists():
        lines += ["", f"The dense model with its trained adapters is in `{folder.model.name}/`."]
    if folder.allocation.exists():
        allocation = Allocation.read(folder.allocation)
        save_figure(allocation_figure(allocation), folder.allocation_picture)
        lines += ["", *allocation_section(folder), "", f"![Who got which bits]({folder.allocation_picture.name})"]
    lines += [
        "",
        f"The options of the run are in `{folder.config.name}`, the versions and hashes it was made with in "
        f"`{folder.manifest.name}`, its log in `{folder.log.name}`. `tensorboard --logdir {folder.path.parent}` shows "
        f"every curve.",
    ]
    write_text(folder.report, "\n".join(lines) + "\n")


def joined(
    phases: Sequence[dict[str, list[tuple[int, float]]]],
) -> tuple[dict[str, list[tuple[int, float]]], list[int]]:
    """Concatenates the curves of phases; also returns the steps at which one phase ends and the next begins.

    Args:
        phases: curves by tag, as (step, value), each phase from step 0.
    """
    curves: dict[str, list[tuple[int, float]]] = {tag: [] for tag in CURVES}
    borders: list[int] = []
    begin = 0
    for phase in phases:
        for tag, curve in phase.items():
            curves[tag] += [(begin + step, value) for step, value in curve]
        begin = max([begin, *(step + 1 for curve in curves.values() for step, _ in curve)])
        borders.append(begin)
    return curves, borders[:-1]


def scalars(tensorboard: Path, tag: str) -> list[tuple[int, float]]:
    """A logged curve, as (step, value); where a resumed run logged a step again, the later value counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not tensorboard.exists():
        return []
    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return sorted({event.step: event.value for event in events.Scalars(tag)}.items())


def _on_tasks(stage: Stage) -> OnTasks:
    return OnTasks(stage.name, stage.tensor_bytes, accuracies(stage.results), mean_accuracy(stage.results))


def _accuracy(estimate: Estimate | None) -> str:
    return "-" if estimate is None else percent(estimate.value, estimate.error)
