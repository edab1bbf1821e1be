"""Ranks of adapters as items: bytes by hand, the prior's guess, the plan that comes of them, and what is refused."""

from typing import Any

import pytest
from support.families import LAYERS, tiny_config

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.anatomy import architecture_of
from qpruner.callbacks.bits_under_budget import Allocator
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton
from qpruner.plan import CompressionPlan
from qpruner.search.config import SearchConfig
from qpruner.search.ranks import Ranks, check_ranks_of_search

MODEL = build_skeleton(tiny_config("llama"))
BASE = CompressionPlan.dense(architecture_of(MODEL.config), None)
RANKS = Ranks.of((8, 2, 4), MODEL, LoRAConfig(r=8, target_modules=["q_proj", "down_proj"]))


def test_an_item_has_the_bytes_above_the_lowest_rank_and_doublings_are_worth_the_same() -> None:
    config = MODEL.config
    queries = config.num_attention_heads * config.head_dim
    of_one = 4 * (queries + config.hidden_size + config.intermediate_size + config.hidden_size)  # float32
    assert RANKS.choices == (2, 4, 8) and RANKS.layers == tuple(range(LAYERS))
    items = RANKS.items(price_of_bits=LAYERS * 10.0)
    assert [[choice.size for choice in item] for item in items] == [[0, 2 * of_one, 6 * of_one]] * LAYERS
    assert [[choice.cost for choice in item] for item in items] == [pytest.approx([1.0, 0.5, 0.0])] * LAYERS
    assert RANKS.most_bytes == LAYERS * 6 * of_one


def test_layers_without_adapters_have_no_rank() -> None:
    ranks = Ranks.of((1, 2), MODEL, LoRAConfig(r=2, target_modules=r"model\.layers\.[02]\.mlp\.up_proj"))
    assert ranks.layers == (0, 2) and len(set(ranks.bytes_of_one)) == 1
    plan = ranks.carried_out(BASE, [2, 1])
    assert plan.ranks == [2, None, 1]
    assert ranks.nearest(plan) == [1, 0] and ranks.nearest(BASE) == [1, 1]


def test_the_nearest_rank_is_taken_of_a_plan_with_others() -> None:
    assert RANKS.nearest(BASE.with_ranks([1, 5, 64])) == [0, 1, 2]


@pytest.mark.parametrize("ranks", [[4], [4, 4], [0, 4], [2, 4, 2]])
def test_there_must_be_a_choice(ranks: list[int]) -> None:
    with pytest.raises(UserError, match="names at least two ranks from 1 on, each once"):
        SearchConfig(ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "budget", "iterations", "said"),
    [
        ((2, 4), Budget(bytes=1000), 1, r"search\.ranks is 2, 4, and .* --model\.lora\.r 8.* Set it to 4, or make 8"),
        ((2, 16), Budget(bytes=1000), 1, "Set it to 16, or make 8 the highest"),
        ((2, 8), Budget(share=0.2), 1, "20.0 % of the 16-bit bytes.* adapters do not count.* Give the budget in bytes"),
        ((2, 8), Budget(bytes=1000), 2, "loftq_iterations is 2; .* depend on the rank.* Give 1 or 0"),
    ],
)
def test_what_cannot_be_searched(ranks: Any, budget: Budget, iterations: int, said: str) -> None:
    allocator = Allocator("sensitivity", budget, DecidingConfig(), (), iterations)
    with pytest.raises(UserError, match=said):
        check_ranks_of_search(ranks, LoRAConfig(r=8), allocator)
    check_ranks_of_search((8, 2), LoRAConfig(r=8), Allocator("sensitivity", Budget(bytes=1), DecidingConfig(), (), 1))
