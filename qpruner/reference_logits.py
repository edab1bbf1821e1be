"""Logits of a compressed model from when it was written, stored beside it to verify loaded copies."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qpruner.errors import UserError
from qpruner.folder_manifest import COPY_AGAIN, REFERENCE
from qpruner.modes import evaluating
from qpruner.offload import passing
from qpruner.tensor_files import load_tensors

FILE = f"{REFERENCE}/logits.safetensors"
PROMPTS, LENGTH = 2, 16
MOST, MOST_OF_HALVES = 0.05, 0.3
"""Largest difference that is taken for rounding, in standard deviations of the logits, in float32 and in 16 bits.

Devices and kernels differ: 0.1 between two kernels of attention on 30 layers of bfloat16.
"""


def record_logits(folder: Path, model: Any) -> None:
    """Writes the logits behind a few prompts, float32 [prompts, vocabulary], with the prompts' tokens, [prompts, 16].

    The prompts are tokens drawn at random, the same ones for every vocabulary of a size.

    Args:
        folder: folder of the compressed model, or of its adapters.
        model: causal language model, on the device that it was made on; it is left in the mode that it was in.
    """
    tokens = torch.randint(model.config.vocab_size, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    path = folder / FILE
    path.parent.mkdir(exist_ok=True)
    save_file({"tokens": tokens, "logits": last_logits(model, tokens)}, path)


def deviation(folder: Path, model: Any) -> float | None:
    """Largest difference from what was recorded, in standard deviations of the logits; None where nothing was.

    Raises:
        UserError: the file is damaged, or of another model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    recorded = load_tensors(path)
    if recorded.keys() != {"tokens", "logits"}:
        raise UserError(f"{str(path)!r} holds no recorded logits. {COPY_AGAIN}")
    actual, expected = last_logits(model, recorded["tokens"]), recorded["logits"]
    if actual.shape != expected.shape:
        raise UserError(f"{str(path)!r} is of a model with {expected.shape[-1]} tokens. {COPY_AGAIN}")
    return float((actual - expected).abs().max() / expected.std().clamp(min=torch.finfo().tiny))


def says_the_same(difference: float, dtype: torch.dtype) -> bool:
    """Whether a `deviation` is no more than rounding; one that is no number is more."""
    return difference <= (MOST if dtype == torch.float32 else MOST_OF_HALVES)


@torch.inference_mode()
def last_logits(model: Any, tokens: Tensor) -> Tensor:
    """The logits behind the last token of each row of tokens; float32 [rows, vocabulary], on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model), passing(model):
        logits: Tensor = model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].float().cpu().contiguous()
