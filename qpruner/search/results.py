"""From the records of trials to what a person reads."""

from collections.abc import Sequence

from qpruner.runs.search import Tried
from qpruner.search.ledger import TrialRecord


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
