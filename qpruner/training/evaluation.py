"""Evaluates a module on a split outside of a Trainer's own loops, as the stages of a run need it."""

from collections.abc import Sequence
from itertools import islice

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import Precision
from tqdm import tqdm

from qpruner.datamodules.loader import EvaluationLoader
from qpruner.errors import UserError
from qpruner.memory import check_room
from qpruner.training.metrics import ChoiceAccuracy, Perplexity
from qpruner.training.module import LoRAFinetuner, evaluation_results


@torch.no_grad()
def evaluate(
    module: LoRAFinetuner,
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
        module: module to evaluate; it is moved to ``device`` and left there, in the mode that it was in.
        loaders: batches of text and of choice tasks.
        limit: how many batches of each loader are read, as a number or a share; see ``Trainer(limit_test_batches)``.
        device: device to compute on.
        precision: precision of the Trainer, so that an evaluation computes as the fit does.
        title: title of the progress bar.
        progress: whether to show a progress bar.

    Raises:
        UserError: the limit is a share of a loader that is less than a batch.
    """
    check_room(module.model, device)
    module.to(device)
    perplexity, accuracy = Perplexity().to(device), ChoiceAccuracy().to(device)
    was_training = module.model.training
    module.model.eval()
    try:
        for loader in loaders:
            number = num_batches(loader, limit)
            for batch in tqdm(islice(loader, number), title, number, disable=not progress, leave=False):
                with precision.forward_context():
                    module.evaluate(move_data_to_device(batch, device), perplexity, accuracy)
    finally:
        module.model.train(was_training)
    return evaluation_results(perplexity, accuracy)


def num_batches(loader: EvaluationLoader, limit: int | float) -> int:
    """How many batches of a loader are read.

    Args:
        loader: loader to read.
        limit: how many batches to read, as a number or a share.

    Raises:
        UserError: a share above 0 that is less than a batch.
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
