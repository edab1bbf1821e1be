"""Packed linears in the place of the dense ones of a model."""

from collections.abc import Mapping

from torch import Tensor, nn

from qpruner.errors import UserError, nearest
from qpruner.plan import DENSE, Precision
from qpruner.quantization.formats import format_for, quantize, rebuild
from qpruner.quantization.packed import PackedLinear


def quantize_linears_(model: nn.Module, precisions: Mapping[str, Precision]) -> None:
    """Replaces linears by packed ones, one at a time; all precisions are checked before the first.

    Args:
        model: model that is changed in place.
        precisions: precision by name of the linear in ``model``; linears that are not named, or dense, stay as they
            are.

    Raises:
        UserError: a name is not that of a dense linear, or no format offers a precision.
    """
    for name, linear in _dense_linears(model, precisions).items():
        model.set_submodule(name, quantize(linear, precisions[name]))


def rebuild_linears_(model: nn.Module, precisions: Mapping[str, Precision], state: Mapping[str, Tensor]) -> None:
    """Puts packed linears from a state dict in the place of dense ones, whose weights are not read.

    The rest of the state dict is for ``model.load_state_dict``, which then finds the names that it saved.

    Args:
        model: model that is changed in place; its dense linears may be on the meta device.
        precisions: precisions with which ``quantize_linears_`` made the model that was saved.
        state: state dict of that model; packed linears take its tensors over without a copy.

    Raises:
        UserError: as `quantize_linears_`, or the state lacks a tensor or has one of another shape.
    """
    for name, linear in _dense_linears(model, precisions).items():
        model.set_submodule(name, rebuild_linear(name, linear, precisions[name], state))


def rebuild_linear(name: str, linear: nn.Linear, precision: Precision, state: Mapping[str, Tensor]) -> PackedLinear:
    """The packed linear that a model's state dict holds under a name, in place of a dense one of that shape.

    Raises:
        UserError: the state lacks a tensor or has one of another shape, or a bias that the dense linear has not.
    """
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
    if (linear.bias is not None) != ("bias" in parts):
        raise UserError(
            f"{name} {'lacks the' if linear.bias is not None else 'has a'} bias in the file, unlike in the model. "
            "The file belongs to another model; give the one that it was saved from."
        )
    try:
        shape, dtype = (linear.out_features, linear.in_features), linear.weight.dtype
        packed = rebuild(parts, *shape, precision=precision, bias=parts.get("bias"), dtype=dtype)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return packed.train(linear.training)


def _dense_linears(model: nn.Module, precisions: Mapping[str, Precision]) -> dict[str, nn.Linear]:
    """The linears to replace, by name; exactly `nn.Linear`, since packed ones are subclasses of it."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name: precision for name, precision in precisions.items() if precision.format != DENSE.format}
    for name, precision in chosen.items():
        format_for(precision)
        if name not in linears:
            raise UserError(
                f"{name!r} is not the name of a dense linear of {type(model).__name__}.{nearest(name, linears)} "
                f"It has {len(linears)} of them; give names from its `named_modules`."
            )
    return {name: linears[name] for name in chosen}
