"""Builds plans from the key of a trial: how many units stay, and which choice each item has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qpruner.allocation.decision import with_choices
from qpruner.allocation.items import Item
from qpruner.files import replacing
from qpruner.plan import CompressionPlan, Precision
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import Kept, keep_highest
from qpruner.search.ledger import Key
from qpruner.search.ranks import Ranks
from qpruner.search.structure import Kind, Structure


@dataclass(frozen=True)
class Ranking:
    """Which units a part keeps when it keeps only some: those with the highest scores, which are computed once.

    Args:
        parts: layer and kind of the units of each part.
        scores: [layers], scores of all units.
        start: plan whose units are kept in every part that keeps as many units as the plan does; None for none.
    """

    parts: tuple[tuple[int, Kind], ...]
    scores: Sequence[LayerScores]
    start: CompressionPlan | None = None

    def kept(self, counts: Sequence[int]) -> Kept:
        """The units that stay when each part keeps so many, lowest index first; units outside all parts stay."""
        whole = [(len(layer.kv_groups), len(layer.ffn_channels)) for layer in self.scores]
        numbers = {(number, kind): count for (number, kind), count in zip(self.parts, counts, strict=True)}
        widths = [
            (numbers.get((number, "kv_groups"), groups), numbers.get((number, "ffn_channels"), channels))
            for number, (groups, channels) in enumerate(whole)
        ]
        kept = keep_highest(self.scores, widths)
        if self.start is None:
            return kept
        layers = zip(kept, self.start.layers, strict=True)
        return [
            (_with_as_many(groups, layer.kv_groups), _with_as_many(channels, layer.ffn_channels))
            for (groups, channels), layer in layers
        ]


def _with_as_many(units: list[int], others: Sequence[int]) -> list[int]:
    """The others if there are as many of them, else the units."""
    return sorted(others) if len(others) == len(units) else units


@dataclass(frozen=True)
class Candidates:
    """The candidate plans of a search.

    Args:
        base: plan of the model that trials start from, with the precisions of its tables.
        items: items that get bits.
        precisions: precision that each choice of an item stands for.
        ranking: which units stay, where widths are searched; None where they are not.
        ranks: ranks that adapters may have, where these are searched; None where they are not.
    """

    base: CompressionPlan
    items: tuple[Item, ...]
    precisions: tuple[Precision, ...]
    ranking: Ranking | None = None
    ranks: Ranks | None = None

    def plan(self, key: Key) -> CompressionPlan:
        """The plan with a key's ``choices``, with its ``units`` where widths are searched, and with its ``ranks``."""
        plan = self.base if self.ranking is None else self.base.keeping(self.ranking.kept(key["units"]))
        plan = plan if self.ranks is None else self.ranks.carried_out(plan, key["ranks"])
        return with_choices(plan, self.items, [self.precisions[choice] for choice in key["choices"]])

    def row(self, plan: CompressionPlan, structure: Structure) -> list[int]:
        """The row of a plan: its numbers of units, bits and ranks, each replaced by the nearest one in the search.

        Args:
            plan: plan for the model that the base was made from.
            structure: how wide layers may be.
        """
        row = []
        for part in structure.parts:
            units = len(getattr(plan.layers[part.layer], part.kind))
            row.append(min(range(len(part.counts)), key=lambda place: abs(part.counts[place] - units)))
        for item in self.items:
            bits = [plan.layers[item.layer].precision[unit].bits for unit in item.units]
            mean = sum(bits) / len(bits)
            row.append(min(range(len(self.precisions)), key=lambda place: abs(self.precisions[place].bits - mean)))
        return row if self.ranks is None else [*row, *self.ranks.nearest(plan)]


def write_scores(path: Path, scores: Sequence[LayerScores], made_from: str) -> None:
    """Writes scores to a file.

    Args:
        path: path of the file.
        scores: [layers], scores of all units.
        made_from: hash of everything that the scores were made from.
    """
    tensors = {
        f"{number:05d}.{kind}": getattr(layer, kind)
        for number, layer in enumerate(scores)
        for kind in ("kv_groups", "ffn_channels")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"made_from": made_from})


def read_scores(path: Path, made_from: str) -> list[LayerScores] | None:
    """The scores in a file; None where it does not exist, is damaged, or holds other scores.

    Args:
        path: path of the file.
        made_from: hash of everything that the scores have to be made from.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_from") != made_from:
                return None
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError):
        return None
    layers = dict.fromkeys(name.partition(".")[0] for name in names)
    return [LayerScores(tensors[f"{layer}.kv_groups"], tensors[f"{layer}.ffn_channels"]) for layer in layers]
