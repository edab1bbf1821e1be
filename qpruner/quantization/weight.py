"""The ``weight`` of a packed linear, which other libraries, above all PEFT, can read and write like any weight.

Its shape, dtype and device are known at no cost; its values are unpacked when they are needed. Writing to it makes the
linear dense. PEFT writes to it to merge adapters, and only a dense linear can hold the result: packing the sum would
round it a second time, which costs more than the adapters gain.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from qpruner.errors import UserError


class Unpackable(Protocol):
    """A linear that is packed, or was packed and has become dense."""

    @property
    def weight(self) -> Tensor:
        """The weight; a parameter if the linear has become dense."""

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a dtype."""

    def become_dense_(self, weight: Tensor) -> nn.Linear:
        """Turns this object into a dense linear with a given weight."""


class PackedWeight(Tensor):
    """A tensor without storage that stands for a packed weight, which is unpacked when its values are needed."""

    linear: Unpackable

    @classmethod
    def of(cls, linear: Unpackable, shape: tuple[int, int], like: Tensor) -> Self:
        """The weight of a linear, with the dtype and device of another tensor."""
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        weight.linear = linear
        return weight

    @property
    def data(self) -> Tensor:
        """The unpacked weight, or the data of the dense weight if the linear has become dense."""
        held = self.linear.weight
        return held.data if isinstance(held, nn.Parameter) else WatchedWeight.of(self.linear, self.dtype)

    @data.setter
    def data(self, weight: Tensor) -> None:
        self.data.copy_(weight)

    def data_ptr(self) -> int:
        """The identity of the linear, by which PEFT recognises whether two weights are the same."""
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
        assert not func._schema.is_mutable, func  # a write would be lost, but only getters, such as ``T``, get here
        args, kwargs = tree_map_only(cls, lambda weight: _plain(weight.data), (args, kwargs or {}))
        return func(*args, **kwargs)


class WatchedWeight(Tensor):
    """An unpacked weight, or a part of one; when it is written to, its linear becomes dense with this weight."""

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
        """Makes the linear dense with the weight that was written to.

        Raises:
            UserError: the linear has become dense with another weight, as happens if its weight is read twice and both
                results are written to.
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

            def watched(part: Tensor) -> Tensor:  # a view of the weight is watched as well
                source = given.get(_storage(part))
                return part if source is None else cls._part(part, source.linear, source.whole)

            return tree_map_only(Tensor, watched, result)


class Frozen(nn.Parameter):
    """A parameter that cannot be set to require gradients."""

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
    """Raises the error that codes cannot be trained.

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
"""Tensor functions that need no values. Getters (``__get__``) that do need them reach ``__torch_dispatch__``."""
VIEWS = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.real)
"""Getters that return a view of the weight, which may be written to."""
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "div")
IN_PLACE = ("__setitem__", *(f"__i{operator}__" for operator in OPERATORS))


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that a tensor function writes to, by the naming conventions of torch."""
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        yield from args[:1] or [*kwargs.values()][:1]  # `torch.nn.init` names its tensor
    yield kwargs.get("out")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _storage(tensor: Tensor) -> int | None:
    return None if tensor.is_meta else tensor.untyped_storage().data_ptr()
