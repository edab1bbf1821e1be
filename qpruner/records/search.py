"""The results of a search: as data, as a report, and in TensorBoard."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean, stdev
from typing import Any

from qpruner.errors import UserError, brief
from qpruner.files import write_text
from qpruner.records.folder import RunFolder
from qpruner.records.pictures import save_figure
from qpruner.records.pictures_of_search import front_figure, trials_figure
from qpruner.records.pictures_of_tasks import Panel, Point, front_of, fronts_figure
from qpruner.records.statistics import accuracies, mean_accuracy
from qpruner.records.tables import markdown_table, percent
from qpruner.schema import Record, conform


@dataclass(frozen=True)
class Tried:
    """A plan and its results on the validation split.

    Args:
        name: name of the plan for readers: ``trial 3``, ``uniform``, ``mutual information``.
        choices: for each item, the index of its bits among the choices.
        num_bytes: bytes of all tensors, adapters included.
        average_bits: bits per weight of the decoder linears, scales included.
        losses: loss of each seed, in nats per token.
        scores: everything that the trial of the first seed measured.
        accuracies: weighted accuracy of each seed, where the search considers tasks.
        value: objective that the search minimizes, from the means over seeds; None if that is the loss.
        units: how many units of each part of layers stay, where widths are searched.
        ranks: rank of the adapters of each layer that has any, where ranks are searched.

    Raises:
        UserError: no losses, or a score ``kl`` or an accuracy that is not a number.
    """

    name: str
    choices: tuple[int, ...]
    num_bytes: int
    average_bits: float
    losses: tuple[float, ...]
    scores: dict[str, Any]
    accuracies: tuple[float, ...] = ()
    value: float | None = None
    units: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.losses:
            raise UserError(f"{self.name!r} has no loss.")
        for name, score in self.scores.items():
            if name.endswith(("kl", "accuracy", "error", "examples")) and (name != "kl" or score is not None):
                conform(score, float, f"The score {name} of {self.name!r}")
        for name, kind in (("multiply_adds", int), ("seconds_per_token", dict[str, float])):
            if name in self.scores:
                conform(self.scores[name], kind, f"The score {name} of {self.name!r}")

    @property
    def loss(self) -> float:
        return mean(self.losses)

    @property
    def accuracy(self) -> float | None:
        """Weighted accuracy, mean over the seeds; None where the search does not consider tasks."""
        return mean(self.accuracies) if self.accuracies else None

    @property
    def minimized(self) -> float:
        """The objective that the search minimizes."""
        return self.loss if self.value is None else self.value

    @property
    def multiply_adds(self) -> int | None:
        """Multiply-adds of the decoder linears per token; None where they were not recorded."""
        number: int | None = self.scores.get("multiply_adds")
        return number

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per token in the decoder linears, as measured on a device, by how many tokens pass at once."""
        seconds: dict[str, float] = self.scores.get("seconds_per_token", {})
        return seconds

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single seed."""
        return stdev(self.losses) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Proposer:
    """The optimizer that proposed a range of trials.

    Args:
        optimizer: name of the optimizer.
        first: number of the first trial that it proposed, from 1.
        last: number of the last trial that it proposed.
    """

    optimizer: str
    first: int
    last: int


@dataclass(frozen=True)
class Comparison:
    """How the best plans of a search were compared in the end.

    Args:
        finalists: number of plans that were to be tried again with other seeds.
        seeds: number of seeds that each was to be tried with.
        steps: number of optimizer steps of their fits.
    """

    finalists: int
    seeds: int
    steps: int

    def __str__(self) -> str:
        return f"{self.finalists} finalist(s) with {self.seeds} seed(s) of {self.steps} steps each"


@dataclass(frozen=True)
class SearchResults(Record):
    """Contents of ``search.json``.

    Args:
        protocol: how text was laid out and what was scored.
        prior: method whose sensitivities the search started from.
        budget: budget of the plans, in readable form.
        items: items that got bits.
        bits: bits that an item can have, in the order of its choices.
        trials: trials that succeeded, in order.
        failed: numbers of the trials that failed, each with the reason.
        variants: finalists and plans that were not searched for, each with all seeds, best first; those that failed for
            some seeds last.
        front: names of the trials of the front, see `pareto_front`.
        proposers: optimizers that proposed the trials, in order.
        parts: KV groups or FFN channels of layers, where widths are searched.
        units: how many units each part has before any are removed.
        ranked: numbers of the layers whose adapters have ranks of their own, where ranks are searched.
        comparison: how the variants were compared; None in files that do not say so.

    Raises:
        UserError: no variants, no proposers, or a plan that does not have one of the bits for each item, at least one
            unit of each part and a rank for each ranked layer.
    """

    remedy = "Restore the file, or delete it and continue the search: it is made anew."

    protocol: str
    prior: str
    budget: str
    items: tuple[str, ...]
    bits: tuple[int, ...]
    trials: tuple[Tried, ...]
    failed: dict[int, str]
    variants: tuple[Tried, ...]
    front: tuple[str, ...]
    proposers: tuple[Proposer, ...]
    parts: tuple[str, ...] = ()
    units: tuple[int, ...] = ()
    ranked: tuple[int, ...] = ()
    comparison: Comparison | None = None

    def __post_init__(self) -> None:
        if not self.variants or not self.proposers:
            raise UserError("A search ends with at least one variant, and one optimizer that proposed its trials.")
        for plan in (*self.trials, *self.variants):
            if len(plan.choices) != len(self.items) or not all(0 <= choice < len(self.bits) for choice in plan.choices):
                raise UserError(
                    f"{plan.name!r} has the choices {brief(plan.choices)}; it must have one for each of "
                    f"{len(self.items)} items, from 0 to {len(self.bits) - 1}."
                )
            counts = list(zip(plan.units, self.units, strict=False))
            if len(plan.units) != len(self.units) or not all(1 <= kept <= whole for kept, whole in counts):
                raise UserError(
                    f"{plan.name!r} keeps {brief(plan.units)} units; it must keep at least one of each part, and at "
                    f"most all: {brief(self.units)}."
                )
            if len(plan.ranks) != len(self.ranked) or min(plan.ranks, default=1) < 1:
                raise UserError(
                    f"{plan.name!r} has adapters of the ranks {brief(plan.ranks)}; it must have one of at least 1 for "
                    f"each of {len(self.ranked)} layers."
                )
        if len(self.parts) != len(self.units):
            raise UserError(f"There are {len(self.parts)} parts of layers, and numbers of units of {len(self.units)}.")

    @property
    def winner(self) -> Tried:
        return self.variants[0]

    @property
    def trades_time(self) -> bool:
        """Whether trials differ in multiply-adds, as they do where widths are searched."""
        return differ_in_time(self.trials)


def differ_in_time(trials: Sequence[Tried]) -> bool:
    """Whether the multiply-adds of all trials are known and not all equal."""
    numbers = {trial.multiply_adds for trial in trials}
    return len(numbers) > 1 and None not in numbers


def pareto_front(trials: Sequence[Tried], tokens: str | None = None) -> list[Tried]:
    """The trials that no other trial beats, fewest bytes first; of equal ones the first.

    One trial beats another if it is at least as good in each of bytes, multiply-adds where trials differ in these, and
    the minimized objective, and better in one of them.

    Args:
        trials: trials that compete.
        tokens: number of tokens that pass at once, to use their measured seconds instead of multiply-adds; None for
            multiply-adds.
    """
    times = [0.0] * len(trials)
    if tokens is not None:
        times = [trial.seconds[tokens] for trial in trials]
    elif differ_in_time(trials):
        times = [float(trial.multiply_adds or 0) for trial in trials]
    costs = [(trial.num_bytes, trial.minimized, time) for trial, time in zip(trials, times, strict=True)]
    front: list[int] = []
    for place in sorted(range(len(trials)), key=lambda place: costs[place]):  # after all trials that beat it
        if not any(all(a <= b for a, b in zip(costs[other], costs[place], strict=True)) for other in front):
            front.append(place)
    return [trials[place] for place in front]


def task_panels(results: SearchResults) -> dict[str, Panel]:
    """Trials and plans that were not searched for, by accuracy on each task; with the mean where there are several."""
    unsearched = [variant for variant in results.variants if not variant.name.startswith("trial")]
    tasks = dict.fromkeys(chain.from_iterable(accuracies(trial.scores) for trial in results.trials))
    panels = {task: Panel(_points(results.trials, task), _points(unsearched, task)) for task in tasks}
    if len(panels) > 1 and (means := _points(results.trials, None)):
        panels["mean"] = Panel(means, _points(unsearched, None))
    return panels


def _points(plans: Sequence[Tried], task: str | None) -> list[Point]:
    """The plans whose accuracy on a task is known; the mean over all tasks for None."""
    known = [
        (plan, mean_accuracy(plan.scores) if task is None else accuracies(plan.scores).get(task)) for plan in plans
    ]
    return [Point(plan.name, plan.num_bytes, accuracy) for plan, accuracy in known if accuracy is not None]


def fronts_table(panels: dict[str, Panel]) -> str:
    """The trials of each task's front, fewest bytes first."""
    rows = [
        [task, point.name, f"{point.num_bytes:,}", percent(point.accuracy.value, point.accuracy.error)]
        for task, panel in panels.items()
        for point in front_of(panel.points)
    ]
    return markdown_table(["task", "plan", "bytes", "accuracy"], rows)


