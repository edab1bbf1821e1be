"""The gradients of the weights below adapters, summed over the backward passes of a step of training.

These gradients are what `lora_guided` approximates and so avoids storing: one float32 tensor of the shape of each
weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpruner.adapters.lora import adapter_on
from qpruner.anatomy import decoder_layers
from qpruner.calibration.gradients import weight_gradient


class WeightGradients:
    """Collects dL/dW of every projection with an adapter, without W requiring a gradient; W may be packed.

    With dropout in the adapters, the gradient is that of W, which sees the inputs without dropout.

    Args:
        model: model below PEFT.
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
            reduce: averages a gradient over all processes.
        """
        sums, self._sums = self._sums, {}
        return {linear: reduce(total) for linear, total in sums.items()}

    def remove(self) -> None:
        """Stops collecting, and drops what was collected."""
        for handle in self._handles:
            handle.remove()
        self._sums.clear()

    def _on_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not output.requires_grad:  # in evaluation
            return None
        watched: Tensor = _Watched.apply(output, inputs[0].detach(), module, self._add)  # type: ignore[no-untyped-call]
        return watched

    def _add(self, module: nn.Module, inputs: Tensor, at_output: Tensor) -> None:
        gradient, _ = weight_gradient(at_output, inputs, False)
        if module in self._sums:
            self._sums[module] += gradient
        else:
            self._sums[module] = gradient


class _Watched(torch.autograd.Function):
    """Passes the output of a linear through; reports its gradient together with the inputs it was computed from.

    The inputs are saved through autograd, so that gradient checkpointing drops and recomputes them with all others.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, module: nn.Module, tell: Callable[[nn.Module, Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.module, ctx.tell = module, tell
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, at_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.tell(ctx.module, *ctx.saved_tensors, at_output)
        return at_output, None, None, None
