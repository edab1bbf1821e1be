"""The loss of an optimizer step as the mean over all its tokens, whatever the micro-batches and ranks."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

TOKENS_OF_A_LOSS = 1024
"""Tokens by which the summed loss of a micro-batch is divided until their true number is known.

Any number gives the same result; one of the order of a batch keeps gradients in the range of half precision.
"""


class StepLoss:
    """Weighs every scored token of an optimizer step alike.

    The mean of the means of micro-batches, which is what a Trainer makes of their losses, gives the tokens of a
    micro-batch with few of them more weight. Here each micro-batch gives the *sum* over its tokens (`add`), and once
    the gradients of all micro-batches and ranks have come together, they are divided by the number of tokens (`end`).

    Attributes:
        factor: what the gradients of the last step were multiplied by.
    """

    factor: Tensor

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of losses and of tokens since the last step, [2] float64

    def add(self, nll: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss to go back from, for a micro-batch of this rank.

        Args:
            nll: losses of tokens, of any shape, 0 where a token is not scored.
            num_tokens: [], how many are scored.
        """  # []
        total = nll.sum()
        sums = torch.stack([total.detach().double(), num_tokens.double()])
        self._sums = sums if self._sums is None else self._sums + sums
        return total / TOKENS_OF_A_LOSS

    def end(self, trainer: Trainer, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Makes the gradients those of the mean over the step's tokens, and begins the next step.

        To be called when they are complete and unscaled, before they are clipped. The Trainer divided each loss by the
        number of micro-batches, also at the end of an epoch, where a step has fewer, and its strategy the sum over
        ranks by their number.

        Args:
            trainer: of the fit.
            parameters: whose gradients they are.

        Returns:
            The mean loss in nats; 0 when no token is scored.
        """  # []
        assert self._sums is not None
        total, num_tokens = trainer.strategy.reduce(self._sums, reduce_op="sum")
        self._sums = None
        num_tokens = num_tokens.clamp(min=1)
        self.factor = TOKENS_OF_A_LOSS * trainer.accumulate_grad_batches * trainer.world_size / num_tokens
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)
        return total / num_tokens
