"""The weight of a packed linear as others see it, PEFT above all: read and written like that of any linear.

Reading it costs nothing as long as only shape, dtype and device are asked for; values are unpacked. Writing to it makes
the linear dense. PEFT writes when it merges adapters, and then there is no other way: packed again, the sum would be
rounded again, which costs more than the adapters gave.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from qpruner.errors import UserError


class Unpackable(Protocol):
    """A linear that is packed, or was."""

    @property
    def weight(self) -> Tensor:
        """A parameter once the linear is dense."""

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""

    def become_dense_(self, weight: Tensor) -> nn.Linear:
        """Makes the linear, the very object, a dense one that holds a weight."""


class PackedWeight(Tensor):
    """A tensor without storage, in the place of a weight that is unpacked when its values are asked for."""

    linear: Unpackable

    @classmethod
    def of(cls, linear: Unpackable, shape: tuple[int, int], like: Tensor) -> Self:
        """The weight of a linear, with the dtype and device of another tensor."""
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        weight.linear = linear
        return weight

    @property
    def data(self) -> Tensor:
        """What the linear holds: unpacked, or by now dense."""
        held = self.linear.weight
        return held.data if isinstance(held, nn.Parameter) else WatchedWeight.of(self.linear, self.dtype)

    @data.setter
    def data(self, weight: Tensor) -> None:
        self.data.copy_(weight)

    def data_ptr(self) -> int:
        """An address by which two linears are told apart, or known to be one."""
        return id(self.linear)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in WITHOUT_VALUES and getattr(func, "__self__", None) not in VIEWS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, lambda weight: weight.data, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod  # torch declares it without the class
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert not func._schema.is_mutable, func  # it would be lost; but only getters, such as ``T``, come by here
        args, kwargs = tree_map_only(cls, lambda weight: _plain(weight.data), (args, kwargs or {}))
        return func(*args, **kwargs)


class WatchedWeight(Tensor):
    """An unpacked weight, or a part of it, that a packed linear takes over when it is written to."""

    linear: Unpackable
    whole: Tensor

    @classmethod
    def of(cls, linear: Unpackable, dtype: torch.dtype) -> Self:
        return cls._part(linear.unpack(dtype), linear, None)

    @classmethod
    def _part(cls, part: Tensor, linear: Unpackable, whole: Tensor | None) -> Self:
        weight = part.as_subclass(cls)
        weight.linear, weight.whole = linear, part if whole is None else whole
        return weight

    def _take_over(self) -> None:
        """Makes the linear hold what was written.

        Raises:
            UserError: it holds another weight by now, as when the weight was read twice and both were written to.
        """
        held = self.linear.weight
        if not isinstance(held, nn.Parameter):
            self.linear.become_dense_(self.whole)
        elif _storage(held) != _storage(self.whole):
            raise UserError(
                "A packed weight was read, and written to after its linear had become dense; that would be lost. Read "
                "`weight.data` anew before each change, or make a dense copy of a run's model with `qpruner merge`."
            )

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, weight: Tensor) -> None:
        self.copy_(weight)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func.__name__ == "requires_grad_" and (args + (True,))[1]:
            refuse_training()
        with torch._C.DisableTorchFunctionSubclass():
            plain_args, plain_named = tree_map_only(cls, _plain, (args, named))
            result = func(*plain_args, **plain_named)
            for written in tree_leaves([*_written(func.__name__, args, named)]):
                if isinstance(written, cls):
                    written._take_over()
            given = {_storage(tensor): tensor for tensor in tree_leaves((args, named)) if isinstance(tensor, cls)}

            def watched(part: Tensor) -> Tensor:  # what shares the memory of the weight stands for it
                source = given.get(_storage(part))
                return part if source is None else cls._part(part, source.linear, source.whole)

            return tree_map_only(Tensor, watched, result)


class Frozen(nn.Parameter):
    """A parameter that never trains."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Self:
        return super().__new__(cls, data, requires_grad)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            refuse_training()
        return self


def refuse_training() -> None:
    """Says that codes cannot be trained.

    Raises:
        UserError: always.
    """
    raise UserError(
        "A packed weight cannot be trained: its codes are integers. Train adapters on it, or leave it dense in the "
        "plan; `qpruner merge` makes a dense copy of a run's model, in which every weight can be trained."
    )


WITHOUT_VALUES = (
    *("__get__", "size", "stride", "dim", "numel", "nelement", "element_size"),
    *("is_floating_point", "is_complex", "is_contiguous", "get_device", "__len__"),
)
"""Functions of tensors that ask for no value; getters that do come by the dispatcher."""
VIEWS = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.real)
"""Getters of what shares the memory of the weight, and so may be written to."""
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "div")
IN_PLACE = ("__setitem__", *(f"__i{operator}__" for operator in OPERATORS))


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What a function of tensors writes to, by the conventions of torch."""
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        yield from args[:1] or [*kwargs.values()][:1]  # `torch.nn.init` names its tensor
    yield kwargs.get("out")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _storage(tensor: Tensor) -> int | None:
    return None if tensor.is_meta else tensor.untyped_storage().data_ptr()
