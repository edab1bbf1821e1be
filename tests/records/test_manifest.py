from pathlib import Path
from typing import Any

import pytest

from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.records.manifest import record_session

BEGUN: dict[str, Any] = {
    "seed": 3,
    "base": {"name": "a", "sha256": "1"},
    "data": {"train": {"rows": 2, "tokens": 9, "sha256": "x"}},
    "compression": [{"callback": "StructuredPruning", "ratio": 0.2, "calibration": {"batch_size": 2}}],
    "devices": "1 x cpu",
    "phase": 1,
}


def test_sessions_are_added_to_what_the_run_was_begun_with(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    record_session(path, **BEGUN)
    record_session(path, **{**BEGUN, "devices": "2 x cuda"})
    manifest = read_json(path)
    kept = ("seed", "base", "data")
    assert {key: manifest[key] for key in kept} == {key: BEGUN[key] for key in kept}
    assert manifest["compression"] == [{"phase": 1, **BEGUN["compression"][0]}]
    assert [session["devices"] for session in manifest["sessions"]] == ["1 x cpu", "2 x cuda"]
    assert set(manifest["sessions"][0]["versions"]) >= {"qpruner", "torch", "lightning", "transformers", "peft"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {"name": "a", "sha256": "2"}}, "base model changed.*sha256 was 1, is now 2"),
        ({"data": {"train": {"rows": 2, "tokens": 8, "sha256": "y"}}}, "data changed.*train was .*9.*is now .*8"),
    ],
)
def test_another_base_or_other_data_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "manifest.json"
    record_session(path, **BEGUN)
    before = path.read_text()
    with pytest.raises(UserError, match=said):
        record_session(path, **{**BEGUN, **change})
    assert path.read_text() == before
