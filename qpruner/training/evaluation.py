"""Evaluates a model: the metrics of every evaluation, and an evaluation outside a Trainer's own loops."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import Precision
from torch import Tensor
from tqdm import tqdm

from qpruner.datamodules.choices import ChoiceBatch
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.rows import Batch
from qpruner.errors import UserError
from qpruner.likelihood import token_nll
from qpruner.memory import place_
from qpruner.modes import evaluating
from qpruner.offload import passing
from qpruner.training.answers import option_log_likelihoods, tree_limit
from qpruner.training.metrics import ChoiceAccuracy, Perplexity, evaluation_results


class Measures:
    """Metrics that an evaluation of one model accumulates batch by batch: perplexity of text, accuracy of each task.

    Args:
        device: device of the batches.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.perplexity = Perplexity().to(device)
        self.accuracies: dict[str, ChoiceAccuracy] = {}
        self._tree_limit: float | None = None

    def option_log_likelihoods(self, model: Any, batch: ChoiceBatch) -> Tensor:
        """Log-likelihood of each option's continuation, in nats; -inf where there is none."""  # [B, O] float64
        if self._tree_limit is None:
            self._tree_limit = tree_limit(model)
        return option_log_likelihoods(model, batch, tree_limit=self._tree_limit)

    def add(self, model: Any, batch: Batch | ChoiceBatch) -> None:
        """Adds a batch of text rows or of questions.

        Args:
            model: causal language model, perhaps with adapters.
            batch: batch on the device of the model.
        """
        if "options" in batch:
            metric = self.accuracies.setdefault(batch["task"], ChoiceAccuracy(batch["measure"]).to(self.device))
            scores = self.option_log_likelihoods(model, batch)
            metric.update(scores, batch["lengths"], batch["gold"], batch["example"])
        else:
            nll = token_nll(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
            self.perplexity.update(nll, batch["labels"], batch["num_bytes"])

    def results(self) -> dict[str, float]:
        """Results over all ranks; see `evaluation_results`."""
        return evaluation_results(self.perplexity, self.accuracies)


@torch.no_grad()
def evaluate(
    model: Any,
    loaders: Sequence[EvaluationLoader],
    *,
    limit: int | float,
    device: torch.device,
    precision: Precision,
    title: str,
    progress: bool,
) -> dict[str, float]:
    """Perplexity and accuracy of the model on this rank's share of the rows, summed over all ranks.

    Args:
        model: causal language model, perhaps with adapters; it is moved to ``device`` and left there, in its original
            mode; each block of an offloaded model is moved there anew for every batch.
        loaders: batches of text and of choice tasks.
        limit: number of batches to read from each loader, or their share as a float; see
            ``Trainer(limit_test_batches)``.
        device: device to compute on.
        precision: precision of the Trainer, so that an evaluation computes as the fit does.
        title: title of the progress bar.
        progress: whether to show a progress bar.

    Raises:
        UserError: the limit is a share that amounts to less than one batch of a loader.
    """
    place_(model, device)
    measures = Measures(device)
    with evaluating(model), passing(model):
        for loader in loaders:
            number = num_batches(loader, limit)
            for batch in tqdm(islice(loader, number), title, number, disable=not progress, leave=False):
                with precision.forward_context():
                    measures.add(model, move_data_to_device(batch, device))
    return measures.results()


def num_batches(loader: EvaluationLoader, limit: int | float) -> int:
    """Number of batches of a loader that are read.

    Args:
        loader: loader to read.
        limit: number of batches to read, or their share as a float.

    Raises:
        UserError: the limit is a share above 0 that amounts to less than one batch.
    """
    if not isinstance(limit, float):
        return min(len(loader), limit)
    number = int(len(loader) * limit)
    if number == 0 < limit and len(loader) > 0:
        raise UserError(
            f"--trainer.limit_test_batches is {limit}, which of {len(loader)} batches is none. Give at least "
            f"{1 / len(loader):.2g}, or a number of batches."
        )
    return number
