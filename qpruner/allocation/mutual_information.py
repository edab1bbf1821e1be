"""Mutual information between a real number and a prediction, estimated from samples.

**Idea.** A layer whose output tells much about what the model will predict should keep its precision (QPruner, arXiv
2412.11629). How much it tells is the mutual information of the two, in nats: 0 if they are independent, the entropy of
the prediction if the output determines it.

**Formula.** ``histogram`` cuts x into bins of equal counts, so that only the order of its values matters (and likewise
a prediction that is a real number), and replaces probabilities by fractions of samples:

    I = sum p(x, y) log(p(x, y) / (p(x) p(y))) - (K_xy - K_x - K_y + 1) / (2 N)

where K are the numbers of occupied cells. Chance alone makes the sum positive; the subtracted term is its expectation
to first order in 1 / N (Miller 1955 for entropies; Roulston 1999, Physica D 125, for mutual information).

``neighbours`` needs no cells. For classes (Ross 2014, PLoS ONE 9(2) e87357), with d_i the distance from sample i to the
k-th nearest of its own class, which has n_i samples, and m_i the number of all others within d_i,

    I = psi(N) + psi(k) - <psi(n_i)> - <psi(m_i)>.

Classes of n <= k samples use k = n - 1, and classes of one sample are left out, also from N. For real numbers (Kraskov,
Stoegbauer and Grassberger 2004, Phys. Rev. E 69, estimator 1), with d_i the distance to the k-th nearest in the larger
of |x - x'| and |y - y'|, both measured in standard deviations, and a_i and b_i the numbers of others nearer than d_i in
x and in y alone,

    I = psi(k) + psi(N) - <psi(a_i + 1) + psi(b_i + 1)>.

**Ties.** Equal values fall into one bin, so a constant carries no information; where many values are equal, fewer bins
are occupied. Neighbours need distinct values: a fixed noise of 1e-10 standard deviations separates them, which makes
equal values neighbours at random.

**Trade-off.** Estimates for independent data, which should be 0: x normal, 16 bins, k = 3, mean and standard deviation
of 50 draws before negative values become 0 (``python benchmarks/mutual_information.py``).

    y                    N    plug-in          histogram        neighbours
    100 equal classes    250  1.739 +- 0.040   1.489 +- 0.048    0.009 +- 0.061
                        1000  0.801 +- 0.017   0.486 +- 0.022    0.005 +- 0.030
                        4000  0.210 +- 0.007   0.040 +- 0.008    0.001 +- 0.011
    2000 Zipf classes    250  1.852 +- 0.082   1.727 +- 0.091    0.029 +- 0.068
                        1000  1.409 +- 0.031   1.252 +- 0.032    0.004 +- 0.034
                        4000  0.966 +- 0.016   0.805 +- 0.015    0.006 +- 0.013
    normal               250  0.530 +- 0.035   0.259 +- 0.045   -0.006 +- 0.047
                        1000  0.116 +- 0.012   0.005 +- 0.013   -0.002 +- 0.026
                        4000  0.028 +- 0.003  -0.000 +- 0.003    0.000 +- 0.011

The correction of the histogram needs several samples per cell; where most classes occur only a few times, as tokens do
in short texts, most of what it finds is chance. Neighbours are free of that bias, vary more, and leave out the rarest
classes; on real numbers they take O(N^2) time.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from qpruner.errors import UserError
from qpruner.seeds import derive_seed

STEPS = 2**50
"""Integer steps per standard deviation, to which values are rounded for the search of neighbours."""
NOISE = 2**17
"""Number of integers over which noise separates equal values: 1e-10 of a standard deviation."""
CHUNK = 256
"""Number of samples whose distances to all others are in memory at once."""


@dataclass(frozen=True)
class MutualInformationConfig:
    """How the mutual information of layers and predictions is estimated.

    Args:
        estimator: ``histogram``, fast and independent of the scale of outputs; or ``neighbours``, without bins to
            choose. See `qpruner.allocation.mutual_information`.
        bins: number of bins of a histogram, at least 2.
        neighbours: k of ``neighbours``, at least 1; larger values lower the variance of estimates and blur them more.
        summary: statistic that reduces a block's output at a position to one number: mean, L2 norm or largest element.
        prediction: the token with the highest logit (``argmax``), or the logarithm of its probability.

    Raises:
        UserError: a value outside of these ranges.
    """

    estimator: Literal["histogram", "neighbours"] = "histogram"
    bins: int = 16
    neighbours: int = 3
    summary: Literal["mean", "norm", "max"] = "mean"
    prediction: Literal["argmax", "log_probability"] = "argmax"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if choices and value not in choices:
                raise UserError(f"{field.name} is {value!r}; choose one of {', '.join(choices)}.")
        if type(self.bins) is not int or self.bins < 2:
            raise UserError(f"bins is {self.bins!r}; a histogram has a whole number of at least 2.")
        if type(self.neighbours) is not int or self.neighbours < 1:
            raise UserError(f"neighbours is {self.neighbours!r}; give a whole number of at least 1.")

    @property
    def fewest_samples(self) -> int:
        return 2 * self.bins if self.estimator == "histogram" else self.neighbours + 2

    def check_samples(self, count: int) -> None:
        """Checks that there are enough samples for an estimate.

        Raises:
            UserError: there are too few.
        """
        if count < self.fewest_samples:
            needs = f"{self.bins} bins" if self.estimator == "histogram" else f"{self.neighbours} neighbours"
            raise UserError(
                f"Mutual information with {needs} needs at least {self.fewest_samples} samples, not {count}. "
                f"Raise num_sequences or length of the calibration."
            )


@dataclass(frozen=True)
class Estimate:
    """A mutual information in nats, and its bias.

    Args:
        uncorrected: estimate before the correction, in nats.
        correction: bias that is subtracted, in nats; 0 for ``neighbours``, whose formula includes it.
    """

    uncorrected: float
    correction: float = 0.0

    @property
    def value(self) -> float:
        """The corrected estimate, at least 0, although that of a small value may fall below."""
        return max(0.0, self.uncorrected - self.correction)


def mutual_information(x: Tensor, y: Tensor, config: MutualInformationConfig) -> float:
    """The mutual information of x and y in nats, at least 0; see `estimate`."""
    return estimate(x, y, config).value


def estimate(x: Tensor, y: Tensor, config: MutualInformationConfig) -> Estimate:
    """Estimates the mutual information of x and y, independently of the order of the samples.

    Args:
        x: samples of x, [N], float and finite.
        y: samples of y, [N], classes as integers, or float and finite.
        config: how to estimate.

    Raises:
        UserError: too few samples; for ``neighbours`` only samples count whose class occurs at least twice.
    """
    assert x.ndim == 1 and x.shape == y.shape and x.is_floating_point()
    config.check_samples(len(x))
    x, y = x.double(), y.double() if y.is_floating_point() else y
    if config.estimator == "histogram":
        return _histogram(x, y, config.bins)
    if not y.is_floating_point():
        classes, sizes = _numbered(y)
        repeated = sizes[classes] > 1
        config.check_samples(int(repeated.sum()))
        x, y = x[repeated], y[repeated]
    if x.min() == x.max() or y.min() == y.max():
        return Estimate(0.0)
    order = y.argsort(stable=True)
    order = order[x[order].argsort(stable=True)]  # so that the noise does not depend on the order of the samples
    x, y = _whole(x[order], "x"), y[order]
    if y.is_floating_point():
        return Estimate(_of_numbers(x, _whole(y, "y"), config.neighbours))
    return Estimate(_of_classes(x, y, config.neighbours))


def _histogram(x: Tensor, y: Tensor, bins: int) -> Estimate:
    x = _quantile_bins(x, bins)
    y = _quantile_bins(y, bins) if y.is_floating_point() else _numbered(y)[0]
    (h_x, k_x), (h_y, k_y), (h_xy, k_xy) = (_entropy(cells) for cells in (x, y, x * (y.max() + 1) + y))
    return Estimate(h_x + h_y - h_xy, (k_xy - k_x - k_y + 1) / (2 * len(x)))


def _quantile_bins(values: Tensor, bins: int) -> Tensor:
    """The bin of each value, by its rank; equal values share the middle of their ranks."""  # [N]
    ordered = values.sort().values
    twice_rank = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return twice_rank * bins // (2 * len(values))


def _entropy(cells: Tensor) -> tuple[float, int]:
    """Entropy in nats of the fractions of samples in each cell, and the number of occupied cells."""
    share = _numbered(cells)[1].double() / len(cells)
    return float(-(share * share.log()).sum()), len(share)


def _numbered(classes: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each sample's class among those that occur, in ascending order, and the count of each class."""
    _, numbers, sizes = torch.unique(classes, return_inverse=True, return_counts=True)
    return numbers, sizes


