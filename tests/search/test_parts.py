"""What structures cost, against the price of the plans that they are part of, to the byte."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.families import LAYERS, tiny_config

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import with_choices
from qpruner.allocation.items import Granularity, items_of
from qpruner.allocation.solving import Choice
from qpruner.anatomy import architecture_of, unit_weights
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton
from qpruner.plan import CompressionPlan
from qpruner.pricing import Price, price
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import SelectionConfig
from qpruner.pruning.surgery import narrow_
from qpruner.quantization.formats import precision_of
from qpruner.search.candidates import Candidates, Ranking
from qpruner.search.parts import Structures, price_of_plan
from qpruner.search.ranks import Ranks
from qpruner.search.space import SearchSpace
from qpruner.search.structure import StructureConfig

LORA = LoRAConfig(r=2)
PRECISIONS = tuple(precision_of(bits, 32, {}) for bits in (2, 4, 8))
SELECTION = SelectionConfig(scope="local", round_to=4)


class Searched:
    """A tiny model whose widths and bits are searched.

    Args:
        budget: what may be stored.
        family: family of the model.
        granularity: what gets bits of its own.
        alone: layers that stay in 16 bits.
        config: how wide layers may be.
        selection: layers that stay whole, and what FFN widths are multiples of.
        spends: whether a share of the bytes is a coordinate.
        ranks: ranks that adapters may have; none where they are not searched.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        family: str = "llama",
        granularity: Granularity = "unit",
        alone: Sequence[int] = (),
        config: StructureConfig = StructureConfig(least=0.25),  # noqa: B008
        selection: SelectionConfig = SELECTION,
        spends: bool = False,
        ranks: Sequence[int] = (),
    ) -> None:
        changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
        self.config = tiny_config(family, **changes)
        model = build_skeleton(self.config).bfloat16()
        self.budget, self.base = budget, CompressionPlan.dense(architecture_of(self.config), None)
        self.items = tuple(items_of(LAYERS, granularity, alone))
        generator = torch.Generator().manual_seed(0)
        widths = self.base.widths
        self.scores = [
            LayerScores(*(torch.rand(count, generator=generator).double() for count in counts))
            for counts in zip(widths.kv_groups, widths.ffn_channels, strict=True)
        ]
        offered = Ranks.of(ranks, model, LORA) if ranks else None
        self.structures = Structures(model, self.base, config, selection, LORA, offered)
        limit = self.structures.limit(self.items, PRECISIONS, budget)
        self.start = self.structures.start(0.2, self.scores)
        costs = np.random.default_rng(0).uniform(0.5, 1, len(self.items))
        structure = self.structures.structure(
            self.items, PRECISIONS, budget, start=self.start, scores=self.scores, price_of_all=1.0
        )
        self.space = SearchSpace(
            [
                [Choice(item.num_bytes(widths, precision, 2), cost / 2**precision.bits) for precision in PRECISIONS]
                for item, cost in zip(self.items, costs, strict=True)
            ]
            + ([] if offered is None else offered.items(1.0)),
            [[2, 4, 8]] * len(self.items) + ([] if offered is None else [offered.choices] * len(offered.layers)),
            limit,
            spends,
            structure,
        )
        parts = tuple((part.layer, part.kind) for part in structure.parts)
        self.candidates = Candidates(self.base, self.items, PRECISIONS, Ranking(parts, self.scores), offered)

    def plan(self, decoded: Any) -> CompressionPlan:
        assert self.space.structure is not None
        parts, ranks = self.space.num_parts, self.candidates.ranks
        ends = parts, parts + len(self.items)
        units = self.space.structure.counts(decoded[:parts])
        chosen = [] if ranks is None else [ranks.choices[place] for place in decoded[ends[1] :]]
        return self.candidates.plan({"units": units, "choices": list(decoded[slice(*ends)]), "ranks": chosen})

    def price(self, plan: CompressionPlan) -> Price:
        return price_of_plan(self.config, torch.bfloat16, plan, LORA)


