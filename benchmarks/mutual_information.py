"""Bias of the estimates of mutual information: what independent data are found to share, against the sample count.

python benchmarks/mutual_information.py
"""

import argparse
from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import Tensor

from qpruner.allocation.mutual_information import MutualInformationConfig, estimate
from qpruner.records.tables import markdown_table


def uniform(count: int) -> Tensor:
    return torch.randint(100, (count,))


def zipf(count: int) -> Tensor:
    """2000 classes as uneven as the words of a text."""
    return torch.multinomial(1 / torch.arange(1.0, 2001), count, replacement=True)


PREDICTIONS: dict[str, Callable[[int], Tensor]] = {
    "100 equal classes": uniform,
    "2000 Zipf classes": zipf,
    "normal": torch.randn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--draws", type=int, default=50)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        [name, str(count), *(f"{mean(values):.3f} ± {stdev(values):.3f}" for values in columns(draw, count, given))]
        for name, draw in PREDICTIONS.items()
        for count in given.samples
    ]
    print(markdown_table(["y", "N", "plug-in", "histogram", "neighbours"], rows))


def columns(draw: Callable[[int], Tensor], count: int, given: argparse.Namespace) -> tuple[list[float], ...]:
    histogram, neighbours = MutualInformationConfig("histogram"), MutualInformationConfig("neighbours")
    of_estimators: tuple[list[float], ...] = [], [], []
    for _ in range(given.draws):
        x, y = torch.randn(count), draw(count)
        binned = estimate(x, y, histogram)
        values = binned.uncorrected, binned.uncorrected - binned.correction, estimate(x, y, neighbours).uncorrected
        for column, value in zip(of_estimators, values, strict=True):
            column.append(value)
    return of_estimators


if __name__ == "__main__":
    main()
