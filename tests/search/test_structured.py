"""What a search of widths prepares: once, found again, and made anew where what it was made from changes."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.compensated import TEXT as COMPENSATION_TEXT
from support.fits import PRUNING
from support.searches import TEXT, search_of
from transformers import AutoConfig

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.anatomy import architecture_of
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.errors import UserError
from qpruner.plan import UNITS, CompressionPlan
from qpruner.pruning.selection import SelectionConfig
from qpruner.quantization.formats import precision_of
from qpruner.search.structure import StructureConfig
from qpruner.search.structured import scoring_callback
from qpruner.search.trainer import Search

EIGHT = precision_of(8, 32, {})


def prepared(
    base: Path, folder: Path, *, multiply_adds: float | None = None, start: Path | None = None, **changes: Any
) -> Search:
    options = PRUNING | {
        "selection": SelectionConfig(scope="local", round_to=4),
        "compensation": "local",
        "compensation_text": COMPENSATION_TEXT,
    }
    quantization = MixedPrecisionQuantization(
        allocation="sensitivity",
        budget=Budget(share=0.45, multiply_adds=multiply_adds),
        deciding=DecidingConfig(granularity="unit", calibration=TEXT),
    )
    structure = StructureConfig(least=0.5, start=None if start is None else str(start))
    search = search_of(base, folder, StructuredPruning(**options | changes), quantization, structure=structure)
    search.prepare()
    return search


def test_what_is_there_is_used_again_unless_it_was_made_otherwise(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(tiny_llama, tmp_path)
    structured = first.prepared.structured
    assert structured is not None and structured.compensates
    assert first.prepared.base.widths == first.prepared.base.architecture  # no base is pruned
    assert structured.priors.keys() == {"uniform", "mutual_information", "sensitivity"}
    assert [len(part.counts) for part in structured.structure.parts] == [2, 7, 2, 7]
    assert first.work().sums == first.folder.structure
    for name in ("score_units", "keep_sums"):
        monkeypatch.setattr(f"qpruner.search.structured.{name}", None)
    again = prepared(tiny_llama, tmp_path)
    assert again.identity("trials") == first.identity("trials")
    assert again.space.origin() == first.space.origin()
    with pytest.raises(TypeError, match="not callable"):
        prepared(tiny_llama, tmp_path, criterion="magnitude_l2")
    without = prepared(tiny_llama, tmp_path, compensation="none")
    assert without.work().sums is None


@pytest.fixture
def start(tiny_llama: Path, tmp_path: Path) -> CompressionPlan:
    """77.5 % of the weights, all in eight bits, with units of its own in the first layer, as in ``start.json``."""
    dense = CompressionPlan.dense(architecture_of(AutoConfig.from_pretrained(tiny_llama)), None)
    kept = dense.keeping([((1,), range(20, 48)), (range(2), range(48))])
    plan = kept.with_precision([dict.fromkeys(UNITS, EIGHT)] * 2)
    plan.write(tmp_path / "start.json")
    return plan


def tried_for_start(search: Search) -> CompressionPlan:
    (row,) = search.space.decode(np.array(search.starts)).tolist()
    return search.prepared.candidates.plan(search.key(row, 0, 2))


def test_a_start_within_the_budget_is_tried_as_it_is_and_may_move(
    tiny_llama: Path, tmp_path: Path, start: CompressionPlan, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "search"
    with caplog.at_level(logging.INFO):
        search = prepared(tiny_llama, folder, multiply_adds=0.775, start=tmp_path / "start.json")
    assert tried_for_start(search).layers == start.layers
    assert "Widths of 4 parts" in caplog.text and "in its place" not in caplog.text
    identity = search.identity("trials")
    (tmp_path / "start.json").rename(tmp_path / "moved.json")
    moved = prepared(tiny_llama, folder, multiply_adds=0.775, start=tmp_path / "moved.json")
    assert moved.identity("trials") == identity


def test_a_start_above_the_budget_is_narrowed_and_the_search_says_so(
    tiny_llama: Path, tmp_path: Path, start: CompressionPlan, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "start.json"
    with caplog.at_level(logging.INFO):
        search = prepared(tiny_llama, tmp_path / "search", multiply_adds=0.7, start=path)
    tried = tried_for_start(search)
    assert tried.widths.kv_groups == (1, 2) and tried.widths.ffn_channels == (24, 40)
    assert tried.layers[0].kv_groups == (1,)  # as many as in the plan
    assert (
        f"The plan {str(path)!r} is not one that this search can try, with search.structure.least 0.5 under a budget "
        f"of 45.0 % of the 16-bit bytes of the dense decoder linears and 70.0 % of the multiply-adds of the dense "
        f"decoder linears; the one tried in its place keeps 70.0 % of the weights of the decoder linears and not "
        f"77.5 %, with other units in 2 of 2 layers."
    ) in caplog.text


def test_somebody_has_to_say_which_units_stay() -> None:
    callback = StructuredPruning(0.2)
    assert scoring_callback([callback]) is callback
    with pytest.raises(UserError, match="trainer.callbacks has no callback that prunes. Add StructuredPruning"):
        scoring_callback([])
