"""Perplexity and choice accuracy, exact under padding and over any number of ranks.

Shapes: B rows, T tokens.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from qpruner.likelihood import IGNORED


class Perplexity(Metric):
    """Perplexity per token, mean loss and bits per byte over everything that it was shown.

    Sums are float64 and counts are integers, so that neither the number of tokens, nor padding, nor the way rows are
    dealt to batches and ranks changes the result.

    Computes a dict: ``tokens`` (scored) and, where there are any, ``loss`` (nats per scored token), ``perplexity`` (its
    exponential) and, where the bytes of the text are known, ``bits_per_byte``.
    """

    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, labels: Tensor, num_bytes: Tensor) -> None:
        """Adds a batch.

        Args:
            nll: negative log-likelihoods, [B, T - 1], from `qpruner.likelihood.token_nll`.
            labels: labels of the rows, [B, T].
            num_bytes: bytes of text in the scored tokens of each row, [B].
        """
        self.nll += nll.double().sum()
        self.tokens += (labels[:, 1:] != IGNORED).sum()
        self.num_bytes += num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        results = {"tokens": self.tokens}
        if self.tokens > 0:
            loss = self.nll / self.tokens
            results |= {"loss": loss, "perplexity": loss.exp()}
            if self.num_bytes > 0:
                results["bits_per_byte"] = self.nll / math.log(2) / self.num_bytes
        return results


class ChoiceAccuracy(Metric):
    """Share of examples whose right option has the highest log-likelihood per scored token.

    Computes a dict: ``examples`` and, where there are any, ``accuracy`` in [0, 1]. It is nan where the likelihoods of
    an example say nothing: one of them is nan, or all options are impossible.
    """

    higher_is_better = True
    full_state_update = False
    correct: Tensor
    broken: Tensor
    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("broken", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("examples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, labels: Tensor, example: Tensor, option: Tensor, gold: Tensor) -> None:
        """Adds a batch that holds all options of its examples.

        Args:
            nll: negative log-likelihoods, [B, T - 1], from `qpruner.likelihood.token_nll`.
            labels: labels of the rows, [B, T], scored on the tokens of the option only.
            example: number of the example that a row is an option of, [B]; negative rows do not count.
            option: number of the option that a row is, [B].
            gold: number of the right option of the row's example, [B].
        """
        real = example >= 0
        chosen = choose(nll[real], labels[real], example[real])
        self.broken += (~nll[real][chosen].isfinite().all(1)).sum()
        self.correct += (option[real][chosen] == gold[real][chosen]).sum()
        self.examples += len(chosen)

    def compute(self) -> dict[str, Tensor]:
        results = {"examples": self.examples}
        if self.examples > 0:
            results["accuracy"] = torch.where(self.broken > 0, math.nan, self.correct / self.examples)
        return results


def choose(nll: Tensor, labels: Tensor, example: Tensor) -> Tensor:
    """The row of the likeliest option of each example: lowest mean of ``nll`` over its scored tokens, or one of nan.

    Args:
        nll: negative log-likelihoods, [B, T - 1].
        labels: labels of the rows, [B, T].
        example: number of the example that a row is an option of, [B].
    """  # [examples] row numbers, in order of the example numbers
    scores = nll.double().sum(1) / (labels[:, 1:] != IGNORED).sum(1)
    rows = [(example == number).nonzero().flatten() for number in torch.unique(example)]
    return torch.stack([row[scores[row].argmin()] for row in rows]) if rows else example.new_empty(0)
