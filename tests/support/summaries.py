"""A summary of a run, as tests of reports need it."""

from qpruner.records.report import Stage, Summary

SUMMARY = Summary(
    finished=True,
    protocol="rows of 8",
    peak_of="resident set of the process",
    stages=(
        Stage(
            "dense", 1000, 4000, None, {"perplexity": 3.14159, "accuracy": 0.5, "tokens": 12.0}, 1.25, None, 3 * 2**20
        ),
        Stage("recovered", 1010, 4040, 4.5, {}, 60.0, 7 * 2**20, None),
    ),
)
