"""The linear that every format makes: frozen, its weight held as codes and scales."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.plan import Precision


class PackedLinear(nn.Module):
    """A frozen linear ``x W^T + b`` that computes in the dtype of ``x``; W is held in a packed number format.

    It multiplies with exactly the weight that its codes and scales mean, in training and in evaluation.

    Its state dict holds the tensors of ``packed``, in the layout that the format documents, and ``bias``, so that a
    model with packed linears is saved and loaded as any other. Subclasses have the back end's own linear as a second
    base, by which PEFT chooses its LoRA layers.
    """

    in_features: int
    out_features: int
    precision: Precision
    bias: nn.Parameter | None

    def packed(self) -> dict[str, Tensor]:
        """Codes and scales by name: the module's own storage, not copies."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded once from float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = _UnpackedProduct.apply(x, bias, self.unpack)  # type: ignore[no-untyped-call]
        return product

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
        for name, own in stored.items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif given.shape != own.shape or (given.dtype != own.dtype and name != "bias"):  # a cast would alter codes
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype} {list(given.shape)}, but {self.precision} of "
                    f"{self.out_features} x {self.in_features} weights needs {own.dtype} {list(own.shape)}."
                )
            else:
                with torch.no_grad():
                    own.copy_(given)
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in stored)

    def _stored(self) -> dict[str, Tensor]:
        return self.packed() if self.bias is None else {**self.packed(), "bias": self.bias}


class _UnpackedProduct(torch.autograd.Function):
    """A linear whose weight is unpacked again for the backward pass rather than kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, unpack: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.unpack = unpack
        return nn.functional.linear(x, unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ ctx.unpack(gradient.dtype), of_bias, None
