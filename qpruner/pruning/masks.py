"""Masks that make units of a model act as if they were gone, while its weights keep their shapes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpruner.anatomy import decoder_layers
from qpruner.pruning.selection import Kept


class UnitMasks:
    """Which units of a model are alive; what the others put out is exactly zero, and so are their gradients.

    A unit reaches the rest of the model through its columns of ``o`` or ``down`` alone, so that it is enough to mask
    the inputs of these two: what is masked equals what is narrowed (LoRAPrune, arXiv 2305.18403, equation 13).

    Args:
        model: with its adapters on it, on any device.
    """

    def __init__(self, model: Any) -> None:
        layers = decoder_layers(model)
        self._masked = [(layer.group_weights[-1], layer.channel_weights[-1]) for layer in layers]  # o and down
        self._handles: list[RemovableHandle] = []
        self.kept: Kept = [(list(range(layer.kv_groups)), list(range(layer.ffn_channels))) for layer in layers]

    def keep(self, kept: Kept) -> None:
        """Masks all units but some.

        Args:
            kept: [layers], places of the KV groups and FFN channels that stay alive.
        """
        self.remove()
        self.kept = kept
        for coupled, places in zip(self._masked, kept, strict=True):
            for part, alive in zip(coupled, places, strict=True):
                if len(alive) < part.num_units:
                    mask = torch.zeros(part.num_units, dtype=torch.bool)
                    mask[alive] = True
                    hook = _InputMask(mask.repeat_interleave(part.width))
                    self._handles.append(part.linear.register_forward_pre_hook(hook))

    def remove(self) -> None:
        """Gives the model its masked units back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _InputMask:
    """A hook that zeroes some input channels of a linear."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask  # [in]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        self.mask = self.mask.to(x.device)
        return x * self.mask, *rest
