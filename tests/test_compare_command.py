"""`qpruner compare` as a person types it."""

import os
from pathlib import Path

import pytest
from support.evaluations import write_evaluation

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.records.comparison import Comparison, compare_folders, describe


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    write_evaluation(tmp_path / "one" / "run" / "evaluation", {"boolq": [True, True, False]})
    write_evaluation(tmp_path / "two" / "run", {"boolq": [True, False, False]})
    return [str(tmp_path / "one" / "run"), str(tmp_path / "two" / "run")]


def test_it_prints_and_writes_nothing_unless_told_where(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    run(["compare", *two])
    comparison = compare_folders([*map(Path, two)])
    assert [*comparison.models] == ["one/run", "two/run"]
    assert capsys.readouterr().out == "\n" + "\n".join(describe(comparison)) + "\n"
    assert sorted(tmp_path.rglob("*")) == before
    run(["compare", "--output", str(tmp_path / "out"), *two, "--names", "QPruner^1", "2"])
    assert [*Comparison.read(tmp_path / "out" / "comparison.json").models] == ["QPruner^1", "2"]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png", ".png"]
    assert f"Written to {tmp_path / 'out'}" in capsys.readouterr().out


def test_a_single_run_is_a_table(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(["compare", two[0]])
    said = capsys.readouterr().out
    assert "| run " in said and "against" not in said


def test_mistakes_are_told(two: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are 2 folders and the names a; --names takes one for each"):
        run(["compare", *two, "--names", "a"])
    with pytest.raises(UserError, match=f"'{tmp_path}' holds nothing that was measured"):
        run(["compare", two[0], str(tmp_path)])
    (Path(two[1]) / "evaluation.json").write_text('{"model": ')
    with pytest.raises(UserError, match="Cannot read .*evaluation.json"):
        run(["compare", *two])
    with pytest.raises(UserError, match="required: runs"):
        run(["compare"])


def test_the_output_is_checked_before_the_runs_are_read_and_made_when_it_is_written(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="There are 2 folders and the names a"):
        run(["compare", *two, "--names", "a", "--output", str(tmp_path / "deep" / "out")])
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr("qpruner.compare_command.compare_folders", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write into .*file' is no folder. Name another folder to write"):
        run(["compare", *two, "--output", str(tmp_path / "file")])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"'{tmp_path}' may not be written"):
        run(["compare", *two, "--output", str(tmp_path)])