def _whole(values: Tensor, name: str) -> Tensor:
    """Values as noisy integers, so that a sample plus its distance to a neighbour is exactly the neighbour."""
    generator = torch.Generator().manual_seed(derive_seed("mutual information", name))
    noise = torch.randint(NOISE, (len(values),), generator=generator).to(values.device)
    return ((values - values.mean()) / values.std() * STEPS).round().long() + noise  # [N], int64


def _of_classes(x: Tensor, y: Tensor, k: int) -> float:
    """Ross's estimate; each class of y occurs at least twice."""
    x, order = x.sort()
    values = x[y[order].argsort(stable=True)]  # class by class, ascending in each
    sizes = _numbered(y)[1]
    size = sizes.repeat_interleave(sizes)  # [N], as are all that follow
    end = sizes.cumsum(0).repeat_interleave(sizes)
    nearest = (size - 1).clamp(max=k)
    distance = _distance_in_run(values, end - size, end, nearest)
    others = torch.searchsorted(x, values + distance, right=True) - torch.searchsorted(x, values - distance) - 1
    return float(_psi(len(x)) + _psi(nearest) - _psi(size) - _psi(others))


def _distance_in_run(values: Tensor, start: Tensor, end: Tensor, k: Tensor) -> Tensor:
    """Distance from each value to its k-th nearest among those from start to end, where values ascend."""  # [N]
    places = torch.arange(len(values), device=values.device)
    distance = torch.full_like(values, torch.iinfo(values.dtype).max)
    for below in range(int(k.max()) + 1):  # the k nearest are adjacent in sorted order, some of them below
        low, high = places - below, places - below + k
        allowed = (low >= start) & (high < end)
        reach = torch.maximum(values - values[low.clamp(min=0)], values[high.clamp(max=len(values) - 1)] - values)
        distance = torch.minimum(distance, reach.where(allowed, distance))
    return distance


def _of_numbers(x: Tensor, y: Tensor, k: int) -> float:
    """The first estimate of Kraskov et al., in memory O(CHUNK N)."""
    near_x, near_y = torch.empty_like(x), torch.empty_like(y)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        from_x, from_y = (x[rows, None] - x).abs(), (y[rows, None] - y).abs()  # [CHUNK, N]
        distance = torch.maximum(from_x, from_y).kthvalue(k + 1, dim=1, keepdim=True).values  # itself is the first
        near_x[rows] = (from_x < distance).sum(1)  # others, and itself
        near_y[rows] = (from_y < distance).sum(1)
    return float(_psi(k) + _psi(len(x)) - _psi(near_x.clamp(min=1)) - _psi(near_y.clamp(min=1)))


def _psi(numbers: Tensor | int) -> Tensor:
    """Mean of the digamma function."""
    return torch.special.digamma(torch.as_tensor(numbers, dtype=torch.float64)).mean()
