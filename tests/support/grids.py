"""Formats on grids, as small as can be: scales and minima in half precision, nothing packed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.plan import Precision
from qpruner.quantization.grid import Grid, GridStore
from qpruner.quantization.grid_search import GridSearch, Levels, search


@dataclass(frozen=True)
class HalfGrid:
    """A format that stores grids.

    Args:
        symmetric: whether the minimum is -2^(bits - 1) times the scale.
        shared: whether scales are again quantized, to eight bits of the largest.
    """

    symmetric: bool = False
    shared: bool = False

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> Grid:
        assert precision.group is not None
        scales = scales.half().float()
        if self.shared:
            step = scales.amax() / 255
            scales = (scales / step).round() * step
        minima = -(2 ** (precision.bits - 1)) * scales if self.symmetric else minima.half().float()
        return Grid(scales, minima, precision.bits, precision.group)


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, columns] in float64 that vary together: a few directions hold most of their squares."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.rand(columns, 1, generator=generator, dtype=torch.float64) ** 3
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (sizes * mixing)


def choose_grid(
    weight: Tensor, store: GridStore, precision: Precision, how: GridSearch, importance: Tensor | None = None
) -> Grid:
    """The grid that a search finds for a weight, as a format stores it."""
    return store.storable(*search(weight, Levels.of(store, precision), how, importance), precision)
