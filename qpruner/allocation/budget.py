"""How many bytes a model may take, given in one of three ways, and how many multiply-adds a token may cost."""

import math
import re
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

from qpruner.anatomy import unit_weights
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.pricing import Price

POWERS = ("k", "M", "G", "T")
BYTES_IN: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(POWERS, 1)},
    **{f"{prefix.upper()}iB": 1024**power for power, prefix in enumerate(POWERS, 1)},
}
"""Number of bytes in each unit; units are case-insensitive."""

AMOUNT = re.compile(r"\s*(?P<number>[\d._]+(?:e\+?\d{1,2})?)\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What a model may take: bytes, given in exactly one of three ways, and additionally multiply-adds if these count.

    Args:
        bytes: bytes of everything that is stored: decoder linears, embedding, head, norms and adapters. A whole number,
            or a number with a unit: ``1.5 GB`` is 1,500,000,000 bytes and ``900 MiB`` is 900 * 1,048,576.
        average_bits: bits per weight of the decoder linears, scales included.
        share: share of the bytes that the decoder linears of the dense, unpruned model take in 16 bits. Above 1 to set
            no limit.
        multiply_adds: share, in (0, 1], of the multiply-adds that a token costs in the decoder linears of the dense,
            unpruned model. Only narrower layers save any, so it requires something that decides on the widths of
            layers.

    Raises:
        UserError: none or several of the three are given, an amount is not above 0, a unit is unknown, or a share of
            multiply-adds is above 1.
    """

    bytes: int | str | None = None
    average_bits: float | None = None
    share: float | None = None
    multiply_adds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given.pop("multiply_adds", None)
        if len(given) != 1:
            amounts = ", ".join(f"{name} {value!r}" for name, value in given.items()) or "none of them"
            raise UserError(f"A budget has one of bytes, average_bits and share, and here {amounts}. Give exactly one.")
        if self.bytes is not None:
            parse_bytes(self.bytes)
        _check("average_bits", self.average_bits, "bits per weight, scales included, such as 4.5")
        _check("share", self.share, "the share of the 16-bit bytes of the dense decoder linears, such as 0.3")
        _check("multiply_adds", self.multiply_adds, "the share of those of the dense decoder linears, such as 0.7")
        if self.multiply_adds is not None and self.multiply_adds > 1:
            raise UserError(
                f"budget.multiply_adds is {self.multiply_adds!r}; it is a share in (0, 1] of the multiply-adds of the "
                f"dense decoder linears. Give a smaller one, such as 0.7, or leave it out."
            )

    def limit(self, price: Price, plan: CompressionPlan) -> int:
        """The most bytes that the weights in the decoder's units may take, scales included and biases excluded.

        An average or a share that was read off a plan gives the bytes of that plan, however it was rounded as a float.

        Args:
            price: price of any plan with the pruned model's widths, including the adapters to come.
            plan: plan with these widths.

        Returns:
            The largest allowed `Price.unit_weight_bytes`; 0 or less if everything else takes more than the budget.
        """
        if self.bytes is not None:
            return parse_bytes(self.bytes) - (price.total - price.unit_weight_bytes)
        if self.average_bits is not None:
            return _most(self.average_bits, 8, price.weights)
        assert self.share is not None
        return _most(self.share, 1, 2 * unit_weights(plan.architecture))

    def most_multiply_adds(self, plan: CompressionPlan) -> int | None:
        """The most multiply-adds that a token may cost in the decoder linears; None if there is no limit.

        Args:
            plan: plan of the model, pruned or not.
        """
        return None if self.multiply_adds is None else _most(self.multiply_adds, 1, unit_weights(plan.architecture))

    def __str__(self) -> str:
        if self.multiply_adds is not None:
            of_bytes = replace(self, multiply_adds=None)
            return f"{of_bytes} and {100 * self.multiply_adds:.1f} % of the multiply-adds of the dense decoder linears"
        if self.bytes is not None:
            return f"{parse_bytes(self.bytes):,} bytes in all"
        if self.average_bits is not None:
            return f"{self.average_bits:g} bits per weight"
        assert self.share is not None
        return f"{100 * self.share:.1f} % of the 16-bit bytes of the dense decoder linears"


def parse_bytes(amount: int | str) -> int:
    """Number of bytes in an amount such as ``1.5 GB``, rounded down.

    Raises:
        UserError: the amount is not positive, or its unit is unknown.
    """
    units = {unit.lower(): size for unit, size in BYTES_IN.items()}
    parsed = AMOUNT.fullmatch(str(amount))
    try:
        size = math.floor(Fraction(parsed["number"]) * units[parsed["unit"].lower()]) if parsed else 0
    except (ValueError, KeyError):  # two decimal points in a number; an unknown unit
        size = 0
    if size < 1:
        raise UserError(
            f"budget.bytes is {amount!r}; it is at least 1 byte, a plain number or one followed by one of "
            f"{', '.join(filter(None, BYTES_IN))}. Write it as 7_000_000, '1.5 GB' or '900 MiB'."
        )
    return size


def _check(name: str, value: float | None, meaning: str) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"budget.{name} is {value!r}; it is a finite number above 0. Give {meaning}.")


def _most(value: float, factor: int, whole: int) -> int:
    """The largest number n with ``factor * n / whole <= value`` in floats."""
    number = math.floor(Fraction(value) * whole / factor)
    return number + (factor * (number + 1) / whole <= value)
