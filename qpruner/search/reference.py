"""Predictions of the dense model on some validation text, kept so that trials can measure how far they are from it."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.rows import Batch
from qpruner.files import replacing
from qpruner.likelihood import IGNORED, Head, hidden_states
from qpruner.memory import place_
from qpruner.offload import passing
from qpruner.processes import Processes

TOKENS = 2048
"""Largest number of predictions that are kept: with a vocabulary of 32,000, 125 MiB in half precision."""


@dataclass(frozen=True)
class Reference:
    """Predictions of the dense model.

    Args:
        base: hash of the dense model; None where its files were not available.
        batches: tensors of the rows of the validation split.
        log_probabilities: log-probabilities of all scored tokens of the batches, up to `TOKENS`, [tokens, V] in half
            precision.
    """

    base: str | None
    batches: tuple[Batch, ...]
    log_probabilities: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, data: TokenDataModule, processes: Processes, *, base: str | None) -> "Reference":
        """The predictions of a model on the first rows of the validation split.

        Args:
            model: the dense model of transformers; it is moved to the device and left there, see `place_`.
            data: data module that provides the rows.
            processes: processes to compute with: device and precision.
            base: hash of the model.

        Raises:
            UserError: the model does not fit on the device.
        """
        loader = data.evaluation_loaders("validation")[0]
        batches: list[Batch] = []
        predictions: list[Tensor] = []
        place_(model.eval(), processes.device)
        with passing(model):
            for batch in islice(loader, len(loader)):
                batches.append(batch)
                left = TOKENS - sum(map(len, predictions))
                predictions.append(_log_probabilities(model, batch, processes, left).half().cpu())
                if sum(map(len, predictions)) >= TOKENS:
                    break
        return cls(base, tuple(batches), torch.cat(predictions))

    @torch.no_grad()
    def kl(self, model: nn.Module, processes: Processes) -> float:
        """KL divergence of a model's predictions from these, in nats per token.

        Args:
            model: model of transformers, or of PEFT around it; it is moved to the device and left there.
            processes: processes to compute with: device and precision.
        """
        model.to(processes.device).eval()
        total, start = 0.0, 0
        for batch in self.batches:
            left = len(self.log_probabilities) - start
            predicted = _log_probabilities(model, batch, processes, left)
            expected = self.log_probabilities[start : start + len(predicted)].to(processes.device).float()
            start += len(predicted)
            total += float(F.kl_div(predicted, expected, log_target=True, reduction="sum"))
        return total / len(self.log_probabilities)

    def write(self, path: Path) -> None:
        tensors: dict[str, Any] = {
            f"{place:05d}.{name}": tensor for place, batch in enumerate(self.batches) for name, tensor in batch.items()
        }
        with replacing(path) as temporary:
            save_file(
                {**tensors, "log_probabilities": self.log_probabilities}, temporary, {"base": json.dumps(self.base)}
            )

    @classmethod
    def read(cls, path: Path) -> "Reference":
        with safe_open(path, framework="pt") as file:
            base = json.loads((file.metadata() or {}).get("base", "null"))
        tensors = load_file(path)
        log_probabilities = tensors.pop("log_probabilities")
        batches: dict[str, Any] = {}
        for key, tensor in tensors.items():
            place, _, name = key.partition(".")
            batches.setdefault(place, {})[name] = tensor
        return cls(base, tuple(batches[place] for place in sorted(batches)), log_probabilities)


def _log_probabilities(model: nn.Module, batch: Batch, processes: Processes, at_most: int) -> Tensor:
    """Log-probabilities that predict the first ``at_most`` scored tokens, [tokens, V] in float32."""
    batch = move_data_to_device(batch, processes.device)
    scored = batch["labels"][:, 1:] != IGNORED
    with processes.forward_context():
        hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])[:, :-1][scored][:at_most]
        return F.log_softmax(Head.of(model)(hidden).float(), dim=-1)
