"""What came of a small search."""

from dataclasses import replace

from qpruner.records.search import Proposer, SearchResults, Tried


def tried(name: str, num_bytes: int, *losses: float, choices: tuple[int, ...] = (0, 1)) -> Tried:
    return Tried(name, choices, num_bytes, num_bytes / 100, losses, {"loss": losses[0], "kl": 0.25})


TRIALS = (
    tried("trial 1", 500, 2.0),
    tried("trial 2", 400, 2.5),
    tried("trial 4", 450, 2.5),  # more bytes for the same loss
    tried("trial 5", 600, 2.1),  # worse in both than the first
    tried("trial 6", 400, 2.5),  # equal to the second
    tried("trial 7", 400, 2.6),
    tried("trial 8", 700, 1.5),
)
RESULTS = SearchResults(
    protocol="one document a row",
    prior="mutual_information",
    budget="6 bits per weight",
    items=("layer 0", "layer 1"),
    bits=(4, 8),
    trials=TRIALS,
    failed={3: "MemoryError"},
    variants=(
        tried("trial 8", 1700, 1.5, 1.7, choices=(1, 1)),
        Tried("uniform", (0, 0), 1400, 4.5, (2.0,), {"loss": 2.0}),
    ),
    front=("trial 2", "trial 1", "trial 8"),
    proposers=(Proposer("TBPSA", 1, 5), Proposer("bayesian", 6, 8)),
)


def narrowed(plan: Tried, *units: int) -> Tried:
    """The plan with some units of each part, which cost 1,000 multiply-adds each."""
    return replace(plan, units=units, scores={**plan.scores, "multiply_adds": 1000 * sum(units)})


NARROWED = replace(
    RESULTS,
    parts=("layer 0 kv_groups", "layer 0 ffn_channels", "layer 1 ffn_channels"),
    units=(4, 48, 48),
    trials=tuple(narrowed(trial, 2, 48, 8 - number) for number, trial in enumerate(TRIALS, 1)),
    variants=tuple(narrowed(variant, 3, 40, 20) for variant in RESULTS.variants),
    front=("trial 6", "trial 7", "trial 1", "trial 5", "trial 8"),
)
"""The same, where widths were searched, too."""
