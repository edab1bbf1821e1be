"""Masks that make units of a model act as if they were removed, while its weights keep their shapes."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpruner.anatomy import Coupled, decoder_layers
from qpruner.pruning.selection import Kept
from qpruner.pruning.surgery import norm_scale


class UnitMasks:
    """Which units of a model are alive; the outputs of all others are exactly zero, and so are their gradients.

    A unit reaches the rest of the model only through its columns of ``o`` or ``down``, so it is enough to mask the
    inputs of these two: the masked model equals the narrowed one (LoRAPrune, arXiv 2305.18403, equation 13). Where a
    norm runs over all heads (OLMo2), a KV group also counts in that norm's mean square; the inputs of the norm are
    therefore masked, too, and its outputs are scaled as narrowing scales them. An expert without any alive channel
    receives no tokens; they are routed to the best of the others.

    Args:
        model: model with its adapters attached, on any device.
    """

    def __init__(self, model: Any) -> None:
        layers = decoder_layers(model)
        self._layers = layers
        self._norms = [layer.wide_norms for layer in layers]
        self._handles: list[RemovableHandle] = []
        self.kept: Kept = [(list(range(layer.kv_groups)), list(range(layer.ffn_channels))) for layer in layers]

    def keep(self, kept: Kept) -> None:
        """Masks all units except those given.

        Args:
            kept: [layers], indices of the KV groups and FFN channels that stay alive.
        """
        self.remove()
        self.kept = kept
        for layer, norms, places in zip(self._layers, self._norms, kept, strict=True):
            groups, channels = places
            by_ffn = layer.channels_by_ffn(channels)
            o, *downs = layer.outputs
            masked = [(o, groups), *((down, by_ffn.get(number, ())) for number, down in enumerate(downs))]
            for part, alive in masked:
                if len(alive) < part.num_units:
                    self._handles.append(part.linear.register_forward_pre_hook(_InputMask.of(part, alive)))
            if layer.router is not None and len(by_ffn) < layer.experts:
                self._handles.append(layer.router.register_forward_hook(_OtherExperts(list(by_ffn))))
            for norm in norms:
                if len(groups := places[0]) < norm.of.num_units:
                    share = len(groups) / norm.of.num_units  # of the channels: the mean still runs over all
                    scale = norm_scale(norm, groups) * share**0.5
                    self._handles.append(norm.norm.register_forward_pre_hook(_InputMask.of(norm.of, groups)))
                    self._handles.append(norm.norm.register_forward_hook(_OutputScale(float(scale))))

    def remove(self) -> None:
        """Removes all masks, so that every unit works again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _InputMask:
    """A hook that zeroes some input channels of a linear."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask  # [in]

    @classmethod
    def of(cls, part: Coupled, alive: Sequence[int]) -> Self:
        """A mask that lets only the channels of some units of a projection pass."""
        mask = torch.zeros(part.num_units, dtype=torch.bool)
        mask[list(alive)] = True
        return cls(mask.repeat_interleave(part.width))

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = inputs
        self.mask = self.mask.to(x.device)
        return x * self.mask, *rest


class _OtherExperts:
    """A hook that makes a router send tokens only to some experts, as a router without the rows of the others would.

    Args:
        alive: indices of the experts that tokens may be sent to.
    """

    def __init__(self, alive: Sequence[int]) -> None:
        self.alive = torch.tensor(alive)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> tuple[Tensor, ...]:
        alive = self.alive = self.alive.to(inputs[0].device)
        narrow = copy(module)
        narrow._parameters = {
            name: nn.Parameter(entries[alive], requires_grad=False)
            for name, entries in module.named_parameters(recurse=False)
        }
        logits, weights, places = narrow.forward(*inputs)
        return logits, weights, alive[places]


class _OutputScale:
    """A hook that multiplies the output of a module by a scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.scale
