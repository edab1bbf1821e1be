"""What the folders of runs and evaluations say was measured."""

import json
import math
from pathlib import Path

import pytest
from support.evaluations import items_of, write_evaluation

from qpruner.errors import UserError
from qpruner.records.evaluation import TextScore
from qpruner.records.measured import MeasuredTask, MeasuredText, read_items, read_measured
from qpruner.records.report import Stage, Summary

TEXT = TextScore("wikitext2", "128 tokens", 1000, 12.5, 1.1, "wiki.txt", 2.0)
DENSE = Stage("dense", 9, 99, None, {"perplexity": 2.0}, 1.0, None, None)


def write_summary(place: Path, results: dict[str, float], name: str = "summary.json") -> Path:
    place.mkdir(exist_ok=True)
    last = Stage("recovered", 1000, 4000, 4.5, results, 60.0, 7, 8)
    Summary(True, "rows of 8", "of the process", (DENSE, last)).write(place / name)
    return place


def test_an_evaluation_lies_in_a_run_or_alone(tmp_path: Path) -> None:
    alone = write_evaluation(tmp_path / "alone", {"boolq": [True] * 15 + [False] * 10}, texts=[TEXT])
    write_evaluation(write_summary(tmp_path / "run", {"perplexity": 3.0}) / "evaluation", {"boolq": [True] * 3})
    measured = read_measured(alone)
    (task,) = measured.tasks.values()
    assert task == MeasuredTask(0.6, pytest.approx(0.1), 25, "acc", "test", "questions.jsonl", 0)
    assert measured.texts == (MeasuredText("wikitext2", "128 tokens", 12.5, 1000, "wiki.txt"),)
    assert (measured.tensor_bytes, measured.seconds) == (4_000_000, 3.5)  # 1.5 for the task, 2 for the text
    assert read_measured(tmp_path / "run").tasks["boolq"].items == 3


def test_a_run_without_an_evaluation_is_measured_by_its_last_stage(tmp_path: Path) -> None:
    results = {"perplexity": 3.0, "tokens": 12.0, "accuracy": 0.6, "examples": 25.0}
    run = write_summary(tmp_path / "run", results)
    measured = read_measured(run)
    assert measured.tasks == {"accuracy": MeasuredTask(0.6, pytest.approx(0.1), 25, split="test")}
    assert measured.texts == (MeasuredText("test split", "rows of 8", 3.0, 12),)
    assert (measured.parameters, measured.seconds, measured.peak_inference) == (1000, 60.0, 8)
    assert (measured.measured_in, measured.seconds_of) == ("summary.json, stage recovered", "reaching the stage")
    tasks = {"boolq/acc": 0.1, "boolq/accuracy": 0.5, "boolq/error": 0.02, "boolq/examples": 300.0}
    write_summary(run, {**tasks, "piqa/accuracy": 0.7, "accuracy": 0.6, "accuracy_error": 0.01}, "test.json")
    measured = read_measured(run)  # measured again, as it was asked for
    assert measured.tasks["boolq"] == MeasuredTask(0.5, 0.02, 300, split="test")
    assert list(measured.tasks) == ["boolq", "piqa"] and math.isnan(measured.tasks["piqa"].error)
    assert (measured.measured_in, measured.texts) == ("test.json, stage recovered", ())


def test_a_folder_without_anything_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds nothing that was measured: it must .* `qpruner evaluate` measures"):
        read_measured(tmp_path)
    with pytest.raises(UserError, match=r"nowhere' is no folder"):
        read_measured(tmp_path / "nowhere")
    Summary(False, "", "", ()).write(tmp_path / "summary.json")
    with pytest.raises(UserError, match="holds nothing that was measured"):
        read_measured(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"acc": 0.75', '"acc": 7.5', r"tasks.boolq: acc is 7.5; an accuracy lies in \[0, 1\]"),
        ('"measure": "acc"', '"measure": "best"', "measure is 'best'; it must be acc or acc_norm"),
        ('"items": 4', '"items": "4"', "tasks.boolq.items must be a whole number, not '4'"),
        ("}", "", "Expecting"),
    ],
)
def test_a_damaged_evaluation_is_named(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = write_evaluation(tmp_path / "run", {"boolq": [True, True, False, True]}) / "evaluation.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UserError, match=f"evaluation.json'.*{said}.*repeat the command"):
        read_measured(tmp_path / "run")


def test_items_come_back_by_their_numbers(tmp_path: Path) -> None:
    place = write_evaluation(tmp_path / "run" / "evaluation", {"boolq": [True, False, True]})
    assert list(read_items(tmp_path / "run", "boolq").values()) == items_of([True, False, True])
    assert read_items(place, "boolq").keys() == {0, 1, 2}
    assert read_items(place, "piqa") == {} and read_items(tmp_path, "boolq") == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"item": 0}, "line 3: question 0 stands there twice"),
        ({"gold": 2}, "line 3: Question 2 has 2 log-likelihoods, 2 lengths and the right option at 2"),
        ({"lengths": [5]}, "2 log-likelihoods, 1 lengths"),
        ({"lengths": [5, 0]}, "an option of 0 characters"),
        ({"log_likelihoods": ["x", -1.0]}, r"line 3.log_likelihoods\[0\] must be a number, not 'x'"),
    ],
)
def test_damaged_items_are_named_with_their_line(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = write_evaluation(tmp_path / "run", {"boolq": [True, False, True]}) / "items" / "boolq.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | changes)]))
    with pytest.raises(UserError, match=f"boolq.jsonl': .*{said}"):
        read_items(tmp_path / "run", "boolq")
