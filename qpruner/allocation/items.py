"""Items, which get one width as a whole: a block, or a unit of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qpruner.anatomy import unit_linears, unit_shapes
from qpruner.errors import UserError, brief
from qpruner.plan import UNITS, Architecture, Precision
from qpruner.pricing import weight_bytes

Granularity = Literal["block", "unit"]


@dataclass(frozen=True)
class Item:
    """Units of a layer that get the same width.

    Args:
        layer: number of the layer.
        units: units of the layer that belong together, some of `UNITS`.

    Raises:
        UserError: a layer number below 0, or other units.
    """

    layer: int
    units: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.layer < 0 or not self.units or not set(self.units) <= set(UNITS):
            raise UserError(f"An item is some of {', '.join(UNITS)} of a layer from 0, not {brief(self)}.")

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.units == UNITS else f"layer {self.layer} {'+'.join(self.units)}"

    def linears(self, model: nn.Module) -> list[str]:
        """The names of the item's linears."""
        units = unit_linears(model)[self.layer]
        return [name for unit in self.units for name in units[unit]]

    def num_bytes(self, widths: Architecture, precision: Precision, dense_size: int) -> int:
        """Bytes of the item's weights in a precision, scales included; a dense weight takes ``dense_size`` bytes."""
        shapes = unit_shapes(widths, self.layer)
        return sum(weight_bytes(shape, precision, dense_size) for unit in self.units for shape in shapes[unit])


def items_of(num_layers: int, granularity: Granularity, leave_alone: Sequence[int]) -> list[Item]:
    """The items of a model, in order, without those of layers that are left alone.

    Args:
        num_layers: number of layers of the model.
        granularity: whether blocks or units get widths of their own.
        leave_alone: numbers of layers without items; negative ones count from the last.

    Raises:
        UserError: a layer that does not exist, or all layers are left alone.
    """
    if wrong := [number for number in leave_alone if not -num_layers <= number < num_layers]:
        raise UserError(
            f"deciding.leave_alone names {', '.join(map(str, wrong))}; the model has layers 0 to {num_layers - 1}."
        )
    alone = {number % num_layers for number in leave_alone}
    if len(alone) == num_layers:
        raise UserError("deciding.leave_alone names every layer, so that there are no bits to decide. Leave some out.")
    groups = (UNITS,) if granularity == "block" else tuple((unit,) for unit in UNITS)
    return [Item(layer, units) for layer in range(num_layers) if layer not in alone for units in groups]
