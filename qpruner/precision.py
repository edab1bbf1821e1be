"""How weights are held: a number format, bits and groups, and where the first columns are held otherwise."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from qpruner.errors import UserError, brief
from qpruner.ranges import MOST_UNITS

ROW = -1
"""The group of a whole row, as the field writes it."""


@dataclass(frozen=True)
class Precision:
    """How the weights of a quantization unit are held.

    Args:
        format: name of a number format; ``dense`` leaves the weights as they are.
        bits: bits of a weight, scales not counted, from 1 to 16.
        group: number of weights that share a scale; -1 for a whole row, None where the format itself says.
        leading: the first columns of every linear of the unit, where they are held in another precision; a linear is
            then packed as two contiguous segments. None where all columns are held alike.

    Raises:
        UserError: another number of bits, a group without weights, a format that is no name, or a leading segment
            beside dense weights or in the precision of the rest.
    """

    format: str
    bits: int
    group: int | None = None
    leading: "Leading | None" = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or not re.fullmatch(r"[\w-]{1,40}", self.format):
            raise UserError(f"A format is a name, not {brief(self.format)}.")
        if type(self.bits) is not int or not 1 <= self.bits <= 16:
            raise UserError(f"A weight has 1 to 16 bits, not {brief(self.bits)}.")
        group = self.group
        if group is not None and (type(group) is not int or not (group == ROW or 1 <= group <= MOST_UNITS)):
            raise UserError(f"A group holds at least 1 weight, or a whole row with {ROW}, not {brief(group)}.")
        if self.leading is None:
            return
        if not isinstance(self.leading, Leading):
            raise UserError(f"leading says how many columns are held in which precision, not {brief(self.leading)}.")
        if self.format == DENSE.format:
            raise UserError("Columns cannot be held apart from dense ones. Give the rest of them a packed format.")
        if self.leading.precision == self.rest:
            raise UserError(f"The leading columns are held as the rest is, in {self.rest}. Leave leading out.")

    def __str__(self) -> str:
        rest = f"{self.format} {self.bits}" + (f"/{'row' if self.group == ROW else self.group}" if self.group else "")
        if self.leading is None:
            return rest
        return f"{self.leading.columns} columns {self.leading.precision}, then {rest}"

    @property
    def rest(self) -> Self:
        """The precision of the columns behind the leading ones, or of all."""
        return replace(self, leading=None)

    def mean_bits(self, columns: int) -> float:
        """Bits of a weight in the mean over the columns of a linear, scales not counted.

        Args:
            columns: number of input columns of the linear.
        """
        if self.leading is None:
            return self.bits
        return self.bits + (self.leading.precision.bits - self.bits) * self.leading.columns / columns

    def of_columns(self, units: Sequence[int], width: int = 1) -> "Precision":
        """The precision of a linear that keeps only some of its columns.

        As many of them lead as were among the leading ones; a linear of which none or only leading ones are left is
        one segment.

        Args:
            units: places of the units whose columns stay.
            width: number of columns of a unit.
        """
        if self.leading is None:
            return self
        columns = sum(min(max(self.leading.columns - unit * width, 0), width) for unit in units)
        if columns == 0:
            return self.rest
        if columns == len(units) * width:
            return self.leading.precision
        return replace(self, leading=replace(self.leading, columns=columns))

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON, without a leading segment where there is none."""
        data: dict[str, Any] = {"format": self.format, "bits": self.bits, "group": self.group}
        if self.leading is not None:
            data["leading"] = {"columns": self.leading.columns, "precision": self.leading.precision.to_data()}
        return data

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_data` gave.

        Raises:
            TypeError: an entry is missing, unknown or of a wrong kind.
            UserError: an impossible entry.
        """
        leading = data.get("leading")
        if leading is None:
            return cls(**data)
        return cls(**{**data, "leading": Leading(**{**leading, "precision": cls(**leading.get("precision"))})})


@dataclass(frozen=True)
class Leading:
    """The first columns of a linear, where these are held otherwise than the rest.

    Args:
        columns: number of input columns, at least 1; fewer than any linear of the unit has.
        precision: precision of these columns, in a packed format.

    Raises:
        UserError: no columns, or a precision that is dense or has leading columns of its own.
    """

    columns: int
    precision: Precision

    def __post_init__(self) -> None:
        if type(self.columns) is not int or not 1 <= self.columns <= MOST_UNITS:
            raise UserError(f"A leading segment has at least 1 column, not {brief(self.columns)}.")
        if not isinstance(self.precision, Precision):
            raise UserError(f"A leading segment has a precision, not {brief(self.precision)}.")
        if self.precision.leading is not None:
            raise UserError("A linear has at most two segments. Leave out leading in the precision of the leading one.")
        if self.precision.format == DENSE.format:
            raise UserError("A leading segment cannot be dense. Give it a packed format, such as int8.")


DENSE = Precision("dense", 16)
