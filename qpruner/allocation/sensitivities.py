"""The sensitivities of a model as data: what was measured, on what, and the costs that follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log2
from typing import Any, Literal

from qpruner.allocation.items import Item
from qpruner.errors import UserError
from qpruner.plan import DENSE, Precision
from qpruner.schema import Record

Measure = Literal["kl", "loss", "first_order"]


@dataclass(frozen=True)
class Rises:
    """Costs of quantizing one item alone to each precision, in nats per token.

    Args:
        item: item that is quantized.
        kl: KL divergence to the model without quantization, with the item in each precision.
        loss: rise of the loss, with the item in each precision.
        first_order: rise of the loss to first order, with the item in each precision.
    """

    item: Item
    kl: tuple[float, ...]
    loss: tuple[float, ...]
    first_order: tuple[float, ...]


@dataclass(frozen=True)
class Marginals:
    """Costs of changing one item from the widest precision to another, with the others at random precisions, in nats
    per token; see `qpruner.allocation.marginal`.

    Args:
        item: item that is quantized.
        kl: rise of the KL divergence from the model without quantization, with the item in each precision.
        loss: rise of the loss, with the item in each precision.
        kl_error: standard error of each of ``kl``.
        loss_error: standard error of each of ``loss``.
    """

    item: Item
    kl: tuple[float, ...]
    loss: tuple[float, ...]
    kl_error: tuple[float, ...]
    loss_error: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivities(Record):
    """Measurements of a pruned model; JSON in ``sensitivities.json``.

    Args:
        made_from: plain data that identify what the sensitivities were measured on: if they are equal, nothing needs to
            be measured again.
        mutual_information: mutual information of each layer's output and the prediction, in nats; None where it was not
            requested.
        precisions: precisions that ``rises`` are of, without dense; or those that ``marginals`` are of, narrowest
            first.
        rises: rises of each item alone; None where they were not requested.
        marginals: rises of each item among others; None where they were not requested.

    Raises:
        UserError: neither information nor rises, or a number of rises of an item that is not that of precisions.
    """

    remedy = "Delete the file, and continue the run: it finds them anew."

    made_from: dict[str, Any]
    mutual_information: tuple[float, ...] | None = None
    precisions: tuple[Precision, ...] = ()
    rises: tuple[Rises, ...] | None = None
    marginals: tuple[Marginals, ...] | None = None

    def __post_init__(self) -> None:
        if self.mutual_information is None and self.rises is None and self.marginals is None:
            raise UserError("There is neither mutual information nor a rise of anything.")
        for rises in self.rises or ():
            if {len(rises.kl), len(rises.loss), len(rises.first_order)} != {len(self.precisions)}:
                raise UserError(f"The rises of {rises.item} are not those in {len(self.precisions)} precisions.")
        for among in self.marginals or ():
            values = among.kl, among.loss, among.kl_error, among.loss_error
            if {len(value) for value in values} != {len(self.precisions)}:
                raise UserError(f"The rises of {among.item} are not those in {len(self.precisions)} precisions.")

    def costs(
        self, items: Sequence[Item], order: Sequence[Precision], measure: Measure | Literal["mutual_information"]
    ) -> list[tuple[float, ...]]:
        """The cost of holding each item in each precision; lower is better.

        For mutual information it is ``-I log2(bits)``, with which an upgrade saves QPruner's ``I log2(b' / b)``; a unit
        has the information of its layer. A measured rise counts at least as much as that of a wider precision: where
        more bits seem worse, that is noise.

        Args:
            items: items to price.
            order: precisions to price, fewest bytes first.
            measure: measure that is used as the cost.
        """
        if measure == "mutual_information":
            assert self.mutual_information is not None
            return [
                tuple(-self.mutual_information[item.layer] * log2(precision.bits) for precision in order)
                for item in items
            ]
        measured = self.marginals or self.rises
        assert measured is not None
        rises_of = {rises.item: getattr(rises, measure) for rises in measured}
        costs = []
        for item in items:
            rise = {DENSE: 0.0} | dict(zip(self.precisions, rises_of[item], strict=True))
            widest_first = accumulate((rise[precision] for precision in reversed(order)), max)
            costs.append(tuple(widest_first)[::-1])
        return costs