def ranked(variants: Sequence[Tried]) -> list[Tried]:
    """Best first; a plan whose trials failed for some seeds does not win by the remaining ones."""
    return sorted(variants, key=lambda variant: (-len(variant.losses), variant.minimized))


def variants_table(results: SearchResults) -> str:
    """Finalists and other plans side by side."""
    looks_at_tasks = any(variant.accuracies for variant in results.variants)
    rows = [
        [
            variant.name,
            f"{variant.num_bytes:,}",
            f"{variant.average_bits:.2f}",
            *([percent(variant.accuracy)] if looks_at_tasks else []),
            f"{variant.loss:.4f}" + ("" if variant.spread is None else f" ± {variant.spread:.4f}"),
            _number(variant.scores.get("kl")),
            "".join(str(results.bits[choice]) + " " for choice in variant.choices).strip(),
            *([_count(variant.multiply_adds), *_kept(results, variant)] if results.parts else []),
            *([" ".join(map(str, variant.ranks))] if results.ranked else []),
        ]
        for variant in results.variants
    ]
    accuracy = ["validation accuracy"] if looks_at_tasks else []
    structure = ["multiply-adds", "KV groups", "FFN channels"] if results.parts else []
    ranks = ["ranks of adapters"] if results.ranked else []
    columns = ["plan", "bytes", "average bits", *accuracy, "validation loss", "KL to dense", "bits", *structure, *ranks]
    return markdown_table(columns, rows)


