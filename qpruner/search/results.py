"""Turns the records of trials into results that a person reads."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean

from qpruner.files import write_json
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunFolder
from qpruner.records.search import Proposer, Tried
from qpruner.search.aim import Aim
from qpruner.search.ledger import Key, Ledger, TrialRecord


def tried(name: str, records: Sequence[TrialRecord], aim: Aim) -> Tried:
    """A plan from its successful trials, one per seed; everything but losses and accuracies is from the first.

    Args:
        name: name of the plan.
        records: trials of the plan, at least one.
        aim: objective that the search minimizes.
    """
    scores = [record.scores for record in records if record.scores is not None]
    losses = tuple(float(score["loss"]) for score in scores)
    accuracies = tuple(accuracy for score in scores if (accuracy := aim.accuracy(score)) is not None)
    return Tried(
        name=name,
        choices=tuple(records[0].key["choices"]),
        units=tuple(records[0].key.get("units", ())),
        ranks=tuple(records[0].key.get("ranks", ())),
        num_bytes=scores[0]["bytes"],
        average_bits=scores[0]["average_bits"],
        losses=losses,
        scores=scores[0],
        accuracies=accuracies,
        value=aim.value(mean(losses), mean(accuracies) if accuracies else None),
    )


def timed(plans: Sequence[Tried], speeds: Sequence[dict[str, float]]) -> list[Tried]:
    """Plans with the seconds per token of each."""
    return [
        replace(plan, scores={**plan.scores, "seconds_per_token": seconds})
        for plan, seconds in zip(plans, speeds, strict=True)
    ]


def named(key: Key) -> tuple[tuple[int, ...], ...]:
    """What distinguishes the plan of a key: its choices, and its units and ranks where these are searched."""
    return tuple(key["choices"]), tuple(key.get("units", ())), tuple(key.get("ranks", ()))


def proposers(ledger: Ledger) -> list[Proposer]:
    """Which optimizer proposed which trials; without optimizers that were replaced before they proposed any."""
    ends = [*(record.first for record in ledger.optimizers[1:]), len(ledger.records)]
    return [
        Proposer(record.name, record.first + 1, end)
        for record, end in zip(ledger.optimizers, ends, strict=True)
        if end > record.first
    ]


def write_front(folder: RunFolder, front: Sequence[Tried], plan_of: Callable[[Tried], CompressionPlan]) -> None:
    """Writes the plan of each point of a front, and a list of the points.

    Args:
        folder: folder of the search.
        front: points that no other point beats in everything that is traded off.
        plan_of: returns the plan of a point.
    """
    folder.plans.mkdir(exist_ok=True)
    entries = []
    for point in front:
        path = folder.plans / f"{point.name.replace(' ', '-')}.json"
        plan_of(point).write(path)
        entries.append(
            {"name": point.name, "plan": f"{folder.plans.name}/{path.name}",
             "bytes": point.num_bytes, "multiply_adds": point.multiply_adds, "average_bits": point.average_bits,
             "loss": point.loss, "accuracy": point.accuracy}
        )  # fmt: skip
    write_json(folder.pareto, entries)
