import math
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from support.families import FFN, LAYERS, tiny_config, tiny_model

from qpruner.allocation.budget import Budget, parse_bytes
from qpruner.anatomy import architecture_of, unit_weights
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pricing import Price, price

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
PRUNED = [((0, 2, 3), range(5, 40)), ((1,), range(3, 48, 2)), ((0, 1, 2, 3), (7,))]
WHOLE = [(range(4), range(FFN))] * LAYERS
BIASED = {"attention_bias": True, "mlp_bias": True}
DENSE_WEIGHTS = LAYERS * (2 * 128 * 64 + 2 * 64 * 64 + 3 * 48 * 64)
"""Queries and outputs 128 wide, keys and values 64, 48 channels; width 64."""


def priced(precision: Precision, kept: Any = PRUNED) -> tuple[Price, CompressionPlan]:
    """A llama with biases and adapters of rank 2."""
    config = tiny_config("llama", **BIASED)
    plan = CompressionPlan.dense(architecture_of(config), None).keeping(kept)
    plan = plan.with_precision([dict.fromkeys(UNITS, precision)] * LAYERS)
    return price(build_skeleton(config).bfloat16(), plan, rank=2, targets=("q_proj", "down_proj")), plan


# How many bytes.


@pytest.mark.parametrize("kept", [PRUNED, WHOLE])
@pytest.mark.parametrize("precision", [NF4, INT8, DENSE], ids=str)
def test_a_budget_of_what_a_plan_takes_is_just_enough(precision: Precision, kept: Any) -> None:
    whole, plan = priced(precision, kept)
    held = whole.unit_weight_bytes
    assert Budget(bytes=whole.total).limit(whole, plan) == held
    assert Budget(bytes=whole.total - 1).limit(whole, plan) == held - 1
    share = held / (2 * DENSE_WEIGHTS)
    for budget in (Budget(average_bits=whole.average_bits), Budget(share=share)):
        assert budget.limit(whole, plan) == held
    less = math.nextafter(whole.average_bits, 0), math.nextafter(share, 0)
    for budget in (Budget(average_bits=less[0]), Budget(share=less[1])):
        assert budget.limit(whole, plan) == held - 1


def test_all_plans_of_the_same_widths_have_the_same_limit() -> None:
    (small, plan), (large, other) = priced(NF4), priced(DENSE)
    assert small.total < large.total
    for budget in (Budget(bytes="70 kB"), Budget(average_bits=5.3), Budget(share=0.21)):
        assert budget.limit(small, plan) == budget.limit(large, other)


def test_limits_by_hand() -> None:
    whole, plan = priced(NF4, WHOLE)
    assert whole.average_bits == 4.5 and unit_weights(plan.architecture) == whole.weights == DENSE_WEIGHTS
    assert Budget(average_bits=4.5).limit(whole, plan) == whole.unit_weight_bytes == DENSE_WEIGHTS * 9 // 16
    assert Budget(average_bits=5).limit(whole, plan) == DENSE_WEIGHTS * 5 // 8
    assert Budget(share=0.5).limit(whole, plan) == DENSE_WEIGHTS
    assert Budget(share=2).limit(whole, plan) == 4 * DENSE_WEIGHTS
    biases = LAYERS * (128 + 64 + 64 + 64 + 48 + 48 + 64) * 2
    assert Budget(bytes=10**6).limit(whole, plan) == 10**6 - whole.rest - whole.adapters - biases
    assert Budget(bytes=1).limit(whole, plan) < 0


def test_the_share_is_of_the_model_before_pruning() -> None:
    whole, plan = priced(NF4)
    assert whole.weights < unit_weights(plan.architecture) == DENSE_WEIGHTS
    linears = tiny_model("llama").model.layers.parameters()
    assert sum(p.numel() for p in linears if p.dim() == 2) == DENSE_WEIGHTS


@pytest.mark.parametrize("value", [0.1, 0.3, 0.29, 0.57, 1.1])
def test_decimal_fractions_lose_no_byte(value: float) -> None:
    """0.29 * 100 is 28.999999999999996 in floats."""
    weights, tenths = 5 * 10**5, round(value * 100)
    whole = Price(units=0, rest=0, adapters=0, weights=weights, unit_weight_bytes=0)
    assert Budget(average_bits=value * 8).limit(whole, priced(NF4)[1]) == tenths * weights // 100