def trials_table(results: SearchResults) -> str:
    """All trials in order, with the quantities that the front weighs."""
    passes = passes_of(results)
    rows = [
        [
            trial.name,
            f"{trial.num_bytes:,}",
            _count(trial.multiply_adds),
            *(f"{1e6 * trial.seconds[tokens]:.1f}" for tokens in passes),
            *([percent(trial.accuracy)] if trial.accuracies else []),
            f"{trial.loss:.4f}",
            "yes" if trial.name in results.front else "",
        ]
        for trial in results.trials
    ]
    accuracy = ["validation accuracy"] if any(trial.accuracies for trial in results.trials) else []
    seconds = [f"µs a token, {tokens} at once" for tokens in passes]
    return markdown_table(["trial", "bytes", "multiply-adds", *seconds, *accuracy, "validation loss", "front"], rows)


def passes_of(results: SearchResults) -> list[str]:
    """Numbers of tokens passing at once for which the seconds of all trials are known."""
    return [
        tokens
        for tokens in (results.trials[0].seconds if results.trials else {})
        if all(tokens in trial.seconds for trial in results.trials)
    ]


def _of_time(results: SearchResults) -> list[str]:
    """Lines of the report on the time that trials take: the table, and the fronts with measured seconds."""
    lines = [trials_table(results), ""]
    for tokens in passes_of(results):
        names = ", ".join(trial.name for trial in pareto_front(results.trials, tokens))
        lines += [f"The front with the measured seconds of {tokens} token(s) at once in their place: {names}.", ""]
    if len(lines) > 2:
        lines += ["Seconds are those of the decoder linears, without adapters, on the device of the search.", ""]
    return lines


