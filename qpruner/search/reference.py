"""What the dense model predicts on some validation text, kept so that trials can tell how far they are from it."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import Precision
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.rows import Batch
from qpruner.files import replacing
from qpruner.likelihood import IGNORED, Head, hidden_states
from qpruner.memory import check_room
from qpruner.training.module import LoRAFinetuner

TOKENS = 2048
"""At most so many predictions are kept: with 32,000 words 128 MiB of half floats."""


@dataclass(frozen=True)
class Reference:
    """Predictions of the dense model.

    Args:
        batches: tensors of validation rows.
        log_probabilities: [tokens, V] in half precision, of all scored tokens of the batches, up to `TOKENS`.
    """

    batches: tuple[Batch, ...]
    log_probabilities: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, module: LoRAFinetuner, data: TokenDataModule, device: torch.device, precision: Precision
    ) -> "Reference":
        """What the module's model predicts, on the first batches of the validation split.

        Raises:
            UserError: the model has no room on the device.
        """
        loader = data.evaluation_loaders("validation")[0]
        batches: list[Batch] = []
        found: list[Tensor] = []
        check_room(module.model, device)
        module.to(device).eval()
        for batch in islice(loader, len(loader)):
            batches.append(batch)
            with precision.forward_context():
                left = TOKENS - sum(map(len, found))
                found.append(_scored(module, move_data_to_device(batch, device), left).half().cpu())
            if sum(map(len, found)) >= TOKENS:
                break
        return cls(tuple(batches), torch.cat(found))

    @torch.no_grad()
    def kl(self, module: LoRAFinetuner, device: torch.device, precision: Precision) -> float:
        """KL of a model's predictions to these, in nats per token."""
        module.to(device).eval()
        total, start = 0.0, 0
        for batch in self.batches:
            with precision.forward_context():
                left = len(self.log_probabilities) - start
                found = _scored(module, move_data_to_device(batch, device), left)
            expected = self.log_probabilities[start : start + len(found)].to(device).float()
            start += len(found)
            total += float(F.kl_div(found, expected, log_target=True, reduction="sum"))
        return total / len(self.log_probabilities)

    def write(self, path: Path) -> None:
        tensors: dict[str, Any] = {
            f"{place:05d}.{name}": tensor for place, batch in enumerate(self.batches) for name, tensor in batch.items()
        }
        with replacing(path) as temporary:
            save_file({**tensors, "log_probabilities": self.log_probabilities}, temporary)

    @classmethod
    def read(cls, path: Path) -> "Reference":
        tensors = load_file(path)
        log_probabilities = tensors.pop("log_probabilities")
        batches: dict[str, Any] = {}
        for key, tensor in tensors.items():
            place, _, name = key.partition(".")
            batches.setdefault(place, {})[name] = tensor
        return cls(tuple(batches[place] for place in sorted(batches)), log_probabilities)


def _scored(module: LoRAFinetuner, batch: Batch, at_most: int) -> Tensor:
    """Log-probabilities of the predictions of scored tokens, of the first ``at_most``; [tokens, V] in float32."""
    scored = batch["labels"][:, 1:] != IGNORED
    hidden = hidden_states(module.model, batch["input_ids"], batch["attention_mask"])[:, :-1][scored][:at_most]
    return F.log_softmax(Head.of(module.model)(hidden).float(), dim=-1)
