"""Against the textbook formulas, a density from SciPy and numerical integration."""

from dataclasses import astuple, replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

from qpruner.search.gaussian import (
    MIDDLE,
    OFFSET,
    WIDTH,
    Process,
    expected_improvement,
    fit,
    log_likelihoods,
    posterior,
)

PROCESS = Process(signal=0.7, length=0.6, noise=0.2, weight=0.9, doubt=0.4)


def observations(seed: int, count: int, items: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = generator.choice([0, 0.5, 1], (count, items))
    return features, generator.standard_normal(count), generator.standard_normal(count)


def kernel(process: Process, one: tuple[np.ndarray, float], other: tuple[np.ndarray, float]) -> float:
    """Of two plans, in scalars."""
    r = np.sqrt(5) * np.sqrt(np.mean((one[0] - other[0]) ** 2)) / process.length
    smooth = process.signal**2 * (1 + r + r * r / 3) * np.exp(-r)
    return float(smooth + process.doubt**2 * one[1] * other[1] + OFFSET)


def matrix(process: Process, features: np.ndarray, costs: np.ndarray) -> np.ndarray:
    plans = list(zip(features, costs, strict=True))
    return np.array([[kernel(process, one, other) for other in plans] for one in plans])


def test_posterior_is_that_of_the_joint_normal_distribution() -> None:
    features, costs, scores = observations(0, 9)
    whole = matrix(PROCESS, features, costs)
    seen, new = slice(0, 6), slice(6, 9)
    inverse = np.linalg.inv(whole[seen, seen] + PROCESS.noise**2 * np.eye(6))
    wanted = 0.9 * costs[new] + whole[new, seen] @ inverse @ (scores[seen] - 0.9 * costs[seen])
    wanted_variance = np.diag(whole[new, new] - whole[new, seen] @ inverse @ whole[seen, new])
    mean, variance = posterior(PROCESS, features[seen], costs[seen], scores[seen], features[new], costs[new])
    assert mean == pytest.approx(wanted) and variance == pytest.approx(wanted_variance)


def test_without_noise_it_goes_through_the_scores() -> None:
    features, costs, scores = observations(1, 6)
    mean, variance = posterior(replace(PROCESS, noise=1e-6), features, costs, scores, features, costs)
    assert mean == pytest.approx(scores, abs=1e-6) and variance == pytest.approx(np.zeros(6), abs=1e-6)


def test_likelihood_is_the_density_of_the_scores() -> None:
    features, costs, scores = observations(2, 8)
    processes = [PROCESS, Process(2.0, 0.1, 0.05, 0.1, 3.0)]
    wanted = [
        multivariate_normal(one.weight * costs, matrix(one, features, costs) + one.noise**2 * np.eye(8)).logpdf(scores)
        for one in processes
    ]
    found = log_likelihoods(np.array([astuple(one) for one in processes]), features, costs, scores)
    assert found == pytest.approx(wanted)


def test_improvement_is_the_integral_over_what_is_below_the_best() -> None:
    for mean, sd, best in [(0.0, 1.0, 0.0), (1.0, 0.5, 0.2), (-1.0, 2.0, 0.3), (3.0, 0.7, 0.0)]:
        density = norm(mean, sd).pdf
        wanted, _ = quad(lambda score, best=best, density=density: (best - score) * density(score), -30, best)
        assert expected_improvement(np.array([mean]), np.array([sd**2]), best)[0] == pytest.approx(wanted, abs=1e-8)
    assert expected_improvement(np.array([1.0, -2.0]), np.zeros(2), 0.0).tolist() == [0.0, 2.0]


def test_fit_finds_what_is_more_probable_than_anything_near() -> None:
    features, costs, _ = observations(3, 40)
    generator = np.random.default_rng(3)
    scores = 0.8 * costs + 0.5 * features @ np.array([1, -1, 0.5, 0, 0.3]) + 0.1 * generator.standard_normal(40)
    found = fit(features, costs, scores)
    assert found.noise == pytest.approx(0.1, rel=0.6) and found.weight == pytest.approx(0.8, rel=0.5)
    # No change of a tenth in one of them is more probable, by likelihood and prior.
    logs = np.log(astuple(found)) + 0.1 * np.concatenate([np.zeros((1, 5)), np.eye(5), -np.eye(5)])
    likelihoods = log_likelihoods(np.exp(logs), features, costs, scores)
    probable = likelihoods - (((logs - MIDDLE) / WIDTH) ** 2).sum(1) / 2
    assert probable.max() < probable[0] + 0.02
    assert likelihoods[0] > log_likelihoods(np.exp(MIDDLE)[None], features, costs, scores)[0] + 1


def test_a_prior_that_misleads_is_unlearned() -> None:
    features, costs, _ = observations(4, 30)
    good, bad = (fit(features, costs, sign * costs + 0.1 * features[:, 0]) for sign in (1, -1))
    assert good.weight > bad.weight and bad.doubt > 2 * good.doubt
    mean, _ = posterior(bad, features, costs, -costs, np.full((2, 5), 0.5), np.array([-1.0, 1.0]))
    assert mean[0] > 0.7 and mean[1] < -0.7


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("kind", ["constant", "duplicate", "outlier"])
def test_is_finite_for_odd_scores(count: int, kind: str) -> None:
    features, costs, scores = observations(5, count)
    if kind == "constant":
        scores = np.zeros(count)
    elif kind == "duplicate":
        features, costs = np.repeat(features[:1], count, axis=0), np.repeat(costs[:1], count)
    else:
        scores[0] = 1e6
    process = fit(features, costs, scores)
    mean, variance = posterior(process, features, costs, scores, *observations(6, 50)[:2])
    assert np.isfinite(mean).all() and np.isfinite(variance).all() and (variance > 0).all()
    assert np.isfinite(expected_improvement(mean, variance, float(scores.min()))).all()