@pytest.mark.parametrize(
    ("of_all", "multiply_adds"),
    [
        (False, None),
        (True, 0.85),
        pytest.param(False, 0.85, marks=pytest.mark.slow),
        pytest.param(True, None, marks=pytest.mark.slow),
    ],
    ids=["share", "bytes and multiply-adds", "share and multiply-adds", "bytes"],
)
@pytest.mark.parametrize(
    ("share", "options"),
    [
        (0.2, {}),
        (0.45, {"granularity": "block", "alone": (0,), "family": "olmo2"}),
        (0.22, {"config": StructureConfig(least=0.3, groups=False), "family": "gpt2"}),
        (0.2, {"selection": SelectionConfig(leave_alone=(1,), round_to=5), "spends": True}),
    ],
    ids=["units", "blocks", "channels", "alone"],
)
def test_every_point_is_a_plan_within_the_budget_whose_bytes_are_known(
    share: float, options: Any, of_all: bool, multiply_adds: float | None
) -> None:
    """Bytes of the decoder linears alone, and of all with biases, norms and adapters."""
    searched = Searched(budget := Budget(share=share, multiply_adds=multiply_adds), **options)
    if of_all:
        whole = searched.price(searched.base)
        most = whole.total - whole.unit_weight_bytes + budget.limit(whole, searched.base)
        searched = Searched(budget := Budget(bytes=most, multiply_adds=multiply_adds), **options)
    space = searched.space
    points = 3 * np.random.default_rng(1).standard_normal((3000, space.dimension))
    points[0], points[1, :], points[2, :] = 0, 1e300, -1e300
    decoded = np.unique(space.decode(points), axis=0)
    assert len(decoded) > 100
    sizes = space.sizes(decoded)
    assert (sizes <= space.limit).all()
    most = budget.most_multiply_adds(searched.base)
    widths = set()
    for row, size in zip(decoded[:: max(1, len(decoded) // 60)], sizes[:: max(1, len(decoded) // 60)], strict=True):
        plan = searched.plan(row)
        cost = searched.price(plan)
        assert budget.limit(cost, plan) - cost.unit_weight_bytes == space.limit - size
        assert most is None or cost.multiply_adds <= most
        widths.add(plan.widths)
        for number, layer in enumerate(plan.layers):
            assert len(layer.ffn_channels) == searched.base.widths.ffn_channels[number] or not (
                len(layer.ffn_channels) % searched.structures.multiple
            )
    assert len(widths) > 10


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_of_adapters_count_to_the_byte(family: str) -> None:
    """Of what layers of any width leave of the budget, and with the least of all within it."""
    dense = Searched(Budget(share=1.0), family=family)
    whole = dense.price(dense.base)
    budget = Budget(bytes=whole.total - int(0.8 * whole.unit_weight_bytes))
    searched = Searched(budget, family=family, ranks=(2, 1))
    space = searched.space
    assert space.structure is not None
    points = 3 * np.random.default_rng(1).standard_normal((3000, space.dimension))
    points[0], points[1, :], points[2, :] = 0, 1e300, -1e300
    decoded = np.unique(space.decode(points), axis=0)
    ranks, widths = set(), set()
    for row, size in zip(decoded[::10], space.sizes(decoded[::10]), strict=True):
        plan = searched.plan(row)
        cost = searched.price(plan)
        assert space.limit - size == budget.limit(cost, plan) - cost.unit_weight_bytes >= 0
        ranks.add(tuple(plan.ranks))
        widths.add(plan.widths)
        assert searched.candidates.row(plan, space.structure) == list(row)
    assert len(ranks) == 2**LAYERS and len(widths) > 10
    # The prior takes a rank for worth its bytes by what these save elsewhere.
    costs = space.costs(np.array([[0] * space.dimension, [0] * (space.dimension - 1) + [1]])[:, 1:])
    assert costs[1] < costs[0]


def test_the_cheapest_plan_has_adapters_of_the_lowest_rank() -> None:
    whole = Searched(Budget(share=1.0), ranks=(2, 1))
    items, least = whole.items, whole.structures.least
    kept = [
        (range(groups), range(channels)) for groups, channels in zip(least.kv_groups, least.ffn_channels, strict=True)
    ]
    narrowest = with_choices(whole.base.keeping(kept), items, [PRECISIONS[0]] * len(items))
    size = whole.price(narrowest.with_ranks([1] * LAYERS)).total
    assert size < whole.price(narrowest).total
    searched = Searched(Budget(bytes=size), ranks=(2, 1))
    points = 3 * np.random.default_rng(1).standard_normal((20, searched.space.dimension))
    for row in searched.space.decode(points):
        assert searched.plan(row).ranks == [1] * LAYERS and searched.price(searched.plan(row)).total == size
    said = rf"least 0\.25, adapters of the lowest rank, 1, and every unit .* has {size:,} bytes in all"
    with pytest.raises(UserError, match=said):
        Searched(Budget(bytes=size - 1), ranks=(2, 1))


def test_the_price_from_shapes_is_that_of_the_model() -> None:
    searched = Searched(Budget(share=0.2))
    plan = searched.plan(searched.space.decode(np.ones((1, searched.space.dimension)))[0])
    model = build_skeleton(searched.config).bfloat16()
    assert price(model, plan, rank=2, targets=LORA.target_modules) == searched.price(plan)


def test_the_origin_is_what_pruning_keeps_and_less_where_that_does_not_fit() -> None:
    def widths_of(budget: Budget) -> list[tuple[int, int]]:
        searched = Searched(budget)
        plan = searched.plan(searched.space.decode(np.zeros((1, searched.space.dimension)))[0])
        assert searched.price(plan).unit_weight_bytes <= budget.limit(searched.price(plan), plan)
        return list(zip(plan.widths.kv_groups, plan.widths.ffn_channels, strict=True))

    searched = Searched(Budget(share=0.3))
    assert searched.start != [(4, 48)] * LAYERS
    assert widths_of(Budget(share=0.3)) == searched.start
    narrow = widths_of(Budget(share=0.3, multiply_adds=0.5))
    assert all(new <= old for new, old in zip(narrow, searched.start, strict=True)) and narrow != searched.start
    plan = searched.base.keeping([(range(groups), range(channels)) for groups, channels in narrow])
    assert searched.price(plan).multiply_adds <= 0.5 * unit_weights(plan.architecture)


def test_fewer_units_leave_bytes_for_bits() -> None:
    searched = Searched(Budget(share=0.2))
    points = np.zeros((2, searched.space.dimension))
    points[:, 0] = 10, -10
    wide, narrow = (searched.plan(row) for row in searched.space.decode(points))
    assert searched.price(narrow).average_bits > searched.price(wide).average_bits
    assert narrow.widths == searched.structures.least


def test_a_plan_is_found_again_from_its_point() -> None:
    """Of plans that are full; others come back with what still fits."""
    searched = Searched(Budget(share=0.2, multiply_adds=0.8))
    points = 2 * np.random.default_rng(2).standard_normal((200, searched.space.dimension))
    for row in searched.space.decode(points):
        again = searched.space.decode(searched.space.encode(row)[None])[0]
        assert again.tolist() == row.tolist()
    spare = searched.space.decode(searched.space.encode([0] * len(row))[None])[0]
    assert spare[: searched.space.num_parts].tolist() == [0] * searched.space.num_parts and sum(spare) > 0


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (
            Budget(share=0.001),
            r"share|cheapest plan, with search\.structure\.least 0\.25 .* in affine-double 2/32, has",
        ),
        (
            Budget(share=0.5, multiply_adds=0.1),
            r"narrowest structure with search\.structure\.least 0\.25 has [\d,]+ \(",
        ),
        (Budget(average_bits=3), "bits per weight say nothing of size. Give share or bytes"),
    ],
)
def test_budgets_that_no_structure_meets(budget: Budget, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Searched(budget)


def test_structures_that_cannot_be() -> None:
    with pytest.raises(UserError, match="selection.uniform is true"):
        Searched(Budget(share=0.3), selection=SelectionConfig(uniform=True))
    with pytest.raises(UserError, match=r"search\.structure\.least is 1\.0; it is the share"):
        StructureConfig(least=1.0)
    with pytest.raises(UserError, match="groups false and channels false"):
        StructureConfig(groups=False, channels=False)


def test_the_least_of_a_narrowed_model_is_a_share_of_the_dense_widths() -> None:
    model = build_skeleton(tiny_config("llama"))
    whole = CompressionPlan.dense(architecture_of(model.config), None)
    kept = [(range(2), range(32))] * LAYERS
    narrow_(model, kept)
    structures = Structures(model, whole.keeping(kept), StructureConfig(least=0.5), SELECTION, LORA)
    assert {(offer.least_groups, offer.least_channels) for offer in structures.supplies} == {(2, 24)}
