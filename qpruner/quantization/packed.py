"""The linear that every format makes: frozen, its weight held as codes and scales."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from qpruner.modeling_compressed import UnpackedProduct
from qpruner.plan import Precision
from qpruner.quantization.weight import Frozen, PackedWeight


class Unpacking(Protocol):
    """What a linear asks of its number format."""

    def unpack(
        self,
        state: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        precision: Precision,
        dtype: torch.dtype,
    ) -> Tensor:
        """The weight [out, in] of a state, rounded once from float32."""


class PackedLinear(nn.Linear):
    """A frozen linear ``x W^T + b`` that computes in the dtype of ``x``; W is held in a packed number format.

    It multiplies with exactly the weight that its codes and scales mean, in training and in evaluation.

    Its state dict holds the tensors of ``packed``, in the layout that the format documents, and ``bias``, so that a
    model with packed linears is saved and loaded as any other. To others, such as PEFT, it is a linear as any other,
    too: its ``weight`` can be read, and once it is written to the linear is dense; see `PackedWeight`.

    Args:
        state: codes and scales by name, taken over without a copy.
        out_features: rows of the weight.
        in_features: columns of the weight.
        precision: precision that the state was made in.
        bias: bias [out], or None.
        dtype: dtype of the weight when others see it, or when the linear becomes dense; follows ``to``.
        number_format: number format of the state.
    """

    precision: Precision

    def __init__(
        self,
        state: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        precision: Precision,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        number_format: Unpacking,
    ) -> None:
        nn.Module.__init__(self)  # that of `nn.Linear` makes a weight
        self.in_features, self.out_features = in_features, out_features
        self.precision, self.number_format = precision, number_format
        # An empty parameter has the dtype, so that casts of the model reach it. Transformers takes the dtype of a model
        # from its first parameter of floats, which in a packed embedding would be the scales.
        device = next(iter(state.values())).device
        self.like = Frozen(torch.empty(0, dtype=dtype, device=device))
        self._packed = tuple(state)
        # No buffers: those DDP would send around at every step.
        for name, tensor in state.items():
            self.register_parameter(name, Frozen(tensor))
        self.register_parameter("bias", bias)

    def packed(self) -> dict[str, Tensor]:
        """Codes and scales by name: the module's own storage, not copies."""
        return {name: self.get_parameter(name).data for name in self._packed}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded once from float32."""
        return self.number_format.unpack(self.packed(), self.out_features, self.in_features, self.precision, dtype)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = UnpackedProduct.apply(x, bias, self.unpack)  # type: ignore[no-untyped-call]
        return product

    @property
    def weight(self) -> Tensor:
        """The weight as others see it."""
        return PackedWeight.of(self, (self.out_features, self.in_features), self.like)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        if not (isinstance(weight, PackedWeight) and weight.linear is self):
            self.become_dense_(weight)

    def become_dense_(self, weight: Tensor | None = None) -> nn.Linear:
        """Turns into a dense linear, the way a ``LazyLinear`` of torch turns into one.

        Args:
            weight: weight of the dense linear, [out, in], cast to the dtype of ``like``; default the one that the codes
                mean, so that only the dtype rounds.
        """
        dense = self.unpack(torch.float32) if weight is None else weight
        dense = dense.detach().to(self.like.dtype, copy=isinstance(weight, nn.Parameter))
        bias = self.bias
        for name in ("like", *self._packed, "bias"):
            delattr(self, name)
        for name in ("precision", "number_format", "_packed"):
            vars(self).pop(name, None)
        linear = cast(nn.Linear, self)
        linear.__class__ = nn.Linear
        linear.weight = nn.Parameter(dense, requires_grad=False)
        linear.register_parameter("bias", bias)
        return linear

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:  # assigned by others
            self.become_dense_(param)
        else:
            super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.precision}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():  # a cast of the model is none of the scales'
            if (moved := self.get_parameter(name)).dtype != tensor.dtype:
                self.register_parameter(name, Frozen(tensor.to(moved.device)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._stored().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = self._stored()
        for name, tensor in stored.items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif given.shape != tensor.shape or (
                given.dtype != tensor.dtype and name in self._packed
            ):  # casts alter codes
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype} {list(given.shape)}, but {self.precision} of "
                    f"{self.out_features} x {self.in_features} weights needs {tensor.dtype} {list(tensor.shape)}."
                )
            else:
                with torch.no_grad():
                    tensor.copy_(given)
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in stored)

    def _stored(self) -> dict[str, Tensor]:
        return self.packed() if self.bias is None else {**self.packed(), "bias": self.bias}
