"""How certain an accuracy is, and whether two models differ on the same items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    Args:
        value: the number.
        error: standard error of the number; nan where it is unknown, as for a single item.
    """

    value: float
    error: float


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same items, the second against the first.

    Args:
        items: number of items.
        only_first: number of items that only the first model gets right.
        only_second: number of items that only the second model gets right.
        difference: accuracy of the second minus that of the first, in [-1, 1].
        error: standard error of the difference, from the differences item by item; nan for a single item.
        p_value: probability of items as one-sided as these, or more, if both models were right equally often
            (McNemar's exact test, two-sided).
    """

    items: int
    only_first: int
    only_second: int
    difference: float
    error: float
    p_value: float


def standard_error(accuracy: float, items: int) -> float:
    """Standard error of the accuracy on a sample of items: ``sqrt(p (1 - p) / (n - 1))``.

    The variance is that of the sample, with n - 1, as in lm-evaluation-harness; over many items it is that of the
    binomial.

    Args:
        accuracy: fraction of items with the correct answer, in [0, 1].
        items: number of items.
    """
    return sqrt(accuracy * (1 - accuracy) / (items - 1)) if items > 1 and 0 <= accuracy <= 1 else nan


def mean_over_tasks(tasks: Sequence[Estimate]) -> Estimate:
    """Mean of accuracies, each task with the same weight; its error is ``sqrt(sum of squares) / number of tasks``.

    Args:
        tasks: accuracies of tasks with their standard errors, at least one; no item is in two tasks.
    """
    return Estimate(
        sum(task.value for task in tasks) / len(tasks), sqrt(sum(task.error**2 for task in tasks)) / len(tasks)
    )


def accuracies(results: Mapping[str, Any]) -> dict[str, Estimate]:
    """The accuracy of each task, by name and in the order of the results.

    Args:
        results: numbers, among them entries such as ``boolq/accuracy`` and ``boolq/error``; nan is text in JSON.
    """
    tasks = [name.removesuffix("/accuracy") for name in results if name.endswith("/accuracy")]
    return {
        task: Estimate(float(results[f"{task}/accuracy"]), float(results.get(f"{task}/error", nan))) for task in tasks
    }


def mean_accuracy(results: Mapping[str, Any]) -> Estimate | None:
    """The accuracy over all tasks; without a recorded error, a single task's error follows from its examples.

    Args:
        results: numbers, among them ``accuracy``, ``accuracy_error`` and ``examples``; nan is text in JSON.
    """
    if "accuracy" not in results:
        return None
    accuracy, error = float(results["accuracy"]), float(results.get("accuracy_error", nan))
    examples = float(results.get("examples", nan))
    if "accuracy_error" not in results and len(accuracies(results)) < 2 and isfinite(examples):
        error = standard_error(accuracy, int(examples))
    return Estimate(accuracy, error)


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Compares two models by whether each gets each item right.

    Args:
        first: whether the first model is right, for each item.
        second: whether the second model is right, for the same items in the same order.
    """
    pairs = list(zip(first, second, strict=True))
    return compare_counts(len(pairs), pairs.count((True, False)), pairs.count((False, True)))


def compare_counts(items: int, only_first: int, only_second: int) -> PairedComparison:
    """Compares two models by the number of items on which they differ; see `PairedComparison`."""
    difference = (only_second - only_first) / items if items else nan
    discordant = only_first + only_second
    # Sample variance of differences that are -1, 0 or 1, over the number of items.
    variance = (discordant - items * difference**2) / (items - 1) / items if items > 1 else inf
    error = sqrt(max(variance, 0.0)) if isfinite(variance) else nan
    return PairedComparison(items, only_first, only_second, difference, error, mcnemar(only_first, only_second))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: under equal models each discordant item is the toss of a fair coin.

    The tail of the binomial distribution is summed in integers, so it is exact for any number of items.

    Args:
        only_first: number of items that only the first model gets right.
        only_second: number of items that only the second model gets right.
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    ways = tail = 1
    for heads in range(1, fewer + 1):
        ways = ways * (discordant - heads + 1) // heads  # binomial coefficient of heads among discordant
        tail += ways
    return min(1.0, 2 * tail / 2**discordant)
