"""Perplexity and choice accuracy, exact under padding and over any number of ranks.

Shapes: B rows, T tokens, O options of a question.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from qpruner.datamodules.questions import Measure
from qpruner.likelihood import IGNORED


class Perplexity(Metric):
    """Perplexity per token, mean loss and bits per byte over everything that it was given.

    Sums are float64 and counts are integers, so that neither the number of tokens, nor padding, nor the way rows are
    distributed over batches and ranks changes the result.

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
    """Shares of questions whose correct option is the most likely, by log-likelihood and by log-likelihood per
    character.

    Computes a dict: ``examples`` and, where there are any, ``acc`` and ``acc_norm`` in [0, 1], ``accuracy``, which is
    the one of them that the task is reported by, and ``error``, its standard error as lm-evaluation-harness computes
    it: the square root of p (1 - p) / (examples - 1). All are nan where the likelihoods of a question are unusable: one
    of them is nan, or all options have probability 0.

    Args:
        measure: measure by which the task is reported.
    """

    higher_is_better = True
    full_state_update = False
    likeliest: Tensor
    likeliest_by_length: Tensor
    broken: Tensor
    examples: Tensor

    def __init__(self, measure: Measure = "acc") -> None:
        super().__init__()
        self.measure = measure
        for name in ("likeliest", "likeliest_by_length", "broken", "examples"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_likelihoods: Tensor, lengths: Tensor, gold: Tensor, example: Tensor) -> None:
        """Adds a batch.

        Args:
            log_likelihoods: log-likelihood of each option, -inf where there is none, [B, O].
            lengths: characters of each option, [B, O].
            gold: index of the correct option, [B].
            example: number of each question, [B]; rows with a negative number do not count.
        """
        real = example >= 0
        if not real.any():
            return
        scores, lengths, gold = log_likelihoods[real], lengths[real].clamp(min=1), gold[real]
        self.broken += (scores.isnan().any(1) | (scores == -math.inf).all(1)).sum()
        self.likeliest += (scores.argmax(1) == gold).sum()
        self.likeliest_by_length += ((scores / lengths).argmax(1) == gold).sum()
        self.examples += len(gold)

    def compute(self) -> dict[str, Tensor]:
        results = {"examples": self.examples}
        if self.examples > 0:
            for name, right in (("acc", self.likeliest), ("acc_norm", self.likeliest_by_length)):
                results[name] = torch.where(self.broken > 0, math.nan, right.double() / self.examples)
            share = results[self.measure]
            results |= {"accuracy": share, "error": (share * (1 - share) / (self.examples - 1)).sqrt()}
        return results


def evaluation_results(perplexity: Perplexity, accuracies: Mapping[str, ChoiceAccuracy]) -> dict[str, float]:
    """Results of metrics over all ranks, leaving out what is unknown; nan and inf are kept as measured.

    Args:
        perplexity: metric of the text.
        accuracies: metric of each task.

    Returns:
        The values of `Perplexity`; for each task those of `ChoiceAccuracy` as ``TASK/acc`` and so on; the number of
        ``examples`` in all tasks, and the mean of their ``accuracy``, with its standard error as ``accuracy_error``.
    """
    results: dict[str, float] = {}
    if perplexity.update_called:
        results |= {name: float(value) for name, value in perplexity.compute().items()}
    tasks = {task: {name: float(v) for name, v in metric.compute().items()} for task, metric in accuracies.items()}
    for task, values in tasks.items():
        results |= {f"{task}/{name}": value for name, value in values.items()}
    if measured := [values for values in tasks.values() if "accuracy" in values]:
        results["examples"] = sum(values["examples"] for values in measured)
        results["accuracy"] = sum(values["accuracy"] for values in measured) / len(measured)
        results["accuracy_error"] = math.hypot(*(values["error"] for values in measured)) / len(measured)
    return results
