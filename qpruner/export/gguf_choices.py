"""The GGUF type in which each tensor of a file is written, and what that changes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from qpruner.errors import listed
from qpruner.export.gguf_names import Entry
from qpruner.export.gguf_types import BLOCK, BYTES_OF_WEIGHT, carried_type, has_wide_scales
from qpruner.export.source import Source
from qpruner.plan import DENSE


@dataclass(frozen=True)
class Choice:
    """How a tensor is written.

    Args:
        type: name of the type.
        carried: whether the codes of the model are written, rather than its weights rounded to the type.
        change: difference between file and model, in words; None for no difference.
    """

    type: str
    carried: bool = False
    change: str | None = None


def choose(entry: Entry, source: Source, *, dense: str, round_to: str, within: bool) -> Choice:
    """Chooses how a tensor of a file is written.

    Args:
        entry: tensor of the file.
        source: model that is exported.
        dense: type for weights that are dense in the plan.
        round_to: type for packed weights whose codes cannot be carried over.
        within: whether an adapter on the tensor is merged into its weights.
    """
    if len(entry.shape) == 1:
        return Choice("F32")
    packed = [source.packed(part.parameter.rpartition(".")[0]) for part in entry.parts]
    adapted = within and any(source.adapter(part.parameter) is not None for part in entry.parts)
    precision = max((DENSE if linear is None else linear.precision for linear in packed), key=lambda each: each.bits)
    if precision == DENSE:
        return Choice(dense)
    types = {None if linear is None or adapted else carried_type(linear) for linear in packed}
    blocks = entry.shape[-1] % BLOCK == 0
    if blocks and len(types) == 1 and (carried := next(iter(types))) is not None:
        change = f"{precision} is {carried} with scales of float16" if has_wide_scales(precision) else None
        return Choice(carried, True, change)
    what = f"{precision} with its adapter" if adapted else str(precision)
    if not blocks and round_to not in BYTES_OF_WEIGHT:
        return Choice(dense, False, f"{what} is {dense}, as rows of {entry.shape[-1]} are no blocks of {BLOCK}")
    return Choice(round_to, False, f"{what} is rounded to {round_to}")


def told(choices: Mapping[str, Choice]) -> list[str]:
    """Sentences that say which codes of the model a file holds unchanged, and what it holds differently."""
    carried = Counter(choice.type for choice in choices.values() if choice.carried)
    changed: dict[str, list[str]] = {}
    for name, choice in choices.items():
        if choice.change is not None:
            changed.setdefault(choice.change, []).append(name)
    return [
        *(
            f"{type_name} holds the model's own codes: {number} of {len(choices)} tensors"
            for type_name, number in carried.items()
        ),
        *(f"{change}: {listed(names)}" for change, names in changed.items()),
    ]
