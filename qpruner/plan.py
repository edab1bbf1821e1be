"""What a compressed model is made of: the number format of every linear."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """The number format of one weight.

    Args:
        format: name of the format, such as ``nf4``; ``dense`` means left alone.
        bits: bits per weight, scales apart.
        group: weights that share a scale; None for the format's own choice.
    """

    format: str
    bits: int
    group: int | None = None


DENSE = Precision("dense", 16)
