"""Plans of keys, and scores as they come back from a file."""

import pickle
from dataclasses import replace
from pathlib import Path

import torch

from qpruner.allocation.items import Item
from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, Precision
from qpruner.pruning.scores import LayerScores
from qpruner.search.candidates import Candidates, Ranking, read_scores, write_scores
from qpruner.search.structure import Part, Structure

FOUR, EIGHT = Precision("nf4", 4, 64), Precision("int8", 8)
BASE = CompressionPlan.dense(Architecture("llama", 32, 8, 1, (3, 3), (5, 5)), None)
SCORES = [
    LayerScores(torch.tensor([1.0, 3.0, 2.0]).double(), torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]).double()),
    LayerScores(torch.tensor([0.0, 0.0, 1.0]).double(), torch.arange(5).double()),
]
ITEMS = (Item(0, ("qkv",)), Item(1, UNITS))
CANDIDATES = Candidates(BASE, ITEMS, (FOUR, EIGHT), Ranking(((0, "kv_groups"), (0, "ffn_channels")), SCORES))


def test_the_units_of_the_highest_scores_stay_and_parts_that_are_not_searched_are_whole() -> None:
    plan = CANDIDATES.plan({"units": [2, 3], "choices": [1, 0]})
    assert (plan.layers[0].kv_groups, plan.layers[0].ffn_channels) == ((1, 2), (0, 2, 4))
    assert (plan.layers[1].kv_groups, plan.layers[1].ffn_channels) == ((0, 1, 2), (0, 1, 2, 3, 4))
    assert plan.layers[0].precision == dict.fromkeys(UNITS, DENSE) | {"qkv": EIGHT}
    assert plan.layers[1].precision == dict.fromkeys(UNITS, FOUR)
    alone = Candidates(BASE, ITEMS, (FOUR, EIGHT)).plan({"choices": [1, 0]})
    assert alone.widths == BASE.architecture and alone.layers[0].precision == plan.layers[0].precision


def test_units_of_the_plan_to_start_from_stay_in_parts_that_keep_as_many() -> None:
    start = BASE.keeping([((0, 2), (1, 3, 4)), ((0, 1), range(5))])
    assert CANDIDATES.ranking is not None
    ranking = pickle.loads(pickle.dumps(replace(CANDIDATES.ranking, start=start)))  # as workers get it
    whole = [0, 1, 2], [0, 1, 2, 3, 4]
    assert ranking.kept([2, 3]) == [([0, 2], [1, 3, 4]), whole]
    assert ranking.kept([1, 3]) == [([1], [1, 3, 4]), whole]  # of the groups fewer: by scores
    assert ranking.kept([2, 4]) == [([0, 2], [0, 2, 3, 4]), whole]
    assert ranking.kept([3, 5]) == [whole, whole]


def test_the_row_of_a_plan_has_the_nearest_that_there_is() -> None:
    parts = (
        Part(0, "kv_groups", (1, 2, 3), (1, 2, 3), (0,) * 3, (0.0,) * 3, 2),
        Part(0, "ffn_channels", (2, 5), (2, 5), (0,) * 2, (0.0,) * 2, 1),
    )
    plan = BASE.keeping([((0, 2), (0, 1, 2)), ((0, 1, 2), range(5))])
    plan = plan.with_precision([dict.fromkeys(UNITS, DENSE), {**dict.fromkeys(UNITS, FOUR), "down": EIGHT}])
    assert CANDIDATES.row(plan, Structure(parts, [[], []], 0.3)) == [1, 0, 1, 0]


def test_scores_come_back_if_they_are_of_the_same_origin(tmp_path: Path) -> None:
    path = tmp_path / "structure" / "scores.safetensors"
    assert read_scores(path, "here") is None
    write_scores(path, SCORES, "here")
    assert read_scores(path, "elsewhere") is None
    (damaged := tmp_path / "damaged.safetensors").write_bytes(path.read_bytes()[:40])
    assert read_scores(damaged, "here") is None
    known = read_scores(path, "here")
    assert known is not None and len(known) == 2
    for one, other in zip(known, SCORES, strict=True):
        assert torch.equal(one.kv_groups, other.kv_groups) and torch.equal(one.ffn_channels, other.ffn_channels)
