"""Adapters that add the same number to all weights of a group in a row, and so fold into its minimum: QA-LoRA.

The weights of a group are scale * code + minimum, so a number that is added to all of them can be added to the minimum
instead. The factor A of such an adapter has equal columns within each group, so that it depends only on the sum of the
group's inputs: A x = A' pool(x). After folding, the model is packed as before, in as many bytes and without adapters.
No weight is requantized; only the minima are rounded to float16, as always.

Source: Xu et al., QA-LoRA, 2023 (arXiv:2309.14717), section 3.3, which pools by means; with sums, A is smaller by a
factor of the group size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpruner.adapters.lora import Adapter, adapters_of, detach_adapters
from qpruner.errors import UserError
from qpruner.modeling_compressed import group_of
from qpruner.plan import DENSE, Precision
from qpruner.quantization.grid import groups_of_columns
from qpruner.quantization.packed import PackedLinear

FORMAT = "affine"
"""The number format whose minima are free and stored in float16."""


def check_poolable(name: str, precision: Precision) -> None:
    """Makes sure that an adapter on a linear in a precision can be folded into its minima.

    Raises:
        UserError: the linear is dense, its format does not store free minima, or it has leading columns.
    """
    if precision == DENSE:
        raise UserError(
            f"{name} is dense, and pooled adapters are folded into minima of packed weights. Quantize it, leave it out "
            f"of --model.lora.target_modules, or leave --model.lora.pooled out."
        )
    if precision.format != FORMAT or precision.leading is not None:
        raise UserError(
            f"{name} is held in {precision}, and pooled adapters can be folded into minima of the format {FORMAT!r} "
            f"alone. Give all bits of linears with adapters that format, as in formats: "
            f"{{{precision.bits}: {FORMAT}}}, or leave --model.lora.pooled out."
        )


def pool_(model: Any) -> None:
    """Makes the factors A of a PEFT model equal within groups, in place, and keeps them equal during training.

    Every column becomes the first column of its group. Gradients are averaged over each group, so that an optimizer
    which treats all parameters alike moves the columns of a group together.

    Args:
        model: PEFT model whose adapters are on packed linears, and either add nothing yet (B is 0) or are pooled
            already.

    Raises:
        UserError: an adapter is on a linear that is not packed in `FORMAT`, or pooling would change what it adds.
    """
    for adapter, linear in _adapters(model):
        groups = _groups(linear)
        if adapter.lora_B.any() and not _is_pooled(adapter, groups):
            raise UserError(
                "The adapters of this base give something and were not trained with --model.lora.pooled. Leave that "
                "out, or begin anew with --restart."
            )
        with torch.no_grad():
            adapter.lora_A.copy_(adapter.lora_A[:, _first_of(groups)].index_select(1, groups))
        adapter.lora_A.register_hook(partial(_means_within, groups))  # type: ignore[no-untyped-call]


def check_foldable(model: Any) -> None:
    """Makes sure that the adapters of a model can be folded into minima.

    Raises:
        UserError: the model has no adapters, or has one on a linear that is not packed in `FORMAT`, or one whose factor
            A is not equal within groups.
    """
    if not hasattr(model, "peft_config"):
        raise UserError("This model has no adapters to fold into its packed weights. Leave --packed out.")
    for name, adapter in adapters_of(model).items():
        base = adapter.base
        if not (isinstance(base, PackedLinear) and base.precision.format == FORMAT and base.precision.leading is None):
            held = base.precision if isinstance(base, PackedLinear) else DENSE
            raise UserError(
                f"{name} is held in {held}, and adapters can be folded into minima of the format {FORMAT!r} alone. "
                f"Merge them into a dense copy: leave --packed out."
            )
        if not _is_pooled(adapter, _groups(base)):
            raise UserError(
                "The adapters were not trained with --model.lora.pooled, so they cannot be folded into the minima of "
                "packed weights. Merge them into a dense copy: leave --packed out."
            )


def fold_(model: Any) -> Any:
    """Adds the adapters of a PEFT model to the minima of its packed linears, in place, and returns the base.

    Args:
        model: PEFT model whose adapters were pooled by `pool_`.

    Raises:
        UserError: as `check_foldable`.
    """
    check_foldable(model)
    for adapter, linear in _adapters(model):
        per_group = adapter.lora_A.detach().float()[:, _first_of(_groups(linear))]
        minima = linear.get_parameter("minima")
        added = adapter.scale * (adapter.lora_B.detach().float() @ per_group)  # [out, m]
        minima.data.copy_((minima.data.float() + added).half())
    return detach_adapters(model)[0]


def _adapters(model: Any) -> list[tuple[Adapter, PackedLinear]]:
    adapters = []
    for name, adapter in adapters_of(model).items():
        base = adapter.base
        check_poolable(name, base.precision if isinstance(base, PackedLinear) else DENSE)
        assert isinstance(base, PackedLinear)
        adapters.append((adapter, base))
    return adapters


def _is_pooled(adapter: Adapter, groups: Tensor) -> bool:
    """Whether the factor A is equal within groups, up to the rounding of an optimizer."""
    lora_A = adapter.lora_A.detach().float()
    return torch.allclose(lora_A[:, _first_of(groups)].index_select(1, groups), lora_A, rtol=1e-3, atol=1e-6)


def _groups(linear: PackedLinear) -> Tensor:
    """The index of the group of each column of a packed linear, [in]."""
    # Not the plan's group, which may be left open: then the format has its default.
    return groups_of_columns(0, linear.in_features, group_of(linear.entry), linear.get_parameter("minima").device)


def _first_of(groups: Tensor) -> Tensor:
    """The first column of each group, [m]."""
    new = torch.ones_like(groups, dtype=torch.bool)
    new[1:] = groups[1:] != groups[:-1]
    return new.nonzero().squeeze(1)


def _means_within(groups: Tensor, gradient: Tensor) -> Tensor:
    """A gradient [r, in] averaged over the columns of each group, [r, in]."""
    groups = groups.to(gradient.device)
    sums = gradient.new_zeros(len(gradient), int(groups[-1]) + 1).index_add_(1, groups, gradient)
    return (sums / groups.bincount()).index_select(1, groups)