def test_an_average_that_was_read_off_a_plan_gives_its_bytes() -> None:
    """About one in six of these averages, times the weights, is less than the bits in floats."""
    plan = priced(NF4)[1]
    weights = 6_476_005_376  # of the linears of a 7B model
    for held in range(weights // 2, weights // 2 + 300):
        whole = Price(units=held, rest=0, adapters=0, weights=weights, unit_weight_bytes=held)
        assert Budget(average_bits=whole.average_bits).limit(whole, plan) == held


# How it is written.


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (1, 1),
        ("7_000_000", 7_000_000),
        ("12", 12),
        ("12 B", 12),
        ("1.5 GB", 1_500_000_000),
        ("1.5GB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("1.1 GB", 1_100_000_000),
        ("900 MiB", 943_718_400),
        ("900 MB", 900_000_000),
        ("3 kB", 3000),
        ("1.001 kB", 1001),  # 1000.9999999999999 in floats
        ("3 KiB", 3072),
        ("0.5 TiB", 2**39),
        ("2 TB", 2 * 10**12),
        (" 2e9 ", 2 * 10**9),
        ("1.9 B", 1),
    ],
)
def test_units(amount: int | str, expected: int) -> None:
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize(
    "amount",
    [0, -5, "", "GB", "-1 GB", "0 GB", "0.5 B", "3 QB", "3 Gbit", "1.2.3 GB", "nan", "inf", "1/2 GB", "1,5 GB", True],
)
def test_amounts_that_mean_nothing(amount: Any) -> None:
    with pytest.raises(UserError) as caught:
        Budget(bytes=amount)
    for part in (f"budget.bytes is {amount!r}", "at least 1 byte", "GiB", "Write it as"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["average_bits", "share"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "5"])
def test_numbers_that_mean_nothing(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Budget(**{name: value})
    for part in (f"budget.{name} is {value!r}", "finite number above 0", "Give"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "none of them"),
        ({"bytes": 5, "share": 0.5}, r"bytes 5, share 0\.5"),
        ({"bytes": 0, "average_bits": 5}, "bytes 0, average_bits 5"),
        ({"bytes": "1 GB", "average_bits": 5, "share": 0.5}, "bytes '1 GB', average_bits 5, share 0.5"),
    ],
)
def test_exactly_one(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=rf"one of bytes, average_bits and share, and here {found}\. Give exactly one"):
        Budget(**options)


def test_multiply_adds_stand_beside_bytes_and_are_those_of_the_dense_linears() -> None:
    whole, plan = priced(NF4)
    assert whole.multiply_adds == sum(
        groups * (2 * 32 * 64 + 2 * 16 * 64) + channels * 3 * 64
        for groups, channels in zip(plan.widths.kv_groups, plan.widths.ffn_channels, strict=True)
    )
    assert Budget(share=0.3, multiply_adds=0.5).most_multiply_adds(plan) == DENSE_WEIGHTS // 2
    share = whole.multiply_adds / DENSE_WEIGHTS
    assert Budget(share=0.3, multiply_adds=share).most_multiply_adds(plan) == whole.multiply_adds
    assert Budget(share=0.3).most_multiply_adds(plan) is None
    for budget in ({"bytes": whole.total}, {"share": 0.21}, {"average_bits": 5.3}):
        assert Budget(**budget, multiply_adds=0.5).limit(whole, plan) == Budget(**budget).limit(whole, plan)
    with pytest.raises(UserError, match=r"multiply_adds is 1\.2; it is a share in \(0, 1\]"):
        Budget(share=0.3, multiply_adds=1.2)
    with pytest.raises(UserError, match=r"multiply_adds is 0; it is a finite number above 0"):
        Budget(share=0.3, multiply_adds=0)
    with pytest.raises(UserError, match=r"one of bytes, average_bits and share, and here none of them"):
        Budget(multiply_adds=0.5)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(average_bits=5), "5 bits per weight"),
        (Budget(average_bits=4.25), "4.25 bits per weight"),
        (Budget(bytes="1.5 GB"), "1,500,000,000 bytes in all"),
        (Budget(share=0.3), "30.0 % of the 16-bit bytes of the dense decoder linears"),
        (
            Budget(average_bits=5, multiply_adds=0.7),
            "5 bits per weight and 70.0 % of the multiply-adds of the dense decoder linears",
        ),
    ],
)
def test_how_a_person_reads_it(budget: Budget, text: str) -> None:
    assert str(budget) == text


class Holder:
    def __init__(self, budget: Budget) -> None:
        self.budget = budget


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{average_bits: 5}", Budget(average_bits=5)),
        ("{bytes: 1.5 GB}", Budget(bytes="1.5 GB")),
        ("{bytes: 7_000_000}", Budget(bytes=7_000_000)),
        ("{share: 0.3}", Budget(share=0.3)),
        ("{share: 0.3, multiply_adds: 0.7}", Budget(share=0.3, multiply_adds=0.7)),
    ],
)
def test_from_yaml(written: str, expected: Budget) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "holder")
    parsed = parser.instantiate(parser.parse_string(f"holder: {{budget: {written}}}"))
    assert parsed.holder.budget == expected