def proposed_by(results: SearchResults) -> str:
    """A sentence that says which optimizers proposed the trials."""
    first, *others = results.proposers
    if not others:
        return f"Trials were proposed by `{first.optimizer}`."
    further = "".join(f", {proposer.first} to {proposer.last} by `{proposer.optimizer}`" for proposer in others)
    return f"Trials {first.first} to {first.last} were proposed by `{first.optimizer}`{further}."


def write_search_report(folder: RunFolder, results: SearchResults) -> None:
    """Writes ``report.md`` and its pictures."""
    save_figure(trials_figure(results), folder.trials_picture)
    save_figure(front_figure(results), folder.pareto_picture)
    seeds = len(results.winner.losses)
    plans = len({(trial.choices, trial.units, trial.ranks) for trial in results.trials})
    weighed = "loss, bytes and multiply-adds for a token at once" if results.trades_time else "both loss and bytes"
    compared = " Plans are compared by accuracy in steps of its standard error, and within a step by loss."
    lines = [
        f"# Search {folder.path.name}",
        "",
        f"{plans} {'plan was' if plans == 1 else 'plans were'} tried in {len(results.trials)} trials under a budget of "
        f"{results.budget}, with {results.prior.replace('_', ' ')} as the prior. {proposed_by(results)} The best ones, "
        f"and those that nobody searched for, with {seeds} seed(s) each (mean ± standard deviation):",
        "",
        variants_table(results),
        "",
        f"Validation loss in nats per token: {results.protocol}. The test split was not looked at."
        f"{compared if results.winner.accuracies else ''} The first line is "
        f"`{folder.plan.name}`; recover it at full length with `qpruner fit --plan {folder.plan}`.",
        "",
        f"![Loss over bytes]({folder.pareto_picture.name})",
        "",
        f"Plans that no other beats in {weighed}: {', '.join(results.front)}; in `{folder.plans.name}/`.",
        "",
        *(_of_time(results) if results.trades_time else []),
        f"![Bits of each trial]({folder.trials_picture.name})",
    ]
    if panels := task_panels(results):
        save_figure(fronts_figure(panels), folder.tasks_picture)
        lines += [
            "",
            f"![Accuracy on each task over bytes]({folder.tasks_picture.name})",
            "",
            "Trials that no other beats in both bytes and accuracy on a task (± standard error):",
            "",
            fronts_table(panels),
        ]
    if results.failed:
        lines += ["", "Trials that failed:", "", *(f"- {number}: {why}" for number, why in results.failed.items())]
    write_text(folder.report, "\n".join(lines) + "\n")


def show_search(logger: Any, results: SearchResults) -> None:
    """Shows pictures and the table of trials in TensorBoard.

    Args:
        logger: a ``TensorBoardLogger``.
        results: results of the search.
    """
    board = logger.experiment
    board.add_figure("search/allocations", trials_figure(results))
    board.add_figure("search/front", front_figure(results))
    if panels := task_panels(results):
        board.add_figure("search/tasks", fronts_figure(panels))
    board.add_text("search/variants", variants_table(results))
    for trial in results.trials:
        chosen = {item: results.bits[choice] for item, choice in zip(results.items, trial.choices, strict=True)}
        chosen |= {f"layer {layer} rank": rank for layer, rank in zip(results.ranked, trial.ranks, strict=True)}
        measured = {"search/trial_loss": trial.loss, "search/trial_bytes": trial.num_bytes}
        if results.trades_time:
            measured["search/trial_multiply_adds"] = trial.multiply_adds or 0
        board.add_hparams(chosen, measured, run_name=trial.name)
    board.flush()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{float(value):.4f}"  # nan is text in JSON


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _kept(results: SearchResults, variant: Tried) -> list[str]:
    """The numbers of KV groups and of FFN channels that stay, in the layers where they are searched."""
    counts = list(zip(results.parts, variant.units, strict=True))
    return [" ".join(str(kept) for part, kept in counts if part.endswith(kind)) for kind in ("groups", "channels")]
