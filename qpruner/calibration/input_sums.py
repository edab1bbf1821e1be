"""The statistics of a linear's inputs that calibrated rounding needs: sums over tokens of their products.

A token may count differently for different rows of the weight, as when the loss at the end of the model depends more on
some outputs than on others (GuidedQuant, Kim et al. 2025); rows then come in groups, each with sums of its own.

Shapes: N tokens, G groups of rows, I inputs of the linear.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qpruner.calibration.products import add_gram_, add_products_
from qpruner.processes import Processes


@dataclass(frozen=True)
class InputSums:
    """Sums over tokens of products of a linear's inputs; float64. Sums over disjoint tokens add.

    With x the inputs that the linear gets and z those that it gets in the dense model, each token weighted:

    Args:
        hessian: X^T X, [G, I, I].
        cross: Z^T X, [G, I, I]; None where it is not wanted.
        dense: Z^T Z, [G, I, I]; None where it is not wanted.
    """

    hessian: Tensor
    cross: Tensor | None
    dense: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.hessian, self.cross, self.dense) if tensor is not None)

    @classmethod
    def none(cls, num_groups: int, num_inputs: int, device: torch.device, *, cross: bool, dense: bool) -> Self:
        """The sums over no token; ``cross`` and ``dense`` say whether these are wanted."""

        def zeros() -> Tensor:
            return torch.zeros(num_groups, num_inputs, num_inputs, dtype=torch.float64, device=device)

        return cls(zeros(), zeros() if cross else None, zeros() if dense else None)

    def add_(self, inputs: Tensor, dense_inputs: Tensor | None, weights: Tensor) -> None:
        """Adds tokens, whose products are taken in float32, a micro-batch at a time.

        Args:
            inputs: what the linear gets, [N, I].
            dense_inputs: what it gets in the dense model, [N, I]; None where that does not matter.
            weights: how much each token counts for each group of rows, [N, G]; at least 0.
        """
        for group, roots in enumerate(torch.split(weights.float().sqrt(), 1, 1)):
            add_gram_(self.hessian[group], inputs, roots)
            if dense_inputs is None:
                continue
            if self.cross is not None:
                add_products_(self.cross[group], dense_inputs, inputs, roots)
            if self.dense is not None:
                add_gram_(self.dense[group], dense_inputs, roots)

    def over(self, processes: Processes) -> "InputSums":
        """The sums over the tokens of all processes."""
        hessian, cross, dense = (
            None if tensor is None else processes.reduce(tensor) for tensor in (self.hessian, self.cross, self.dense)
        )
        assert hessian is not None
        return InputSums(hessian, cross, dense)
