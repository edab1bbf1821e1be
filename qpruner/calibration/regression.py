"""Least squares for a linear: the change of its weights that makes up for what is missing in its outputs.

With x the inputs of a linear over tokens, e what its outputs lack, and X, E all of them, the change of the weight

    D = E^T X (X^T X + r I)^-1

makes the sum of |e - D x|^2 + r |D|^2 least. Of a linear with a bias all sums are taken about the means, and the bias
changes by mean(e) - D mean(x).

Shapes: N tokens, I inputs of the linear, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from qpruner.processes import Processes

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Ridges that are tried, in units of the mean of the diagonal of X^T X."""


@dataclass(frozen=True)
class Sums:
    """What least squares needs to know of some tokens; float64. Sums over disjoint tokens add.

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
            weights: how much each token counts, [N]; above 0.
        """
        roots = weights.float().sqrt().unsqueeze(1)
        inputs, missing = inputs.float() * roots, missing.float() * roots
        self.tokens.add_(roots.square().sum(dtype=torch.float64))
        self.gram.add_(inputs.T @ inputs)
        self.cross.add_(inputs.T @ missing)
        self.inputs.add_((inputs * roots).sum(0, dtype=torch.float64))
        self.missing.add_((missing * roots).sum(0, dtype=torch.float64))
        self.squares.add_(missing.square().sum(dtype=torch.float64))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + theirs for mine, theirs in zip(self.tensors, other.tensors, strict=True)))

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
            + ((change.weight @ self.gram) * change.weight).sum()
        )
        if change.bias is not None:
            left = change.weight @ self.inputs - self.missing
            error = error + change.bias @ (2 * left + self.tokens * change.bias)
        return float(error / self.size)

    def change(self, ridge: float, *, bias: bool) -> "Change":
        """The change of the linear that these tokens ask for.

        Args:
            ridge: weight of the square of the change, in units of the mean of the diagonal of X^T X; above 0.
            bias: whether the linear has a bias, which changes, too.
        """
        gram, cross = self.gram, self.cross
        if bias:
            gram = gram - torch.outer(self.inputs, self.inputs) / self.tokens
            cross = cross - torch.outer(self.inputs, self.missing) / self.tokens
        damping = ridge * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
        damped = gram.clone()
        damped.diagonal().add_(damping)
        torch.linalg.cholesky(damped, out=damped)  # in place: these are the largest matrices of a compensation
        weight = torch.cholesky_solve(cross, damped).T
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


@dataclass(frozen=True)
class Fit:
    """The best change of a linear, and what it does.

    Args:
        change: change of the linear; None where none was better than nothing.
        ridge: ridge of the change; 0 where there is none.
        before: weighted mean square of what the outputs lacked on held-out tokens.
        after: the same, once the linear is changed by what the other tokens asked for.
    """

    change: Change | None
    ridge: float
    before: float
    after: float

    def cpu(self) -> "Fit":
        """The same in host memory, where every process can take it from."""
        change = self.change
        if change is not None:
            change = Change(change.weight.cpu(), None if change.bias is None else change.bias.cpu())
        return replace(self, change=change)


def fit(sums: Sums, held_out: Sums, *, bias: bool) -> Fit:
    """The change by the ridge that is best on held-out tokens, made from all tokens; nothing is one of the choices.

    A ridge takes a Cholesky factorization, a third of I^3 multiplications; one eigendecomposition for all of them takes
    about nine I^3, and leaves each ridge as many products besides, so that seven factorizations are the cheaper path.

    Args:
        sums: tokens that changes are made from.
        held_out: tokens that choose among them.
        bias: whether the linear has a bias, which changes, too.
    """
    before = float(held_out.squares / held_out.size)
    errors = {ridge: held_out.error(sums.change(ridge, bias=bias)) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < before:
        return Fit(None, 0.0, before, before)
    return Fit((sums + held_out).change(best, bias=bias), best, before, errors[best])
