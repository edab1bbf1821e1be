"""From the records of trials to what a person reads."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from qpruner.records.search import Proposer, Tried
from qpruner.search.aim import Aim
from qpruner.search.ledger import Key, Ledger, TrialRecord


def tried(name: str, records: Sequence[TrialRecord], aim: Aim) -> Tried:
    """A plan from the records of its seeds, which succeeded; all but losses and accuracies are of the first.

    Args:
        name: name of the plan.
        records: trials of the plan, at least one.
        aim: what the search minimizes.
    """
    scores = [record.scores for record in records if record.scores is not None]
    losses = tuple(float(one["loss"]) for one in scores)
    accuracies = tuple(accuracy for one in scores if (accuracy := aim.accuracy(one)) is not None)
    return Tried(
        name=name,
        choices=tuple(records[0].key["choices"]),
        units=tuple(records[0].key.get("units", ())),
        num_bytes=scores[0]["bytes"],
        average_bits=scores[0]["average_bits"],
        losses=losses,
        scores=scores[0],
        accuracies=accuracies,
        value=aim.value(mean(losses), mean(accuracies) if accuracies else None),
    )


def timed(plans: Sequence[Tried], speeds: Sequence[dict[str, float]]) -> list[Tried]:
    """Plans with the seconds that a token takes in each."""
    return [
        replace(plan, scores={**plan.scores, "seconds_per_token": seconds})
        for plan, seconds in zip(plans, speeds, strict=True)
    ]


def named(key: Key) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What tells the plan of a key from others: its choices, and its units where widths are searched."""
    return tuple(key["choices"]), tuple(key.get("units", ()))


def proposers(ledger: Ledger) -> list[Proposer]:
    """Who proposed which trials; without optimizers that were followed before they proposed any."""
    ends = [*(record.first for record in ledger.optimizers[1:]), len(ledger.records)]
    return [
        Proposer(record.name, record.first + 1, end)
        for record, end in zip(ledger.optimizers, ends, strict=True)
        if end > record.first
    ]
