"""The cost of a plan in bytes, before it is carried out: all tensors that the folder of its model will hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qpruner.adapters.lora import is_target
from qpruner.anatomy import unit_linears, unit_shapes
from qpruner.memory import tensor_bytes
from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, Precision
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import adapter_ranks, linear_precisions
from qpruner.quantization.embedding import table_precisions
from qpruner.quantization.formats import num_bytes

ADAPTER_BYTES = 4  # adapters are float32


@dataclass(frozen=True)
class Price:
    """The cost of a plan: bytes of tensors, without the headers of files, and numbers of weights.

    Args:
        units: bytes of the quantization units, which are the linears of the decoder layers: codes, scales, weights that
            stay dense, and biases.
        rest: bytes of all other parameters: embedding and head (counted once if tied), dense or packed, and norms.
        adapters: bytes of LoRA adapters.
        weights: number of weights in the units, without biases.
        unit_weight_bytes: bytes of the weights in the units: ``units`` without the biases.
        idle_weights: number of weights in the units that a token does not pass through, because they belong to experts
            that it is not sent to.
    """

    units: int
    rest: int
    adapters: int
    weights: int
    unit_weight_bytes: int
    idle_weights: int = 0

    @property
    def total(self) -> int:
        return self.units + self.rest + self.adapters

    @property
    def average_bits(self) -> float:
        """Bits per weight in the units, including scales."""
        return 8 * self.unit_weight_bytes / self.weights

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the decoder linears per token: one for each weight that the token passes through."""
        return self.weights - self.idle_weights


def price(model: torch.nn.Module, plan: CompressionPlan, *, rank: int = 0, targets: Sequence[str] | str = ()) -> Price:
    """Computes the cost of a plan.

    Args:
        model: dense model of the plan's architecture, in the dtype in which dense parts will be stored; it is narrowed
            in place. Its weights may be on the meta device.
        plan: plan to price.
        rank: rank of the adapters in layers for which the plan sets none; 0 for no adapters.
        targets: linears that get adapters, in the form of ``target_modules`` of `LoRAConfig`.

    Raises:
        UserError: the plan does not fit the model, or no format offers one of its precisions.
    """
    apply_pruning_(model, plan)
    return price_narrowed(model, plan, rank=rank, targets=targets)


def price_narrowed(
    model: torch.nn.Module, plan: CompressionPlan, *, rank: int = 0, targets: Sequence[str] | str = ()
) -> Price:
    """As `price`, for a model that already has the widths of the plan, with linears and tables that are still dense."""
    linears: dict[str, Any] = {
        name: model.get_submodule(name) for units in unit_linears(model) for names in units.values() for name in names
    }
    ranks = adapter_ranks(model, plan)
    in_units = weight_bytes_in_units = weights = adapters = 0
    for name, precision in linear_precisions(model, plan).items():
        linear = linears[name]
        shape, dense_bytes = tuple(linear.weight.shape), linear.weight.nbytes
        stored = weight_bytes(shape, precision, linear.weight.element_size())
        weight_bytes_in_units += stored
        in_units += stored + tensor_bytes(linear) - dense_bytes
        weights += linear.weight.numel()
        if rank and is_target(name, targets):
            adapters += (ranks[name] or rank) * sum(shape) * ADAPTER_BYTES
    rest = tensor_bytes(model) - sum(map(tensor_bytes, linears.values()))
    for name, precision in table_precisions(model.config, plan.embedding, plan.head).items():
        table: Any = model.get_submodule(name).weight
        rest += weight_bytes(tuple(table.shape), precision, table.element_size()) - table.nbytes
    return Price(in_units, rest, adapters, weights, weight_bytes_in_units, _idle_weights(plan.widths))


def _idle_weights(widths: Architecture) -> int:
    idle = 0
    for number, experts in enumerate(widths.experts):
        if experts:
            shapes = unit_shapes(widths, number)
            in_all = sum(rows * columns for unit in ("gate_up", "down") for rows, columns in shapes[unit])
            idle += in_all // experts * (experts - widths.experts_per_token)
    return idle


def weight_bytes(shape: tuple[int, int], precision: Precision, dense_size: int) -> int:
    """Bytes of a weight [out, in], including its scales.

    Args:
        shape: shape [out, in] of the weight.
        precision: precision of the weight.
        dense_size: bytes per element of a weight that stays dense.
    """
    out_features, in_features = shape
    return out_features * in_features * dense_size if precision == DENSE else num_bytes(*shape, precision)


def bytes_of_rank_one(model: torch.nn.Module, widths: Architecture, number: int, targets: Sequence[str] | str) -> int:
    """Bytes of the adapters on a layer's linears if their rank is one.

    Args:
        model: model with the names of the linears.
        widths: widths of its layers.
        number: index of the layer, from 0.
        targets: linears that get adapters, in the form of ``target_modules`` of `LoRAConfig`.
    """
    names, shapes = unit_linears(model)[number], unit_shapes(widths, number)
    return ADAPTER_BYTES * sum(
        sum(shape)
        for unit in UNITS
        for name, shape in zip(names[unit], shapes[unit], strict=True)
        if is_target(name, targets)
    )


def average_bits(plan: CompressionPlan, dense_size: int) -> float:
    """Bits per weight in the units of a plan, including scales.

    Args:
        plan: compression plan; only the weights that it keeps are counted.
        dense_size: bytes per element of a weight that stays dense.
    """
    widths = plan.widths
    held = [
        (shape, layer.precision[unit])
        for number, layer in enumerate(plan.layers)
        for unit, shapes in unit_shapes(widths, number).items()
        for shape in shapes
    ]
    stored = sum(weight_bytes(shape, precision, dense_size) for shape, precision in held)
    return 8 * stored / sum(out_features * in_features for (out_features, in_features), _ in held)
