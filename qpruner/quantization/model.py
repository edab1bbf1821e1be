"""Replaces dense linears of a model by packed ones."""

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
        precisions: precision of each linear, by its name in ``model``; linears that are not named, or whose precision
            is dense, are left unchanged.

    Raises:
        UserError: a name is not that of a dense linear, or no format offers a precision.
    """
    for name, linear in _dense_linears(model, precisions).items():
        model.set_submodule(name, quantize(linear, precisions[name]))


def rebuild_linears_(model: nn.Module, precisions: Mapping[str, Precision], state: Mapping[str, Tensor]) -> None:
    """Replaces dense linears by packed ones from a state dict; reads no dense weights.

    The rest of the state dict is left to ``model.load_state_dict``, for which all names then match.

    Args:
        model: model that is changed in place; its dense linears may be on the meta device.
        precisions: precision of each linear of the saved model, by name; see `quantize_linears_`.
        state: state dict of the saved model; packed linears use its tensors without copying them.

    Raises:
        UserError: as `quantize_linears_`, or the state lacks a tensor or has one of another shape.
    """
    for name, linear in _dense_linears(model, precisions).items():
        model.set_submodule(name, rebuild_linear(name, linear, precisions[name], state))


def rebuild_linear(name: str, linear: nn.Linear, precision: Precision, state: Mapping[str, Tensor]) -> PackedLinear:
    """The packed linear that a model's state dict holds under a name.

    Args:
        name: name of the linear in the model.
        linear: dense linear that it replaces, of the same shape; its weight is not read.
        precision: precision that the state was made in.
        state: state dict of the model.

    Raises:
        UserError: the state lacks a tensor, has one of another shape, or only one of state and linear has a bias.
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
    """The linears to replace, by name: instances of exactly `nn.Linear`, since packed linears are subclasses of it."""
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
