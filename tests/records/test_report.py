import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.summaries import SUMMARY
from torch.utils.tensorboard import SummaryWriter

from qpruner.errors import UserError
from qpruner.records.folder import RunFolder
from qpruner.records.report import (
    Stage,
    Summary,
    protocol_line,
    scalars,
    show_summary,
    table,
    tasks_table,
    write_report,
)


def test_table_by_hand() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(SUMMARY).splitlines()]
    assert lines[2] == ["dense", "1,000", "4,000", "-", "3.142", "-", "50.0 %", "1.2 s", "-", "3 MiB"]
    assert lines[3] == ["recovered", "1,010", "4,040", "4.50", "-", "-", "-", "60.0 s", "7 MiB", "-"]
    assert len({len(line) for line in table(SUMMARY).splitlines()}) == 1


def test_summary_round_trip(tmp_path: Path) -> None:
    SUMMARY.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == SUMMARY


def test_what_was_measured_as_not_finite_is_shown_and_kept_in_json(tmp_path: Path) -> None:
    results = {"perplexity": math.inf, "bits_per_byte": math.nan, "accuracy": math.nan, "tokens": 12.0}
    summary = replace(SUMMARY, stages=(replace(SUMMARY.stages[0], results=results),))
    cells = [cell.strip() for cell in table(summary).splitlines()[2].split("|")]
    assert cells[5:8] == ["inf", "nan", "nan"]
    summary.write(tmp_path / "summary.json")
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    read = Summary.read(tmp_path / "summary.json").stages[0].results
    assert {name: str(value) for name, value in read.items()} == {name: str(value) for name, value in results.items()}


def test_the_protocol_is_told_with_the_number_of_tokens() -> None:
    line = protocol_line(SUMMARY, "validation")
    assert "validation split: rows of 8; 12 tokens scored" in line
    assert "resident set" in line


def test_no_perplexity_is_told_where_no_token_was_scored() -> None:
    stages = tuple(replace(stage, results={}) for stage in SUMMARY.stages)
    line = protocol_line(replace(SUMMARY, stages=stages))
    assert line.startswith("Bytes: ") and "erplexity" not in line


def test_the_later_value_of_a_step_that_was_logged_twice_counts(tmp_path: Path) -> None:
    for values in ({1: 10.0, 2: 20.0, 3: 30.0}, {2: 21.0, 3: 31.0, 4: 41.0}):
        with SummaryWriter(str(tmp_path)) as writer:
            for step, value in values.items():
                writer.add_scalar("train/loss", value, step)
    assert scalars(tmp_path, "train/loss") == [(1, 10.0), (2, 21.0), (3, 31.0), (4, 41.0)]
    assert scalars(tmp_path, "val/loss") == []


def with_tasks(stage: Stage, **accuracies: float) -> Stage:
    """A stage with accuracies on tasks, each with an error of 3 %."""
    results = {f"{task}/accuracy": accuracy for task, accuracy in accuracies.items()}
    results |= {f"{task}/error": 0.03 for task in accuracies}
    return replace(stage, results={**results, "accuracy": 0.6, "accuracy_error": 0.015})


def test_an_accuracy_is_shown_with_its_error() -> None:
    def cell(results: dict[str, float]) -> str:
        (stage,) = table(replace(SUMMARY, stages=(replace(SUMMARY.stages[0], results=results),))).splitlines()[2:]
        return stage.split("|")[7].strip()

    assert cell({"accuracy": 0.62, "accuracy_error": 0.0151}) == "62.0 % ± 1.5"
    assert cell({"accuracy": 0.6, "examples": 25.0}) == "60.0 % ± 10.0"  # of a single task
    assert cell({"accuracy": 0.6, "examples": 25.0, "a/accuracy": 0.5, "b/accuracy": 0.7}) == "60.0 %"


def test_several_tasks_get_a_table_and_a_picture_of_all_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, recovered = SUMMARY.stages
    one_task = replace(SUMMARY, stages=(with_tasks(dense, boolq=0.6), recovered))
    assert tasks_table(SUMMARY) is None and tasks_table(one_task) is None
    alone = replace(SUMMARY, stages=(with_tasks(dense, boolq=0.7, piqa=0.5), recovered))
    both = replace(SUMMARY, stages=(alone.stages[0], with_tasks(recovered, boolq=0.65)))
    said = tasks_table(both)
    assert said is not None
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()[::2]] == [
        ["stage", "boolq", "piqa", "mean"],
        ["dense", "70.0 % ± 3.0", "50.0 % ± 3.0", "60.0 % ± 1.5"],
    ]
    assert said.splitlines()[3].split("|")[2:4] == [" 65.0 % ± 3.0 ", " " * 12 + "- "]
    show_summary(both)
    assert f"{table(both)}\n\n{said}\n\n" in capsys.readouterr().out
    all_tasks = replace(SUMMARY, stages=(alone.stages[0], with_tasks(recovered, boolq=0.65, piqa=0.45)))
    for number, (summary, pictured) in enumerate([(SUMMARY, False), (alone, False), (both, False), (all_tasks, True)]):
        folder = RunFolder(tmp_path / str(number))
        folder.path.mkdir()
        summary.write(folder.summary)
        write_report(folder)
        told = tasks_table(summary)
        assert told is None or told in folder.report.read_text()
        assert ("](tasks.png)" in folder.report.read_text()) is folder.tasks_picture.exists() is pictured


@pytest.mark.parametrize("logged", [False, True])
def test_report_holds_the_table_and_a_picture_of_what_was_logged(tmp_path: Path, logged: bool) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    SUMMARY.write(folder.summary)
    if logged:
        with SummaryWriter(str(folder.tensorboard)) as writer:
            writer.add_scalar("train/loss", 1.0, 1)
            writer.add_scalar("train/loss", 0.5, 2)
    write_report(folder)
    text = folder.report.read_text()
    assert table(SUMMARY) in text and protocol_line(SUMMARY) in text
    assert ("loss.png" in text) is logged
    assert folder.loss_picture.exists() is logged
    if logged:
        assert folder.loss_picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"rows of 8"', "8", "protocol must be text, not 8"),
        ('"finished": true', '"finished": 1', "finished must be true or false"),
        ('"parameters": 1000', '"parameters": 1e99', r"stages\[0\].parameters must be a whole number"),
        ('"perplexity": 3.14159', '"perplexity": null', r"stages\[0\].results.perplexity must be a number, not None"),
        ('"tokens": 12.0', '"tokens": NaN', "scored nan tokens"),
        ('"name": "recovered",', "", "name missing"),
        ("]", "", "Expecting|delimiter"),
    ],
)
def test_a_summary_that_holds_something_else_is_named(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UserError, match=f"summary.json'.*{said}.*Restore the file, or start the run anew"):
        Summary.read(path)
