"""A frozen language model with gates: it computes what the compressed model would, and gradients reach the gates.

Closed units give exactly zero, as in `qpruner.pruning.masks`. A linear computes with the weight of its width, unpacked
from the bank. The gradient of a gate over weights is the scalar product of the gradient of the weight, dW = dy^T x, and
the difference that the gate makes; so there is one more matrix product than in a frozen model, for all gates of a
linear together, and each width is unpacked once more.

Shapes: B rows, T tokens, I inputs, O outputs of a linear, K widths.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import Coupled, decoder_layers, unit_linears
from qpruner.joint.space import Gates, JointSpace
from qpruner.plan import UNITS
from qpruner.quantization.bank import Bank


class GatedLinear(nn.Module):
    """A frozen linear whose weight is in one of several widths, chosen by gates.

    Args:
        dense: linear of the model.
        widths: function that gives the weight [O, I] in one of the K widths, in a number format.
        num_widths: number K of widths.

    Attributes:
        mixture: share [K] of each width, 1 for one of them and 0 for the others.
        chosen: number of the width whose share is 1.
        lifted: gates [I] of the input channels that have the last width; None if there are none.
        is_dense: whether it computes with the weight of the model, while gradients still reach the gates.
        is_bypassed: whether it acts as the linear of the model, without gates.
    """

    def __init__(self, dense: nn.Linear, widths: Callable[[int, torch.dtype], Tensor], num_widths: int) -> None:
        super().__init__()
        self.dense = dense
        self.widths = widths
        self.num_widths = num_widths
        self.mixture = torch.eye(num_widths)[0]
        self.chosen = 0
        self.lifted: Tensor | None = None
        self.is_dense = False
        self.is_bypassed = False

    @property
    def in_features(self) -> int:
        return self.dense.in_features

    @property
    def out_features(self) -> int:
        return self.dense.out_features

    @property
    def weight(self) -> Tensor:
        """The weight of the model, from which other code reads the device and dtype."""
        return self.dense.weight

    @property
    def bias(self) -> Tensor | None:
        return self.dense.bias

    def forward(self, x: Tensor) -> Tensor:  # [.., I] -> [.., O]
        if self.is_bypassed:
            return nn.functional.linear(x, self.dense.weight, self.bias)
        product: Tensor = _GatedProduct.apply(x, self.mixture, self.lifted, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def present(self, chosen: int, lifted: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the linear computes with.

        Args:
            chosen: number of the width.
            lifted: gates [I] of the lifted input channels; None for none.
            dtype: number format.
        """
        if self.is_dense:
            return self.dense.weight.detach().to(dtype)
        weight = self.widths(chosen, dtype)
        if lifted is not None and chosen < self.num_widths - 1:
            weight = torch.where(lifted > 0.5, self.widths(self.num_widths - 1, dtype), weight)
        return weight


