"""The linear that holds a packed weight while qpruner trains, evaluates or changes a model."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qpruner.modeling_compressed import CODE_BOOKS, CompressedLinear, group_of, values
from qpruner.plan import Precision
from qpruner.quantization.blockwise4 import multiply_blocks, unpack_blocks
from qpruner.quantization.uniform_unpacking import unpack_uniform
from qpruner.quantization.weight import Frozen, PackedWeight


class PackedLinear(CompressedLinear):
    """A `CompressedLinear` with faster kernels, whose ``weight`` is unpacked only when its values are needed.

    It multiplies with exactly the weight that its codes and scales encode, in training and in evaluation. Four-bit
    floats are unpacked by the kernels of bitsandbytes, which on CUDA also multiply; uniform weights are unpacked on
    CUDA by a Triton kernel.

    Its state dict holds the tensors of ``packed``, in the layout that the format documents, and ``bias``, so that a
    model with packed linears is saved and loaded like any other. Other libraries, such as PEFT, see an ordinary linear:
    they can read its ``weight``, and writing to that makes the linear dense; see `PackedWeight`.

    Args:
        state: codes and scales by name, used without copying them.
        out_features: rows of the weight.
        in_features: columns of the weight.
        precision: precision that the state was made in.
        bias: bias [out], or None.
        dtype: dtype of ``weight``, also once the linear is dense; follows ``to``.
    """

    like: Frozen
    parameter: ClassVar[type[nn.Parameter]] = Frozen

    def __init__(
        self,
        state: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        precision: Precision,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
    ) -> None:
        # Transformers takes a model's dtype from its first floating-point parameter, which in a packed embedding would
        # be the scales, so an empty parameter of the right dtype comes before them.
        device = next(iter(state.values())).device
        state = {"like": torch.empty(0, dtype=dtype, device=device), **state}
        super().__init__(state, out_features, in_features, precision.to_data(), bias, dtype)

    @property
    def precision(self) -> Precision:
        """The precision of the weight."""
        return Precision.of_data(self.entry)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return self._read(dtype)

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        return self._read(dtype, places)

    def _read(self, dtype: torch.dtype, places: Tensor | None = None) -> Tensor:
        shape = self.out_features, self.in_features
        return values(self.packed(), *shape, self.entry, dtype, places, unpack_blocks, unpack_uniform)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        name = self.entry["format"].removesuffix("-double")
        if not x.is_cuda or name not in CODE_BOOKS or "leading" in self.entry:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return multiply_blocks(x, bias, self.packed(), self.out_features, name, group_of(self.entry))

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked only when its values are needed."""
        return PackedWeight.of(self, (self.out_features, self.in_features), self.like)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        if not (isinstance(weight, PackedWeight) and weight.linear is self):
            self.become_dense_(weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.precision}"

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
                given.dtype != tensor.dtype and name in self.names
            ):  # casts would alter codes
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
