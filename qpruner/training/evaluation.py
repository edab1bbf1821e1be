"""Evaluates a module on a split outside of a Trainer's own loops, as the stages of a run need it."""

from collections.abc import Iterable

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import Precision
from tqdm import tqdm

from qpruner.datamodules.rows import Batch
from qpruner.training.metrics import ChoiceAccuracy, Perplexity
from qpruner.training.module import LoRAFinetuner, evaluation_results


@torch.no_grad()
def evaluate(
    module: LoRAFinetuner,
    loaders: Iterable[Iterable[Batch]],
    *,
    device: torch.device,
    precision: Precision,
    title: str,
    progress: bool,
) -> dict[str, float]:
    """Perplexity and accuracy of the model on this rank's share of the rows, summed over all ranks.

    Args:
        module: it is moved to ``device`` and left there, in the mode that it was in.
        loaders: batches of text and of choice tasks.
        device: where to compute.
        precision: the Trainer's, so that an evaluation computes as the fit does.
        title: of the progress bar.
        progress: whether to show one.
    """
    module.to(device)
    perplexity, accuracy = Perplexity().to(device), ChoiceAccuracy().to(device)
    was_training = module.model.training
    module.model.eval()
    try:
        for loader in loaders:
            for batch in tqdm(loader, desc=title, disable=not progress, leave=False):
                with precision.forward_context():
                    module.evaluate(move_data_to_device(batch, device), perplexity, accuracy)
    finally:
        module.model.train(was_training)
    return evaluation_results(perplexity, accuracy)
