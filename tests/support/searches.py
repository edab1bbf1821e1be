"""A search on a tiny model and a few stories: its module, data, Trainer and the parts of it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.likelihood import IGNORED
from qpruner.search.config import SearchConfig
from qpruner.search.trainer import Search, SearchTrainer
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig
from support.fits import PRUNING

TEXT = CalibrationConfig(num_sequences=6, length=8, batch_size=2)


def finetuner(base: Path, seed: int = 3) -> LoRAFinetuner:
    return LoRAFinetuner(base=str(base), seed=seed, lora=LoRAConfig(r=2), optimizer=OptimizerConfig(lr=0.01))


def stories_of(base: Path) -> StoriesDataModule:
    return StoriesDataModule(
        tokenizer=str(base),
        max_length=24,
        num_train=24,
        num_validation=6,
        num_test=6,
        num_choices=4,
        loader=LoaderConfig(batch_size=4, eval_tokens_per_batch=96),
    )


def trainer(*callbacks: Callback, **options: Any) -> SearchTrainer:
    return SearchTrainer(
        **{
            "accelerator": "cpu",
            "max_steps": 2,
            "gradient_clip_val": 0.5,
            "accumulate_grad_batches": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def pruning() -> StructuredPruning:
    return StructuredPruning(**PRUNING)


def quantization(**tables: int) -> MixedPrecisionQuantization:
    """Each of the eight units in four or in eight bits."""
    return MixedPrecisionQuantization(
        allocation="sensitivity",
        budget=Budget(average_bits=6.2),
        deciding=DecidingConfig(granularity="unit", calibration=TEXT),
        **tables,  # type: ignore[arg-type]
    )


def search_of(base: Path, folder: Path, *callbacks: Callback, **options: Any) -> Search:
    """A search of trials of two steps.

    Args:
        base: folder of the model.
        folder: folder of the search.
        callbacks: by default those that prune and quantize.
        options: further ones of the search.
    """
    callbacks = callbacks or (pruning(), quantization())
    config = SearchConfig(**{"steps": 2, **options})
    return Search(trainer(*callbacks, default_root_dir=folder), finetuner(base), stories_of(base), config)


def predictions(model: Any, data: StoriesDataModule) -> torch.Tensor:
    """[tokens, V] log-probabilities of all tokens of the validation split but the first of each row."""
    of_batches = []
    for batch in data.evaluation_loaders("validation")[0]:
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        of_batches.append(logits[:, :-1][batch["labels"][:, 1:] != IGNORED].log_softmax(-1))
    return torch.cat(of_batches)
