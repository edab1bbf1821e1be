"""Models side by side: what the tables say, which questions are paired, and what is not silently compared."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.evaluations import items_of, write_evaluation

from qpruner.errors import UserError
from qpruner.records.comparison import (
    Comparison,
    against_table,
    compare_folders,
    describe,
    distinct_names,
    models_table,
    pair_items,
    write_comparison,
)
from qpruner.records.evaluation import TextScore
from qpruner.records.report import Stage, Summary
from qpruner.records.statistics import PairedComparison, compare_counts

TEXT = TextScore("wikitext2", "128 tokens", 1000, 12.5, 1.1, "wiki.txt", 2.0)
FIRST = [True] * 15 + [False] * 10
OTHER = [False] * 1 + [True] * 14 + [True] * 9 + [False]  # one lost, nine won


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "--" not in line]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Of the same questions; the second has other bytes."""
    first = write_evaluation(tmp_path / "a" / "evaluation", {"boolq": FIRST, "piqa": FIRST}, texts=[TEXT])
    other = write_evaluation(tmp_path / "b", {"boolq": OTHER, "piqa": FIRST}, tensor_bytes=3_000_000)
    return [first.parent, other]


def test_the_table_by_hand(two: list[Path]) -> None:
    header, first, other = rows(models_table(compare_folders(two, ["dense", "pruned"])))
    assert header == [
        "model", "parameters", "bytes", "average bits", "perplexity, wikitext2: 128 tokens", "boolq", "piqa",
        "mean of 2", "peak memory", "time",
    ]  # fmt: skip
    common = ["60.0 ± 10.0", "60.0 ± 7.1", "256 MiB"]  # 10 / sqrt(2)
    assert first == ["dense", "1,000,000", "4,000,000", "4.50", "12.500", "60.0 ± 10.0", *common, "5.0 s"]
    error = 100 * (0.92 * 0.08 / 24) ** 0.5
    assert other[2:7] == ["3,000,000", "4.50", "-", f"92.0 ± {error:.1f}", "60.0 ± 10.0"]
    said = "Accuracies: percent ± standard error; by acc on 25 questions: boolq, piqa."
    assert said in describe(compare_folders(two))
    assert other[7:] == [f"76.0 ± {(error**2 + 100) ** 0.5 / 2:.1f}", "256 MiB", "3.0 s"]


def test_models_are_paired_question_by_question(two: list[Path]) -> None:
    comparison = compare_folders(two)
    (against,) = comparison.against_first
    assert against.tasks["boolq"] == compare_counts(25, 1, 9) and against.tasks["piqa"] == compare_counts(25, 0, 0)
    assert against.together == compare_counts(50, 1, 9) and against.left_out == {} and comparison.notes == ()
    header, boolq, piqa, together = rows(against_table(against, "a"))
    assert header == ["task", "questions of both", "difference", "only b right", "only a right", "p"]
    error = 100 * ((10 - 25 * 0.32**2) / 24 / 25) ** 0.5
    assert boolq == ["boolq", "25", f"+32.0 ± {error:.1f}", "9", "1", f"{2 * 11 / 1024:.4f}"]
    assert piqa == ["piqa", "25", "+0.0 ± 0.0", "0", "0", "1.0000"] and together[:2] == ["all together", "50"]


def test_only_questions_that_both_have_are_paired() -> None:
    first = {item.item: item for item in items_of([True, True, False, True])}
    other = {item.item: item for item in items_of([False, True, True], first=1)}
    assert pair_items(first, other, "acc") == compare_counts(3, 1, 1)  # 1: lost, 2: won, 3: both
    assert pair_items(first, {item.item: item for item in items_of([True], first=9)}, "acc") == (
        "they have no question in common"
    )
    different = {number: replace(item, lengths=(5, 6)) for number, item in first.items()}
    assert pair_items(first, different, "acc") == "questions of the same number are different ones"


def test_questions_are_paired_by_the_measure_that_reports_the_task() -> None:
    first = {0: replace(items_of([True])[0], lengths=(1, 4))}  # -1 / 1 is less than -2 / 4
    other = {0: replace(items_of([False])[0], lengths=(1, 4))}
    assert isinstance(pair_items(first, other, "acc"), PairedComparison)
    assert pair_items(first, other, "acc") == compare_counts(1, 1, 0)
    assert pair_items(first, other, "acc_norm") == compare_counts(1, 0, 0)


