"""What a search of widths prepares: once, found again, and made anew where what it was made from changes."""

from pathlib import Path
from typing import Any

import pytest
from support.compensated import TEXT as COMPENSATION_TEXT
from support.fits import PRUNING
from support.searches import TEXT, search_of

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.errors import UserError
from qpruner.pruning.selection import SelectionConfig
from qpruner.search.structure import StructureConfig
from qpruner.search.structured import scoring_callback
from qpruner.search.trainer import Search


def prepared(base: Path, folder: Path, **changes: Any) -> Search:
    options = PRUNING | {
        "selection": SelectionConfig(scope="local", round_to=4),
        "compensation": "local",
        "compensation_text": COMPENSATION_TEXT,
    }
    quantization = MixedPrecisionQuantization(
        allocation="sensitivity",
        budget=Budget(share=0.4),
        deciding=DecidingConfig(granularity="unit", calibration=TEXT),
    )
    search = search_of(
        base, folder, StructuredPruning(**options | changes), quantization, structure=StructureConfig(least=0.5)
    )
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


def test_somebody_has_to_say_which_units_stay() -> None:
    callback = StructuredPruning(0.2)
    assert scoring_callback([callback]) is callback
    with pytest.raises(UserError, match="trainer.callbacks has no callback that prunes. Add StructuredPruning"):
        scoring_callback([])
