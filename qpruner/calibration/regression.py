"""Least squares for a linear: the change of its weights that makes up for what is missing in its outputs.

With x the inputs of a linear over tokens, e what its outputs lack, and X, E all of them, the change of the weight

    D = E^T X (X^T X + r I)^-1

makes the sum of |e - D x|^2 + r |D|^2 least. Of a linear with a bias all sums are taken about the means, and the bias
changes by mean(e) - D mean(x).

Shapes: N tokens, I inputs of the linear, O outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qpruner.calibration.products import add_gram_, add_products_, pieces
from qpruner.offload import Offload, Shelf
from qpruner.processes import Processes

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Ridges that are tried, in units of the mean of the diagonal of X^T X."""


@dataclass(frozen=True)
class Sums:
    """The sums over some tokens that least squares needs; float64. Sums over disjoint tokens add.

    Every sum is weighted by how much each token counts.

    Args:
        tokens: sum of the weights of the tokens, [].
        gram: X^T X, [I, I].
        cross: X^T E, [I, O].
        inputs: sum of the inputs, [I].
        missing: sum of what the outputs lack, [O].
        squares: sum of the squares of what the outputs lack, [].
    """

    tokens: Tensor
    gram: Tensor
    cross: Tensor
    inputs: Tensor
    missing: Tensor
    squares: Tensor

    @classmethod
    def none(cls, num_inputs: int, num_outputs: int, device: torch.device) -> Self:
        """The sums over no token."""
        shapes: Sequence[tuple[int, ...]] = (
            (), (num_inputs, num_inputs), (num_inputs, num_outputs), (num_inputs,), (num_outputs,), (),
        )  # fmt: skip
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.gram, self.cross, self.inputs, self.missing, self.squares

    def add_(self, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Adds tokens, whose products are taken in float32, a micro-batch at a time.

        Args:
            inputs: what the linear gets, [N, I].
            missing: what its outputs lack, [N, O].
            weights: how much each token counts, [N]; at least 0.
        """
        roots = weights.float().sqrt().unsqueeze(1)
        self.tokens.add_(roots.square().sum(dtype=torch.float64))
        add_gram_(self.gram, inputs, roots)
        add_products_(self.cross, inputs, missing, roots)
        for total, values in ((self.inputs, inputs), (self.missing, missing)):
            for channels, piece in pieces(values, roots):
                total[channels] += (piece * roots).sum(0, dtype=torch.float64)
        self.squares.add_((missing * roots).float().square().sum(dtype=torch.float64))

    def merge_(self, other: "Sums") -> None:
        """Adds the sums over other tokens."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.add_(theirs)

    @property
    def size(self) -> Tensor:
        """What a sum over tokens and outputs is divided by for a mean."""  # []
        return (self.tokens * len(self.missing)).clamp(min=torch.finfo(self.tokens.dtype).tiny)

    def over(self, processes: Processes) -> "Sums":
        """The sums over the tokens of all processes."""
        return Sums(*(processes.reduce(tensor) for tensor in self.tensors))

    def error(self, change: "Change") -> float:
        """Weighted mean square, over tokens and outputs, of what the outputs lack once the linear is changed."""
        error = (
            self.squares
            - 2 * (change.weight.T * self.cross).sum()
            + (change.weight @ self.gram).mul_(change.weight).sum()
        )
        if change.bias is not None:
            left = change.weight @ self.inputs - self.missing
            error = error + change.bias @ (2 * left + self.tokens * change.bias)
        return float(error / self.size)

    def change(self, ridge: float, *, bias: bool) -> "Change | None":
        """The least-squares change for these tokens; None where the sums are too inexact for so small a ridge.

        The sums are of products in float32. Where inputs vary far less than their means are large, what is left of the
        sums about the means is positive definite with a larger ridge alone.

        Args:
            ridge: weight of the square of the change, in units of the mean of the diagonal of X^T X; above 0.
            bias: whether the linear has a bias, which changes, too.
        """
        # The largest matrices of a compensation: column by column, as LAPACK has them, all of it is done in place.
        gram, solution = (sums.mT.clone(memory_format=torch.contiguous_format).mT for sums in (self.gram, self.cross))
        if bias:
            gram -= torch.outer(self.inputs, self.inputs).div_(self.tokens)
            solution -= torch.outer(self.inputs, self.missing).div_(self.tokens)
        gram.diagonal().add_(ridge * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        factor, _ = torch.linalg.cholesky_ex(gram, out=(gram, failed))
        if failed:
            return None
        torch.linalg.solve_triangular(factor, solution, upper=False, out=solution)
        torch.linalg.solve_triangular(factor.mT, solution, upper=True, out=solution)
        weight = solution.T
        return Change(weight, (self.missing - weight @ self.inputs) / self.tokens if bias else None)


@dataclass(frozen=True)
class Change:
    """What is added to a linear; float64.

    Args:
        weight: addition to the weight, [O, I].
        bias: addition to the bias, [O]; None for a linear without one.
    """

    weight: Tensor
    bias: Tensor | None

    def cpu(self) -> "Change":
        """The same in host memory, where every process can take it from."""
        return Change(self.weight.cpu(), None if self.bias is None else self.bias.cpu())


@dataclass(frozen=True)
class Fit:
    """What the best change of a linear does.

    Args:
        ridge: ridge of the change; 0 where no change was better than nothing.
        before: weighted mean square of what the outputs lacked on held-out tokens.
        after: the same, once the linear is changed by what the other tokens asked for.
    """

    ridge: float
    before: float
    after: float

    @property
    def changes(self) -> bool:
        """Whether there is a change."""
        return self.ridge > 0


def fit_(sums: Sums, held_out: Sums, *, bias: bool, offload: Offload | None = None) -> tuple[Change | None, Fit]:
    """The change by the ridge that is best on held-out tokens, made from all tokens; nothing is one of the choices.

    A ridge takes a Cholesky factorization, a third of I^3 multiplications; one eigendecomposition for all of them takes
    about nine I^3, and leaves each ridge as many products besides, so that seven factorizations are the cheaper path.

    Args:
        sums: tokens that changes are made from; afterwards the held-out ones are among them where there is a change.
        held_out: tokens that choose among them.
        bias: whether the linear has a bias, which changes, too.
        offload: what puts the held-out sums into files while a change is made; None to let them stay.
    """
    before = float(held_out.squares / held_out.size)
    shelf = Shelf(held_out.tensors, offload)

    def error(ridge: float) -> float:
        change = sums.change(ridge, bias=bias)
        if change is None:
            return math.inf
        with shelf.taken():
            return held_out.error(change)

    errors = {ridge: error(ridge) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < before:
        return None, Fit(0.0, before, before)
    with shelf.taken():
        sums.merge_(held_out)
    change = sums.change(best, bias=bias)
    return change, Fit(0.0, before, before) if change is None else Fit(best, before, errors[best])
