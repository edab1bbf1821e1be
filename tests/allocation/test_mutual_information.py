import math
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
from sklearn.metrics import mutual_info_score
from torch import Tensor
from torch.special import digamma

from qpruner.allocation.mutual_information import MutualInformationConfig, estimate, mutual_information
from qpruner.errors import UserError

HISTOGRAM, NEIGHBOURS = MutualInformationConfig(), MutualInformationConfig("neighbours")
BOTH = pytest.mark.parametrize("config", [HISTOGRAM, NEIGHBOURS], ids=["histogram", "neighbours"])


def psi(number: float) -> float:
    return float(digamma(torch.tensor(float(number), dtype=torch.float64)))


def normal_pair(count: int, correlation: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(count)
    return x, correlation * x + math.sqrt(1 - correlation**2) * torch.randn(count)


# Against numbers known otherwise.


@pytest.mark.parametrize(
    ("classes", "found", "correction"),
    [
        ([0, 0, 0, 1, 1, 1, 1, 0], 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 16),
        ([0, 0, 0, 9, 9, 9, 9, 9], 3 / 8 * math.log(2) + 1 / 8 * math.log(2 / 5) + 1 / 2 * math.log(8 / 5), 0.0),
        ([0, 0, 0, 0, 9, 9, 9, 9], math.log(2), -1 / 16),
    ],
)
def test_histogram_by_hand(classes: list[int], found: float, correction: float) -> None:
    x, y = torch.arange(8.0), torch.tensor(classes)
    result = estimate(x, y, MutualInformationConfig(bins=2))
    assert result.uncorrected == pytest.approx(found)
    assert result.correction == pytest.approx(correction)
    assert mutual_information(x, y, MutualInformationConfig(bins=2)) == pytest.approx(found - correction)


def test_neighbours_by_hand() -> None:
    x, y = torch.tensor([0.0, 1.0, 5.0, 1.5, 6.0, 9.0]), torch.tensor([0, 0, 0, 7, 7, 3])
    # Without the 9, alone in its class: the second nearest of 0, 1, 5 is 5, 4, 5 away; the first of 1.5 and 6 is 4.5.
    near = [3, 3, 4, 4, 2]
    expected = psi(5) + (3 * psi(2) + 2 * psi(1)) / 5 - (3 * psi(3) + 2 * psi(2)) / 5 - mean(map(psi, near))
    found = estimate(x, y, MutualInformationConfig("neighbours", neighbours=2))
    assert found.uncorrected == pytest.approx(expected, abs=1e-12)
    assert found.value == max(0, found.uncorrected)


@pytest.mark.parametrize("bins", [2, 5, 16])
@pytest.mark.parametrize("numbers", [True, False])
def test_the_plug_in_is_that_of_a_table_of_counts(bins: int, numbers: bool) -> None:
    x, y = normal_pair(320, 0.7)
    y = y if numbers else (2 * y).round().long()

    def edges(values: Tensor) -> Any:
        return np.quantile(values.double().numpy(), np.linspace(0, 1, bins + 1))

    by_y = edges(y) if numbers else np.arange(int(y.min()), int(y.max()) + 2) - 0.5
    p = np.histogram2d(x.double().numpy(), y.double().numpy(), [edges(x), by_y])[0] / 320
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nansum(p * np.log(p / (p.sum(1, keepdims=True) * p.sum(0))))
    assert estimate(x, y, MutualInformationConfig(bins=bins)).uncorrected == pytest.approx(float(expected), abs=1e-12)
    occupied = (p > 0).sum() - (p.sum(0) > 0).sum() - (p.sum(1) > 0).sum() + 1
    assert estimate(x, y, MutualInformationConfig(bins=bins)).correction == pytest.approx(occupied / 640)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_classes_agree_with_a_search_through_all_pairs(k: int) -> None:
    y = torch.tensor([0] * 30 + [1] * 12 + [2] * 5 + [3] * 2 + [4, 5, 6])  # classes of fewer than k, and of one
    y = y[torch.randperm(len(y))]
    x = torch.randn(len(y)) + y / 3
    kept = [i for i in range(len(y)) if (y == y[i]).sum() > 1]
    terms = []
    for i in kept:
        same = sorted(abs(float(x[i] - x[j])) for j in kept if j != i and y[j] == y[i])
        nearest = min(k, len(same))
        within = sum(abs(float(x[i] - x[j])) <= same[nearest - 1] for j in kept if j != i)
        terms.append(psi(nearest) - psi(len(same) + 1) - psi(within))
    found = estimate(x, y, MutualInformationConfig("neighbours", neighbours=k)).uncorrected
    assert found == pytest.approx(psi(len(kept)) + mean(terms), abs=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_numbers_agree_with_a_search_through_all_pairs(k: int) -> None:
    x, y = normal_pair(300, 0.8)  # more than one chunk
    a, b = ((v.double() - v.double().mean()) / v.double().std() for v in (x, y))
    terms = []
    for i in range(300):
        from_x, from_y = (a - a[i]).abs(), (b - b[i]).abs()
        distance = torch.maximum(from_x, from_y).sort().values[k]
        terms += [psi(int((from_x < distance).sum())) + psi(int((from_y < distance).sum()))]
    found = estimate(x, y, MutualInformationConfig("neighbours", neighbours=k)).uncorrected
    assert found == pytest.approx(psi(k) + psi(300) - mean(terms), abs=1e-12)


# Against scikit-learn, which has other hands behind it.


@pytest.mark.parametrize("bins", [2, 5, 16])
@pytest.mark.parametrize("numbers", [True, False])
def test_the_histogram_before_its_correction_is_scikit_learns(bins: int, numbers: bool) -> None:
    x, y = normal_pair(320, 0.7)
    y = y if numbers else (2 * y).round().long()

    def binned(values: Tensor) -> Any:
        return (values.double().argsort().argsort() * bins // len(values)).numpy()

    expected = mutual_info_score(binned(x), binned(y) if numbers else y.numpy())
    assert estimate(x, y, MutualInformationConfig(bins=bins)).uncorrected == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_neighbours_of_classes_are_scikit_learns(k: int) -> None:
    """Both add noise of 1e-10 standard deviations, which moves no neighbour here, and leave out classes of one.

    Classes of fewer than 2 k it searches by distances that are rounded, so that it miscounts; they are tested above.
    """
    y = torch.tensor([0] * 200 + [1] * 80 + [2] * 20 + [3])
    y = y[torch.randperm(len(y))]
    x = (torch.randn(len(y)) + 2 * y).double()
    expected = mutual_info_classif(x[:, None].numpy(), y.numpy(), n_neighbors=k, random_state=0)[0]
    config = MutualInformationConfig("neighbours", neighbours=k)
    assert estimate(x, y, config).value == pytest.approx(expected, abs=1e-9) and expected > 0.02


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("correlation", [0.8, -0.4])
def test_neighbours_of_numbers_are_scikit_learns(k: int, correlation: float) -> None:
    x, y = (values.double() for values in normal_pair(600, correlation))
    # It scales by the standard deviation of N, we by that of N - 1: x and y alike, so that neighbours are the same.
    expected = mutual_info_regression(x[:, None].numpy(), y.numpy(), n_neighbors=k, random_state=0)[0]
    config = MutualInformationConfig("neighbours", neighbours=k)
    assert estimate(x, y, config).value == pytest.approx(expected, abs=1e-9) and expected > 0.02


# Against theory.


def test_independent_data_have_the_bias_of_chi_squared_and_none_after_the_correction() -> None:
    count, freedom = 4000, 15 * 3
    x, y = torch.randn(count), torch.randint(4, (count,))
    spread = math.sqrt(2 * freedom) / (2 * count)  # 2 N times the plug-in is chi-squared
    found = estimate(x, y, HISTOGRAM)
    assert found.uncorrected == pytest.approx(freedom / (2 * count), abs=4 * spread)
    assert found.uncorrected - found.correction == pytest.approx(0, abs=4 * spread)
    assert found.correction > 4 * spread


@pytest.mark.parametrize("numbers", [True, False])
def test_neighbours_have_no_bias_on_independent_data(numbers: bool) -> None:
    draws = [
        estimate(torch.randn(200), torch.randn(200) if numbers else torch.randint(5, (200,)), NEIGHBOURS).uncorrected
        for _ in range(40)
    ]
    assert abs(mean(draws)) < 4 * stdev(draws) / math.sqrt(40)
    assert stdev(draws) < 0.1


@BOTH
def test_what_follows_from_x_is_told_whole(config: MutualInformationConfig) -> None:
    x = torch.randn(800)
    y = torch.searchsorted(x.quantile(torch.tensor([0.25, 0.5, 0.75])), x)
    found = estimate(x, y, config)
    assert found.uncorrected == pytest.approx(math.log(4), abs=1e-12 if config == HISTOGRAM else 0.02)
    assert found.correction == pytest.approx(-3 / 1600 if config == HISTOGRAM else 0)  # Miller's, of the entropy of y


@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.9])
def test_correlated_normals(correlation: float) -> None:
    expected = -0.5 * math.log(1 - correlation**2)
    x, y = normal_pair(20_000, correlation)
    # Bins cannot tell more than what is binned, and 16 lose little.
    assert expected - 0.06 < mutual_information(x, y, HISTOGRAM) < expected + 0.02
    assert mutual_information(x[:2000], y[:2000], NEIGHBOURS) == pytest.approx(expected, abs=0.06)


@BOTH
def test_normals_whose_mean_is_the_class(config: MutualInformationConfig) -> None:
    share, at = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.0, 2.0, -1.5], dtype=torch.float64)
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    given = torch.exp(-((grid - at[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = float(
        torch.trapezoid((share[:, None] * given * (given / (share @ given)).log()).nan_to_num(), grid).sum()
    )
    y = torch.multinomial(share, 8000, replacement=True)
    assert mutual_information(torch.randn(8000) + at[y], y, config) == pytest.approx(expected, abs=0.03)
    assert expected > 0.3


# Properties.


@pytest.mark.parametrize("count", [32, 50, 500, 511])
def test_bins_hold_equal_counts(count: int) -> None:
    x = torch.randn(count).exp()
    held = torch.full((16,), count // 16, dtype=torch.float64)
    held[: count % 16] += 1
    found = estimate(x, torch.arange(count), HISTOGRAM).uncorrected  # a class for each sample tells its bin
    assert found == pytest.approx(-float((held / count * (held / count).log()).sum()), abs=1e-12)


@pytest.mark.parametrize("numbers", [True, False])
def test_the_histogram_sees_only_the_order(numbers: bool) -> None:
    x, y = normal_pair(512, 0.5)
    y = y.double() if numbers else (2 * y).round().long()
    expected = estimate(x.double(), y, HISTOGRAM)
    assert estimate(x.double().exp(), y, HISTOGRAM) == expected
    assert estimate(x.double() ** 3 * 1e6 - 5, y, HISTOGRAM) == expected
    assert estimate(-x.double(), y, HISTOGRAM).uncorrected == pytest.approx(expected.uncorrected, abs=1e-12)
    if numbers:
        assert estimate(x.double(), y.exp(), HISTOGRAM) == expected
        assert estimate(y, x.double(), HISTOGRAM).uncorrected == pytest.approx(expected.uncorrected, abs=1e-12)


@pytest.mark.parametrize("numbers", [True, False])
def test_neighbours_see_neither_place_nor_scale(numbers: bool) -> None:
    x, y = normal_pair(300, 0.5)
    y = y.double() if numbers else y.round().long()
    expected = estimate(x.double(), y, NEIGHBOURS).uncorrected
    assert estimate(x.double() * 1e6 - 4e6, y, NEIGHBOURS).uncorrected == pytest.approx(expected, abs=1e-9)


@BOTH
@pytest.mark.parametrize("numbers", [True, False])
def test_the_order_of_samples_does_not_matter(config: MutualInformationConfig, numbers: bool) -> None:
    x, y = normal_pair(400, 0.5)
    x, y = (x * 5).round(), (y * 5).round() if numbers else (y * 2).round().long()  # ties everywhere
    other = torch.randperm(400)
    assert estimate(x[other], y[other], config).uncorrected == pytest.approx(
        estimate(x, y, config).uncorrected, abs=1e-12
    )


@BOTH
def test_names_of_classes_do_not_matter(config: MutualInformationConfig) -> None:
    x, y = normal_pair(400, 0.5)
    y = y.round().long()
    found = mutual_information(x, 100_000 - 3 * y, config)
    assert found == pytest.approx(mutual_information(x, y, config), abs=1e-12)


@BOTH
@pytest.mark.parametrize("numbers", [True, False])
def test_a_constant_tells_nothing(config: MutualInformationConfig, numbers: bool) -> None:
    y = torch.randn(100) if numbers else torch.randint(3, (100,))
    for x in (torch.zeros(100), torch.full((100,), 1e30)):
        assert mutual_information(x, y, config) == 0
    assert mutual_information(torch.randn(100), torch.zeros_like(y), config) == 0


@BOTH
def test_many_equal_values_are_told_apart_from_others_only(config: MutualInformationConfig) -> None:
    x = torch.cat([torch.zeros(500), torch.rand(500) + 1])
    y = torch.cat([torch.zeros(500), torch.ones(500)]).long()
    assert mutual_information(x, y, config) == pytest.approx(math.log(2), abs=0.01)
    shuffled = torch.randint(2, (1000,))
    assert mutual_information(x, shuffled, config) < 0.06


def test_nothing_is_less_than_nothing() -> None:
    x, y = torch.randn(100, 64), torch.arange(64) % 2
    found = [estimate(one, y, config) for one in x for config in (HISTOGRAM, NEIGHBOURS)]
    assert min(one.uncorrected - one.correction for one in found) < 0
    assert min(one.value for one in found) == 0


# What cannot be had.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bins": 1}, "bins is 1"),
        ({"bins": 2.5}, "bins is 2.5"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"estimator": "kernel"}, "estimator is 'kernel'; choose one of histogram, neighbours"),
        ({"summary": "median"}, "summary is 'median'; choose one of mean, norm, max"),
        ({"prediction": "loss"}, "prediction is 'loss'; choose one of argmax, log_probability"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        MutualInformationConfig(**options)


@BOTH
def test_too_few_samples(config: MutualInformationConfig) -> None:
    fewest = 32 if config == HISTOGRAM else 5
    y = torch.arange(fewest) % 2
    estimate(torch.randn(fewest), y, config)
    with pytest.raises(UserError, match=rf"at least {fewest} samples, not {fewest - 1}.*num_sequences or length"):
        estimate(torch.randn(fewest - 1), y[1:], config)


def test_neighbours_need_classes_that_repeat() -> None:
    y = torch.arange(100)
    y[:4] = 1000
    with pytest.raises(UserError, match="at least 5 samples, not 4"):
        estimate(torch.randn(100), y, NEIGHBOURS)
