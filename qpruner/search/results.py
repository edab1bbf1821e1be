"""From the records of trials to what a person reads."""

from collections.abc import Sequence

from qpruner.records.search import Proposer, Tried
from qpruner.search.ledger import Ledger, TrialRecord


def tried(name: str, records: Sequence[TrialRecord]) -> Tried:
    """A plan from the records of its seeds, which succeeded; all but the losses are of the first."""
    scores = [record.scores for record in records if record.scores is not None]
    return Tried(
        name=name,
        choices=tuple(records[0].key["choices"]),
        num_bytes=scores[0]["bytes"],
        average_bits=scores[0]["average_bits"],
        losses=tuple(float(one["loss"]) for one in scores),
        scores=scores[0],
    )


def proposers(ledger: Ledger) -> list[Proposer]:
    """Who proposed which trials; without optimizers that were followed before they proposed any."""
    ends = [*(record.first for record in ledger.optimizers[1:]), len(ledger.records)]
    return [
        Proposer(record.name, record.first + 1, end)
        for record, end in zip(ledger.optimizers, ends, strict=True)
        if end > record.first
    ]
