"""What the ledger keeps, what it gives back after a cut, and what it refuses."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from qpruner.errors import UserError
from qpruner.search.ledger import Ledger, OptimizerRecord, TrialRecord

SEARCH = {"seed": 1, "budget": {"share": 0.3}, "widths": (2, 4, 8)}
KEYS = [{"choices": [2, 4], "seed": 0}, {"choices": [4, 4], "seed": 0}, {"choices": [8, 4], "seed": 0}]
SCORES = {"loss": 0.1 + 0.2, "bytes": 12345678901234567890, "name": "é"}
RECORDS = (
    TrialRecord(0, KEYS[0], 0, scores=SCORES),
    TrialRecord(1, KEYS[1], 0, attempts=2, why="OutOfMemoryError: 3 GiB"),
    TrialRecord(2, KEYS[0], 2, scores=SCORES, repeats=0),
    TrialRecord(3, KEYS[2], 2),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a ledger that holds `RECORDS`."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, SEARCH)
    ledger.start(0, KEYS[0], 0)
    ledger.start(1, KEYS[1], 0)
    ledger.finish(0, SCORES)
    ledger.start(1, KEYS[1], 0)
    ledger.fail(1, "OutOfMemoryError: 3 GiB")
    ledger.start(2, KEYS[0], 2)
    ledger.finish(2, SCORES, repeats=0)
    ledger.start(3, KEYS[2], 2)
    assert ledger.records == RECORDS
    return path


def edit(path: Path, number: int, **changes: Any) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changes)
    path.write_text("\n".join(lines) + "\n")


def test_gives_back_what_it_was_given(path: Path) -> None:
    before = path.read_bytes()
    ledger = Ledger.open(path, dict(reversed(SEARCH.items())))
    assert ledger.records == RECORDS
    assert path.read_bytes() == before
    assert [ledger.attempts(number) for number in range(5)] == [1, 2, 1, 1, 0]
    assert ledger.outcome_of({"seed": 0, "choices": [2, 4]}) == RECORDS[0]
    assert ledger.outcome_of(KEYS[1]) == RECORDS[1]
    assert ledger.outcome_of(KEYS[2]) is None
    ledger.finish(3, {"loss": 1.0})
    assert Ledger.open(path, SEARCH).records == ledger.records
    assert [record.done for record in ledger.records] == [True] * 4


def test_a_record_is_on_the_disk_before_the_method_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.open(path, SEARCH)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_text().splitlines()[-1]))
    ledger.finish(3, {"loss": 1.0})
    ledger.start(4, KEYS[1], 4)
    assert [json.loads(line)["record"] for line in synced] == ["finished", "started"]


def test_a_cut_in_the_last_record_drops_it_and_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        caplog.clear()
        ledger = Ledger.open(path, SEARCH)
        torn = start < end < len(whole)
        assert ledger.records == (RECORDS if end == len(whole) else RECORDS[:3])
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * torn
        assert path.read_bytes() == (whole if end == len(whole) else whole[:start])
        if end < len(whole):
            ledger.start(3, KEYS[2], 2)
        assert Ledger.open(path, SEARCH).records == RECORDS


def test_a_last_record_that_reached_the_disk_in_part_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    path.write_bytes(whole[:start] + b"\0" * 30 + whole[start + 30 :])
    assert Ledger.open(path, SEARCH).records == RECORDS[:3]
    assert path.read_bytes() == whole[:start]


@pytest.mark.parametrize("damage", [b"\0\0\0", b"", b"[1, 2]", b'{"record": "started"', b"\xff"])
def test_damage_in_the_middle_is_named_and_left_alone(path: Path, damage: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], damage, *lines[4:]]))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"Line 4 of .*ledger\.jsonl' is damaged"):
        Ledger.open(path, SEARCH)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (3, {"trial": 5}),
        (4, {"trial": 3}),
        (4, {"trial": -1}),
        (4, {"scores": 3}),
        (4, {"record": "won"}),
        (5, {"key": {"choices": []}}),
        (5, {"trial": 0}),
        (7, {"told": 9}),
        (8, {"trial": 1}),
        (8, {"trial": "2"}),
    ],
)
def test_records_that_do_not_follow_are_named(path: Path, number: int, changes: dict[str, Any]) -> None:
    edit(path, number, **changes)
    with pytest.raises(UserError, match=f"Line {number} of .* does not follow"):
        Ledger.open(path, SEARCH)


def test_another_search_is_refused_and_its_options_are_named(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        Ledger.open(path, {"seed": 2, "budget": {"share": 0.3, "bytes": None}, "widths": (2, 4, 8)})
    assert str(path) in str(error.value)
    assert "  budget.bytes: was None, is now None\n  seed: was 1, is now 2\n" in str(error.value)
    assert "widths" not in str(error.value) and "share" not in str(error.value)
    assert path.read_bytes() == before


def test_other_versions_of_packages_are_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(path, 1, versions={"nevergrad": "0.1"})
    assert Ledger.open(path, SEARCH).records == RECORDS
    assert "0.1" in caplog.text


@pytest.mark.parametrize(
    "content", ["", "\n", "loss,bits\n1,2\n", '{"kind": "qpruner plan", "version": 1}\n', "{", "[]\n"]
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="no ledger of a search"):
        Ledger.open(path, SEARCH)
    assert path.read_text() == content


def test_an_unknown_version_is_refused(path: Path) -> None:
    edit(path, 1, version=2)
    with pytest.raises(UserError, match="has version 2; this qpruner reads version 1"):
        Ledger.open(path, SEARCH)


def test_what_cannot_be_written_is_not_written(path: Path) -> None:
    ledger = Ledger.open(path, SEARCH)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        ledger.finish(3, {"loss": math.nan})
    with pytest.raises(ValueError, match="does not follow"):
        ledger.finish(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="does not follow"):
        ledger.start(3, KEYS[0], 2)
    assert (ledger.records, path.read_bytes()) == (RECORDS, before)


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read .*directory.*start a new search"):
        Ledger.open(tmp_path, SEARCH)


def test_a_full_disk_is_told_and_costs_no_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    ledger = Ledger.open(path, SEARCH)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written .*No space left.*go on with the same command"):
            ledger.finish(3, {"loss": 1.0})
    assert Ledger.open(path, SEARCH).records[:3] == RECORDS[:3]


def test_says_which_optimizer_proposed_what(path: Path) -> None:
    ledger = Ledger.open(path, SEARCH)
    ledger.begin(OptimizerRecord("TBPSA", 4, 9, 2))
    ledger.start(4, {"choices": [1]}, 4, [0.1 + 0.2, -1e-300])
    again = Ledger.open(path, SEARCH)
    assert again.optimizers == (OptimizerRecord("TBPSA", 4, 9, 2),)
    assert again.records[4].point == [0.1 + 0.2, -1e-300]
    for wrong in (OptimizerRecord("DE", 4, 9, 1), OptimizerRecord("DE", 5, 5, 1), OptimizerRecord("DE", 5, 9, 0)):
        with pytest.raises(ValueError, match="does not follow"):
            ledger.begin(wrong)
