"""A Gaussian process over plans, and the expected improvement of a further plan on those that were tried.

**Formula.** Scores y of plans with features u (widths, 0 to 1 for each of d items) and prior costs c are modelled as

    y = offset + weight c + f(u) + noise,

where f has Matern's covariance signal^2 (1 + r + r^2 / 3) exp(-r), r = sqrt(5 / d) |u - u'| / length. The offset is
normal with a wide variance and the weight normal with a mean above 0; both are integrated out, so their variances are
part of the covariance k. With K the covariance of the scores, noise included, and residuals e = y - E[weight] c,

    mean(u)     = E[weight] c + k(u, .) K^-1 e
    variance(u) = k(u, u) - k(u, .) K^-1 k(., u)
    log p(y)    = -(e K^-1 e + log det K + n log 2 pi) / 2
    improvement = (best - mean) Phi(z) + sd phi(z),   z = (best - mean) / sd.

The costs of widths are nearly additive, which the process expresses by a long length. A misleading prior is unlearned
through a weight whose mean is nearly 0 and which has a variance instead.

**Sources.** Rasmussen and Williams 2006, "Gaussian processes for machine learning": posterior and likelihood (2.25 to
2.30), a normal prior of explicit basis functions (2.7). Expected improvement: Jones, Schonlau and Welch 1998,
"Efficient global optimization". Coordinate search: Kolda, Lewis and Torczon 2003, "Optimization by direct search". A
process over log2 of the widths: QPruner (Zhou et al. 2024, arXiv 2412.11629).

**Trade-off.** A few trials say little about five hyper-parameters, so these are the most probable ones under weak
priors, which also keep K from becoming singular. With a single score they are close to the middle of the priors.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

OFFSET = 4.0  # variance, in units of the variance of the scores


@dataclass(frozen=True)
class Process:
    """Hyper-parameters for scores and costs of about mean 0 and standard deviation 1; all are above 0.

    Args:
        signal: standard deviation of f.
        length: distance over which f changes, as a fraction of the largest possible distance.
        noise: standard deviation of a score about the true value of its plan.
        weight: mean of the weight of prior costs.
        doubt: standard deviation of the weight of prior costs.
    """

    signal: float
    length: float
    noise: float
    weight: float
    doubt: float


MIDDLE = np.log(astuple(Process(signal=1.5, length=2.0, noise=0.1, weight=1.0, doubt=0.5)))
WIDTH = np.array([1.0, 0.7, 1.0, 1.0, 1.0])  # of the normal priors of the log hyper-parameters, centred at MIDDLE
BOUND = 4.0  # widths
STEPS = 12


def fit(features: Floats, costs: Floats, scores: Floats) -> Process:
    """The most probable hyper-parameters, by coordinate search with a step that halves where no move helps.

    Args:
        features: features of the plans, [plans, items].
        costs: prior costs of the plans, [plans].
        scores: scores of the plans, [plans].
    """
    directions = np.concatenate([np.eye(len(MIDDLE)), -np.eye(len(MIDDLE))])
    best, best_value, step = np.zeros(len(MIDDLE)), -math.inf, 1.0  # in widths from the middle
    for _ in range(STEPS):
        tried = np.clip(np.concatenate([best[None], best + step * directions]), -BOUND, BOUND)
        values = log_likelihoods(np.exp(MIDDLE + WIDTH * tried), features, costs, scores) - (tried**2).sum(1) / 2
        if values.max() > best_value:
            best, best_value = tried[values.argmax()], values.max()
        else:
            step /= 2
    return Process(*np.exp(MIDDLE + WIDTH * best).tolist())


def log_likelihoods(values: Floats, features: Floats, costs: Floats, scores: Floats) -> Floats:
    """Log marginal likelihoods of the scores under several processes.

    Args:
        values: hyper-parameters, as in `Process`, [processes, hyper-parameters].
        features: features of the plans, [plans, items].
        costs: prior costs of the plans, [plans].
        scores: scores of the plans, [plans].
    """  # [processes]
    count = len(scores)
    noise, weight = values[:, 2, None], values[:, 3, None]
    residuals = scores - weight * costs  # [processes, plans]
    # The last row of the Cholesky factor of K bordered by the residuals is what solving for them would give. The corner
    # is above e K^-1 e, because no eigenvalue of K is below the variance of the noise.
    bordered = np.empty((len(values), count + 1, count + 1))
    bordered[:, :count, :count] = _covariance(values, features, costs, features, costs)
    bordered[:, :count, :count] += noise[..., None] ** 2 * np.eye(count)
    bordered[:, count, :count] = bordered[:, :count, count] = residuals
    bordered[:, count, count] = 1 + (residuals**2).sum(1) / noise[:, 0] ** 2
    factors = np.linalg.cholesky(bordered)
    log_det = 2 * np.log(np.diagonal(factors, axis1=1, axis2=2)[:, :count]).sum(1)
    return -0.5 * ((factors[:, count, :count] ** 2).sum(1) + log_det + count * math.log(2 * math.pi))


def posterior(
    process: Process, features: Floats, costs: Floats, scores: Floats, others: Floats, other_costs: Floats
) -> tuple[Floats, Floats]:
    """The posterior of the scores of other plans, without noise.

    Args:
        process: hyper-parameters of the scores.
        features: features of the plans, [plans, items].
        costs: prior costs of the plans, [plans].
        scores: scores of the plans, [plans].
        others: features of the other plans, [others, items].
        other_costs: prior costs of the other plans, [others].
    """  # means and variances, [others] each
    values = np.array(astuple(process))
    among_plans = _covariance(values, features, costs, features, costs) + process.noise**2 * np.eye(len(scores))
    between = _covariance(values, features, costs, others, other_costs)  # [plans, others]
    solved = np.linalg.solve(among_plans, between)
    mean = process.weight * other_costs + (scores - process.weight * costs) @ solved
    before = process.signal**2 + (process.doubt * other_costs) ** 2 + OFFSET
    return mean, np.maximum(before - (between * solved).sum(0), 0.0)


def expected_improvement(mean: Floats, variance: Floats, best: float) -> Floats:
    """By how much scores are expected to be below the best one; a score that is not below counts as 0."""  # as mean
    sd = np.sqrt(np.maximum(variance, 1e-18))
    z = (best - mean) / sd
    below = 0.5 * np.array([math.erfc(-value / math.sqrt(2)) for value in z.tolist()])
    return np.maximum((best - mean) * below + sd * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), 0.0)


def _covariance(values: Floats, features: Floats, costs: Floats, others: Floats, other_costs: Floats) -> Floats:
    """Covariances of scores of plans and others, without noise.

    ``values`` are hyper-parameters of one or several processes, [..., hyper-parameters].
    """  # [..., plans, others]
    signal, length, _, _, doubt = np.moveaxis(values[..., None, None], -3, 0)
    squares = (features**2).sum(1)[:, None] + (others**2).sum(1) - 2 * features @ others.T
    r = np.sqrt(5 / features.shape[1] * np.maximum(squares, 0.0)) / length
    return signal**2 * (1 + r + r**2 / 3) * np.exp(-r) + doubt**2 * np.outer(costs, other_costs) + OFFSET
