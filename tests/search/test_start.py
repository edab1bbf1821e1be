"""What is said of a plan to start from that a search cannot try, against plans written by hand."""

from dataclasses import replace

import pytest

from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, Leading, Precision
from qpruner.search.start import departures, mean_bits, share_of_weights

FOUR, EIGHT = Precision("nf4", 4, 64), Precision("int8", 8)
BASE = CompressionPlan.dense(Architecture("llama", 32, 8, 1, (3, 3), (8, 8)), None)
"""In each layer 3 * 1024 weights of KV groups and 8 * 96 of FFN channels."""
GIVEN = BASE.keeping([((0, 2), range(8)), (range(3), range(8))]).with_precision([dict.fromkeys(UNITS, FOUR)] * 2)


def test_the_shares_and_bits_of_plans() -> None:
    assert share_of_weights(BASE) == 1 and share_of_weights(GIVEN) == (2 * 3840 - 1024) / (2 * 3840)
    assert mean_bits(BASE) == 16 and mean_bits(GIVEN) == 4
    lifted = replace(FOUR, leading=Leading(8, EIGHT))  # a quarter of 32 columns, in which qkv has 3 * 768 weights
    units = [dict.fromkeys(UNITS, FOUR), {**dict.fromkeys(UNITS, FOUR), "qkv": lifted}]
    assert mean_bits(GIVEN.with_precision(units)) == pytest.approx(4 + 4 * 0.25 * 2304 / (2 * 3840 - 1024))


def test_nothing_is_said_of_the_same_plan_in_another_order_or_with_the_rank_that_all_have() -> None:
    assert departures(GIVEN, GIVEN, 4) == []
    assert departures(GIVEN.keeping([((1, 0), range(8)), (range(3), range(8))]), GIVEN, 4) == []
    assert departures(GIVEN, GIVEN.with_ranks([4, None]), 4) == []


def test_each_kind_of_departure_is_named() -> None:
    narrower = BASE.keeping([((0, 2), range(4)), (range(3), range(8))]).with_precision([dict.fromkeys(UNITS, FOUR)] * 2)
    assert departures(GIVEN, narrower, 4) == [
        "keeps 81.7 % of the weights of the decoder linears and not 86.7 %, with other units in 1 of 2 layers"
    ]
    others = BASE.keeping([((0, 1), range(8)), (range(3), range(8))]).with_precision([dict.fromkeys(UNITS, FOUR)] * 2)
    assert departures(GIVEN, others, 4) == [
        "keeps 86.7 % of the weights of the decoder linears and not 86.7 %, with other units in 1 of 2 layers"
    ]
    wider = GIVEN.with_precision([dict.fromkeys(UNITS, FOUR), dict.fromkeys(UNITS, FOUR) | {"down": EIGHT}])
    assert departures(GIVEN, wider, 4) == [
        "has 4.15 bits per weight without scales and not 4.00, with another precision in 1 of 8 units of quantization"
    ]
    assert departures(GIVEN, GIVEN.with_ranks([1, None]), 4) == ["has adapters of another rank in 1 of 2 layers"]
    tables = replace(GIVEN, embedding=EIGHT)
    assert departures(tables, GIVEN, 4) == [f"holds the embedding in {DENSE} and not {EIGHT}"]
    assert departures(tables, narrower.with_ranks([1, 1]), 4) == [
        *departures(GIVEN, narrower, 4),
        "has adapters of another rank in 2 of 2 layers",
        f"holds the embedding in {DENSE} and not {EIGHT}",
    ]
