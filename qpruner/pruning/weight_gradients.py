"""The gradients of the weights below adapters, summed over the backward passes of a step of training.

They are what `lora_guided` approximates, and what it does without: one float32 tensor of the shape of each weight.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpruner.adapters.lora import adapter_on
from qpruner.anatomy import decoder_layers
from qpruner.pruning.calibration import weight_gradient


class WeightGradients:
    """Collects dL/dW of every projection with an adapter, without W requiring a gradient; W may be packed.

    With dropout in the adapters the gradient is that of W, which sees the inputs as they are.

    Args:
        model: below PEFT.
    """

    def __init__(self, model: Any) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            linear.register_forward_hook(self._on_forward)
            for layer in decoder_layers(model)
            for linear in layer.linears.values()
            if adapter_on(linear) is not None
        ]

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[nn.Module, Tensor]:
        """The gradients [out, in] summed since they were last taken, by linear.

        Args:
            reduce: takes their mean over all processes.
        """
        sums, self._sums = self._sums, {}
        return {linear: reduce(total) for linear, total in sums.items()}

    def remove(self) -> None:
        """Stops collecting."""
        for handle in self._handles:
            handle.remove()

    def _on_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # not in evaluation, nor in the first of two passes of gradient checkpointing
            output.register_hook(partial(self._add, module, inputs[0].detach()))  # type: ignore[no-untyped-call]

    def _add(self, module: nn.Module, inputs: Tensor, at_output: Tensor) -> None:
        gradient, _ = weight_gradient(at_output, inputs, False)
        if module in self._sums:
            self._sums[module] += gradient
        else:
            self._sums[module] = gradient
