"""Standard errors and paired comparisons, against numbers by hand and those of scipy."""

import math
from random import Random
from statistics import stdev

import pytest
from scipy.stats import binomtest

from qpruner.records.statistics import (
    Estimate,
    accuracies,
    compare_counts,
    compare_paired,
    mcnemar,
    mean_accuracy,
    mean_over_tasks,
    standard_error,
)


def test_the_standard_error_is_that_of_the_sample_with_n_minus_1() -> None:
    assert standard_error(0.6, 25) == pytest.approx(0.1)  # sqrt(0.24 / 24)
    right = [1.0] * 7 + [0.0] * 4
    assert standard_error(7 / 11, 11) == pytest.approx(stdev(right) / math.sqrt(11))
    assert standard_error(1.0, 50) == 0
    assert math.isnan(standard_error(1.0, 1)) and math.isnan(standard_error(math.nan, 50))


def test_the_error_of_a_mean_over_tasks_by_hand() -> None:
    mean = mean_over_tasks([Estimate(0.5, 0.03), Estimate(0.7, 0.04)])
    assert (mean.value, mean.error) == (pytest.approx(0.6), pytest.approx(0.025))
    assert mean_over_tasks([Estimate(0.5, 0.03)]) == Estimate(0.5, 0.03)
    assert math.isnan(mean_over_tasks([Estimate(0.5, 0.03), Estimate(0.7, math.nan)]).error)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(0, 5) == pytest.approx(1 / 16)
    assert mcnemar(0, 0) == mcnemar(3, 3) == mcnemar(3, 4) == 1


@pytest.mark.parametrize(("first", "second"), [(3, 17), (40, 75), (1000, 1100), (2600, 2400), (30, 5000)])
def test_mcnemar_is_the_binomial_test_of_discordant_items(first: int, second: int) -> None:
    assert mcnemar(first, second) == pytest.approx(binomtest(first, first + second, 0.5).pvalue, rel=1e-8, abs=1e-300)


def test_paired_items_are_counted_and_the_error_is_that_of_their_differences() -> None:
    rng = Random(0)
    first = [rng.random() < 0.6 for _ in range(200)]
    second = [right if rng.random() < 0.8 else rng.random() < 0.7 for right in first]
    compared = compare_paired(first, second)
    differences = [int(new) - int(old) for old, new in zip(first, second, strict=True)]
    assert (compared.only_first, compared.only_second) == (differences.count(-1), differences.count(1))
    assert compared.difference == pytest.approx(sum(differences) / 200)
    assert compared.error == pytest.approx(stdev(differences) / math.sqrt(200))
    assert compared.p_value == mcnemar(compared.only_first, compared.only_second) < 1


def test_a_paired_difference_by_hand() -> None:
    compared = compare_counts(10, 1, 4)  # differences: one -1, four 1, five 0
    assert compared.difference == pytest.approx(0.3)
    assert compared.error == pytest.approx(math.sqrt((5 - 10 * 0.09) / 9 / 10))
    assert compared.p_value == pytest.approx(2 * (1 + 5) / 32)


def test_of_no_and_of_one_item_no_error_is_known() -> None:
    nothing, single = compare_counts(0, 0, 0), compare_counts(1, 0, 1)
    assert math.isnan(nothing.difference) and math.isnan(nothing.error) and nothing.p_value == 1
    assert (single.difference, single.p_value) == (1, 1) and math.isnan(single.error)
    assert compare_counts(50, 0, 50).error == 0


def test_accuracies_are_read_from_what_trials_and_stages_keep() -> None:
    results = {"loss": 2.0, "b/acc": 0.1, "b/accuracy": 0.5, "b/error": 0.02, "a/accuracy": "nan", "accuracy": 0.6}
    read = accuracies(results)
    assert [*read] == ["b", "a"] and read["b"] == Estimate(0.5, 0.02)
    assert math.isnan(read["a"].value) and math.isnan(read["a"].error)
    assert mean_accuracy(results | {"accuracy_error": 0.01}) == Estimate(0.6, 0.01)
    mean = mean_accuracy(results | {"examples": 25.0})
    assert mean is not None and math.isnan(mean.error)  # two tasks: their examples do not tell it
    assert mean_accuracy({"accuracy": 0.6, "examples": 25.0}) == Estimate(0.6, pytest.approx(0.1))
    assert mean_accuracy({"loss": 2.0}) is None