class _GatedProduct(torch.autograd.Function):
    """x W^T with the weight W that gates choose; gradients are those of W + sum_k a_k (Q_k - W), at any a.

    Lifted channels have gradients from the chosen width to the last, and none in the mixture.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixture: Tensor, lifted: Tensor | None, linear: GatedLinear) -> Tensor:
        ctx.linear, ctx.chosen = linear, linear.chosen
        ctx.save_for_backward(x, lifted)
        return nn.functional.linear(x, linear.present(ctx.chosen, lifted, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, lifted = ctx.saved_tensors
        linear: GatedLinear = ctx.linear
        present = linear.present(ctx.chosen, lifted, gradient.dtype)
        of_x = gradient @ present if ctx.needs_input_grad[0] else None
        of_mixture = of_lifted = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = gradient.flatten(0, -2).mT @ x.flatten(0, -2)  # [O, I]
            last = linear.widths(linear.num_widths - 1, of_weight.dtype)
            if ctx.needs_input_grad[2]:
                chosen = linear.widths(ctx.chosen, of_weight.dtype)
                of_lifted = (of_weight * (last - chosen)).sum(0, dtype=torch.float32)
            if ctx.needs_input_grad[1]:
                left = of_weight if lifted is None else of_weight * (1 - lifted).to(of_weight.dtype)
                others = (linear.widths(number, left.dtype) for number in range(linear.num_widths - 1))
                products = torch.stack([(left * weight).sum(dtype=torch.float32) for weight in (*others, last)])
                of_mixture = products - (left * present).sum(dtype=torch.float32)
        return of_x, of_mixture, of_lifted, None


class GatedNetwork:
    """A model with gates in it.

    Args:
        network: dense and frozen model without adapters; `remove` restores it.
        bank: bank of its linears, with all offered precisions.
        space: space of the gates.
    """

    def __init__(self, network: Any, bank: Bank, space: JointSpace) -> None:
        self.network, self.space = network, space
        self.linears: list[dict[str, list[GatedLinear]]] = []
        self._inputs: list[dict[str, _InputGate]] = []
        for layer in decoder_layers(network):  # before linears are replaced
            self._inputs.append(self._hook(layer))
        for units in unit_linears(network):
            gated = {unit: [self._put(name, bank) for name in units[unit]] for unit in UNITS}
            self.linears.append(gated)

    def _hook(self, layer: Any) -> dict[str, "_InputGate"]:
        parts = {"groups": layer.group_weights[-1], "channels": layer.channel_weights[-1]}
        gates = {kind: _InputGate(part) for kind, part in parts.items()}
        for kind, part in parts.items():
            part.linear.register_forward_pre_hook(gates[kind])
        for norm in layer.wide_norms:  # over all heads: closed ones must not count in the mean square
            of_norm = _NormGate(gates["groups"], norm.of)
            norm.norm.register_forward_pre_hook(of_norm.before)
            norm.norm.register_forward_hook(of_norm.after)
        return gates

    def _put(self, name: str, bank: Bank) -> GatedLinear:
        dense: Any = self.network.get_submodule(name)
        device = dense.weight.device
        packed = [bank.linear(name, precision).to(device) for precision in self.space.offered]
        gated = GatedLinear(dense, lambda number, dtype: _weight(packed[number], dtype), len(packed))
        for hook in dense._forward_pre_hooks.values():
            gated.register_forward_pre_hook(hook)
        self.network.set_submodule(name, gated)
        return gated

    def open(self, gates: Gates) -> None:
        """Sets the gates for the next forward passes.

        Args:
            gates: gates to apply, from 0 to 1; for missing kinds everything is kept, in the first of the precisions. In
                place of ``upgrades`` there may be ``mixture`` [L, 4, K], the share of each width.
        """
        parts = {kind: self.space.by_layer(values, kind) for kind, values in gates.items() if values.ndim == 1}
        mixture = mixture_of(gates, self.space)
        chosen = mixture.argmax(-1).tolist()  # all at once, because each transfer makes a device wait
        for number, (units, inputs) in enumerate(zip(self.linears, self._inputs, strict=True)):
            for kind, gate in inputs.items():
                gate.values = parts[kind][number] if kind in parts else None
            for place, unit in enumerate(UNITS):
                for linear in units[unit]:
                    linear.mixture, linear.chosen = mixture[number, place], chosen[number][place]
                    linear.lifted = self._lifted(gates, parts, number, unit)

    def _lifted(self, gates: Gates, parts: dict[str, tuple[Tensor, ...]], number: int, unit: str) -> Tensor | None:
        if not self.space.lifts:
            return None
        if unit == "o":
            widths = self.space.widths
            return parts["lifted_groups"][number].repeat_interleave(widths.queries_per_group * widths.head_dim)
        if unit == "down":
            return parts["lifted_channels"][number]
        return gates["lifted_hidden"][number, int(unit == "gate_up")]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Computes with the weights of the model, while all gates that are set still get their gradients."""
        for linear in self._each():
            linear.is_dense = True
        try:
            yield
        finally:
            for linear in self._each():
                linear.is_dense = False

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """The model as it was, without gates and their gradients."""
        inputs = [gate for gates in self._inputs for gate in gates.values()]
        values = [gate.values for gate in inputs]
        for gate in inputs:
            gate.values = None
        for linear in self._each():
            linear.is_bypassed = True
        try:
            yield
        finally:
            for gate, value in zip(inputs, values, strict=True):
                gate.values = value
            for linear in self._each():
                linear.is_bypassed = False

    def _each(self) -> Iterator[GatedLinear]:
        return (linear for units in self.linears for unit in units.values() for linear in unit)


def mixture_of(gates: Gates, space: JointSpace) -> Tensor:
    """The share of each width, 1 where all upgrades up to it are open and the next one is not."""  # [L, 4, K]
    if "mixture" in gates:
        return gates["mixture"]
    shape = (space.num_layers, len(UNITS), 1)
    device = next(iter(gates.values())).device
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    reached = gates["upgrades"].cumprod(-1) if "upgrades" in gates else ones[..., :0]
    return -torch.cat([ones, reached, zeros], -1).diff(dim=-1)


class _InputGate:
    """A hook that multiplies the input channels of a linear by the gates of their units."""

    def __init__(self, part: Coupled) -> None:
        self.part = part
        self.values: Tensor | None = None  # [units]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.values is None:
            return inputs
        x, *rest = inputs
        return x * self.values.repeat_interleave(self.part.width).to(x.dtype), *rest


class _NormGate:
    """Hooks that take closed heads out of a norm over all heads, as narrowing does if heads are alike."""

    def __init__(self, gate: _InputGate, part: Coupled) -> None:
        self.gate, self.part = gate, part

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.gate.values is None:
            return inputs
        return (inputs[0] * self.gate.values.repeat_interleave(self.part.width).to(inputs[0].dtype), *inputs[1:])

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.gate.values is None else output * self.gate.values.mean().sqrt().to(output.dtype)


def _weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] of a linear, packed or not, in a number format."""
    unpack = getattr(linear, "unpack", None)
    weight: Tensor = linear.weight.detach().to(dtype) if unpack is None else unpack(dtype)  # type: ignore[operator]
    return weight