@pytest.mark.parametrize(
    ("otherwise", "note", "reason"),
    [
        ({"split": "validation"}, "boolq: the split differs: test for a; validation for b.", "the splits are diff"),
        ({"source": "x.jsonl"}, "boolq: the source differs: questions.jsonl for a; x.jsonl for b.", None),
        ({"measure": "acc_norm"}, "boolq: the measure differs: acc for a; acc_norm for b.", "reported by acc and by"),
        ({"kept": False}, None, "what was said of every question was not kept for both"),
    ],
)
def test_what_was_measured_otherwise_is_said(
    tmp_path: Path, otherwise: dict[str, object], note: str | None, reason: str | None
) -> None:
    write_evaluation(tmp_path / "a", {"boolq": FIRST})
    write_evaluation(tmp_path / "b", {"boolq": OTHER}, **otherwise)  # type: ignore[arg-type]
    comparison = compare_folders([tmp_path / "a", tmp_path / "b"])
    said = "\n".join(describe(comparison))
    assert comparison.notes == ((note,) if note else ()) and (note is None or f"- {note}" in said)
    (against,) = comparison.against_first
    assert (reason is None) is ("boolq" in against.tasks)
    assert reason is None or (reason in against.left_out["boolq"] and "boolq was not compared: " in said)


def test_other_numbers_of_questions_and_other_tasks_are_said(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"boolq": FIRST, "piqa": FIRST, "arc": FIRST})
    write_evaluation(tmp_path / "b", {"boolq": OTHER[:5], "piqa": OTHER})
    comparison = compare_folders([tmp_path / "a", tmp_path / "b"])
    assert comparison.shared == ("boolq", "piqa") and comparison.against_first[0].tasks["boolq"].items == 5
    assert comparison.notes == (
        "boolq: the number of questions differs: 25 for a; 5 for b.",
        "The mean is over the tasks that all models with tasks have: boolq, piqa.",
    )
    assert comparison.means["a"].value == pytest.approx(0.6)


def test_a_run_beside_an_evaluation_says_how_it_was_measured(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {"boolq": FIRST})
    (tmp_path / "run").mkdir()
    stage = Stage("recovered", 1000, 4000, 4.5, {"perplexity": 3.0, "accuracy": 0.6, "examples": 25.0}, 60.0, 7, 8)
    Summary(False, "rows of 8", "of the device", (stage,)).write(tmp_path / "run" / "summary.json")
    comparison = compare_folders([tmp_path / "a", tmp_path / "run"])
    header, first, run = rows(models_table(comparison))
    assert header[4:7] == ["perplexity, test split: rows of 8", "boolq", "accuracy"]
    assert (first[4:7], run[4:7]) == (["-", "60.0 ± 10.0", "-"], ["3.000", "-", "60.0 ± 10.0"])
    assert "run in summary.json, stage recovered of" in "\n".join(describe(comparison))
    assert comparison.notes == (
        "run is not finished; measured is its last stage.",
        "The meaning of peak memory differs: of the process for a; of the device for run.",
        "What the time was spent with differs: the evaluation for a; reaching the stage for run.",
    )
    assert comparison.against_first[0].together is None


def test_names_are_told_apart() -> None:
    assert distinct_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/c")]) == ["a/run", "b/run", "c"]
    assert distinct_names([Path("/a/run"), Path("/a/run"), Path("/b/run")]) == ["a/run", "a/run (2)", "b/run"]
    assert distinct_names([Path("/run"), Path("/a/run")]) == ["run", "a/run"]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "a"], []])
def test_names_that_do_not_fit_are_refused(two: list[Path], names: list[str]) -> None:
    with pytest.raises(UserError, match="There are 2 folders and the names .*; --names takes one for each folder"):
        compare_folders(two, names)


def test_what_is_written_is_what_is_said(two: list[Path], tmp_path: Path) -> None:
    comparison = compare_folders(two)
    write_comparison(comparison, tmp_path / "out" / "in")
    place = tmp_path / "out" / "in"
    assert Comparison.read(place / "comparison.json") == comparison
    text = (place / "comparison.md").read_text()
    assert "\n".join(describe(comparison)) in text
    for picture in ("tasks.png", "fronts.png"):
        assert f"]({picture})" in text and (place / picture).read_bytes().startswith(b"\x89PNG")


def test_a_single_run_without_tasks_is_a_table_without_pictures(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", {}, texts=[TEXT])
    comparison = compare_folders([tmp_path / "a"])
    write_comparison(comparison, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "comparison.md"]
    assert comparison.against_first == () and "##" not in (tmp_path / "out" / "comparison.md").read_text()
