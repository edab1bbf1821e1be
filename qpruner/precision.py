"""Precisions of weights: number format, bits and groups, and another precision for leading columns if wanted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from qpruner.errors import UserError, brief
from qpruner.ranges import MOST_UNITS

ROW = -1
"""The value of ``group`` that stands for a whole row."""


@dataclass(frozen=True)
class Precision:
    """How the weights of a quantization unit are held.

    Args:
        format: name of a number format; ``dense`` leaves the weights as they are.
        bits: bits per weight without scales, from 1 to 16.
        group: number of weights that share a scale; -1 for a whole row, None for the format's default.
        leading: leading columns of every linear of the unit that are held in another precision; each linear is then
            packed as two contiguous segments. None if all columns have the same precision.

    Raises:
        UserError: the bits are out of range, the group is empty, the format is not a name, or leading columns are
            combined with dense weights or have the same precision as the rest.
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
        """The precision of the columns after the leading ones; of all columns if none lead."""
        return replace(self, leading=None)

    def mean_bits(self, columns: int) -> float:
        """Average bits per weight over the columns of a linear, without scales.

        Args:
            columns: number of input columns of the linear.
        """
        if self.leading is None:
            return self.bits
        return self.bits + (self.leading.precision.bits - self.bits) * self.leading.columns / columns

    def of_columns(self, units: Sequence[int], width: int = 1) -> "Precision":
        """The precision of a linear after it has been narrowed to some of its columns.

        Those of the kept columns that were leading ones still lead. If none of them or only they are left, the linear
        becomes a single segment.

        Args:
            units: indices of the units whose columns stay.
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
        """Plain data for JSON; the entry ``leading`` is left out if there are no leading columns."""
        data: dict[str, Any] = {"format": self.format, "bits": self.bits, "group": self.group}
        if self.leading is not None:
            data["leading"] = {"columns": self.leading.columns, "precision": self.leading.precision.to_data()}
        return data

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Self:
        """Creates a precision from the data of `to_data`.

        Raises:
            TypeError: an entry is missing, unknown or of the wrong type.
            UserError: an entry has an impossible value.
        """
        leading = data.get("leading")
        if leading is None:
            return cls(**data)
        return cls(**{**data, "leading": Leading(**{**leading, "precision": cls(**leading.get("precision"))})})


@dataclass(frozen=True)
class Leading:
    """The leading columns of a linear that are held in another precision than the rest.

    Args:
        columns: number of leading input columns, at least 1 and fewer than any linear of the unit has.
        precision: precision of these columns, in a packed format.

    Raises:
        UserError: there are no columns, or the precision is dense or has leading columns of its own.
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
