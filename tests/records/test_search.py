"""What came of a search: the front and the table by hand, and JSON that comes back as it went."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from support.search_results import NARROWED, RESULTS, TRIALS, narrowed, tried
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpruner.errors import UserError
from qpruner.records.folder import RunFolder
from qpruner.records.search import (
    SearchResults,
    Tried,
    fronts_table,
    pareto_front,
    proposed_by,
    ranked,
    show_search,
    task_panels,
    trials_table,
    variants_table,
    write_search_report,
)
from qpruner.report_command import report_command


def test_the_front_is_what_no_other_beats_and_of_equals_the_first() -> None:
    assert [one.name for one in pareto_front(TRIALS)] == ["trial 2", "trial 1", "trial 8"]
    assert [one.name for one in pareto_front(TRIALS[::-1])] == ["trial 6", "trial 1", "trial 8"]
    assert pareto_front(TRIALS[3:4]) == [TRIALS[3]] and pareto_front([]) == []
    same = [tried("a", 5, 2.0), tried("b", 4, 2.0)]
    assert [one.name for one in pareto_front(same)] == ["b"]


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    RESULTS.write(tmp_path / "search.json")
    assert SearchResults.read(tmp_path / "search.json") == RESULTS
    assert RESULTS.winner.name == "trial 8"


def test_the_report_says_who_proposed_what() -> None:
    assert proposed_by(RESULTS) == "Trials 1 to 5 were proposed by `TBPSA`, 6 to 8 by `bayesian`."
    alone = replace(RESULTS, proposers=RESULTS.proposers[:1])
    assert proposed_by(alone) == "Trials were proposed by `TBPSA`."


def test_loss_and_spread_are_over_seeds() -> None:
    winner, uniform = RESULTS.variants
    assert winner.loss == pytest.approx(1.6) and winner.spread == pytest.approx(0.2 / 2**0.5)  # of n - 1
    assert (uniform.loss, uniform.spread) == (2.0, None)


def test_the_table_says_what_each_plan_costs_and_brings() -> None:
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in variants_table(RESULTS).splitlines()
    )
    assert header == ["plan", "bytes", "average bits", "validation loss", "KL to dense", "bits"]
    assert rows == [
        ["trial 8", "1,700", "17.00", "1.6000 ± 0.1414", "0.2500", "8 8"],
        ["uniform", "1,400", "4.50", "2.0000", "-", "4 4"],
    ]


def test_the_report_names_front_failures_and_pictures(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_search_report(folder, RESULTS)
    report = folder.report.read_text()
    assert variants_table(RESULTS) in report and "- 3: MemoryError" in report
    tried_once = (
        "1 plan was tried in 7 trials under a budget of 6 bits per weight, with mutual information as the prior"
    )
    assert f"{tried_once}. {proposed_by(RESULTS)}" in report  # the trials above all have the same choices
    assert "beats in both loss and bytes: trial 2, trial 1, trial 8; in `plans/`" in report
    for picture in (folder.trials_picture, folder.pareto_picture):
        assert picture.exists() and f"]({picture.name})" in report


def on_tasks(trial: Tried, **accuracies: float) -> Tried:
    scores = {f"{task}/accuracy": accuracy for task, accuracy in accuracies.items()}
    scores |= {f"{task}/error": 0.02 for task in accuracies}
    mean = {"accuracy": sum(accuracies.values()) / len(accuracies), "accuracy_error": 0.01}
    return replace(trial, scores=trial.scores | scores | mean)


ON_TASKS = replace(
    RESULTS,
    trials=(
        on_tasks(TRIALS[0], boolq=0.6, piqa=0.7),  # 500 bytes
        on_tasks(TRIALS[1], boolq=0.6, piqa=0.65),  # 400
        TRIALS[2],  # without tasks
        on_tasks(TRIALS[3], boolq=0.5, piqa=0.75),  # 600
    ),
    variants=(on_tasks(TRIALS[0], boolq=0.6, piqa=0.7), on_tasks(RESULTS.variants[1], boolq=0.55, piqa=0.6)),
)


def test_each_task_has_its_own_front() -> None:
    panels = task_panels(ON_TASKS)
    assert [*panels] == ["boolq", "piqa", "mean"] and task_panels(RESULTS) == {}
    assert [point.name for point in panels["boolq"].named] == ["uniform"]
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in fronts_table(panels).splitlines()
    )
    assert header == ["task", "plan", "bytes", "accuracy"]
    assert rows == [
        ["boolq", "trial 2", "400", "60.0 % ± 2.0"],
        ["piqa", "trial 2", "400", "65.0 % ± 2.0"],
        ["piqa", "trial 1", "500", "70.0 % ± 2.0"],
        ["piqa", "trial 5", "600", "75.0 % ± 2.0"],
        ["mean", "trial 2", "400", "62.5 % ± 1.0"],
        ["mean", "trial 1", "500", "65.0 % ± 1.0"],
    ]
    single = replace(ON_TASKS, trials=(on_tasks(TRIALS[0], boolq=0.6),))
    assert [*task_panels(single)] == ["boolq"]


def test_fronts_of_tasks_are_in_the_report_and_on_the_board(tmp_path: Path) -> None:
    boards: dict[str, list[str]] = {}
    for name, results in (("without", RESULTS), ("with", ON_TASKS)):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        write_search_report(folder, results)
        told = folder.report.read_text()
        has_tasks = name == "with"
        assert ("](tasks.png)" in told) is folder.tasks_picture.exists() is has_tasks
        assert not has_tasks or fronts_table(task_panels(results)) in told
        logger = TensorBoardLogger(tmp_path / name, "board")
        show_search(logger, results)
        events = EventAccumulator(logger.log_dir).Reload()
        boards[name] = events.Tags()["images"]
    assert sorted(boards["without"]) == ["search/allocations", "search/front"]
    assert sorted(boards["with"]) == ["search/allocations", "search/front", "search/tasks"]


@pytest.mark.parametrize("score", [{"boolq/accuracy": "x"}, {"boolq/error": [1]}, {"accuracy": None}, {"kl": "x"}])
def test_scores_that_are_no_numbers_are_named(score: dict[str, Any]) -> None:
    (name,) = score
    with pytest.raises(UserError, match=f"The score {name} of 'trial 1' must be a number, not "):
        replace(TRIALS[0], scores=TRIALS[0].scores | score)


def test_a_plan_that_failed_for_some_seeds_does_not_win() -> None:
    lucky, whole, worse = tried("a", 1, 1.0), tried("b", 1, 2.0, 1.5), tried("c", 1, 1.9, 1.8)
    assert [one.name for one in ranked([lucky, worse, whole])] == ["b", "c", "a"]


def test_the_report_of_a_search_can_be_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RESULTS.write(RunFolder(tmp_path).results)
    report_command([str(tmp_path)])
    assert variants_table(RESULTS) in RunFolder(tmp_path).report.read_text()
    assert variants_table(RESULTS) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": []}, "at least one variant"),
        (
            {"bits": [4]},
            r"'trial 1' has the choices \[0, 1\]; it must have one for each of 2 items, from 0 to 0|choices",
        ),
        ({"items": ["layer 0"]}, "one for each of 1 items"),
        ({"failed": {"x": "MemoryError"}}, "failed must be a number, not 'x'"),
        ({"trials": [{"name": "trial 1"}]}, r"trials\[0\] is not as it should be: average_bits, choices, losses"),
        ({"front": None}, "front must be a list, not None"),
        ({"parts": ["layer 0 kv_groups"]}, "There are 1 parts of layers, and numbers of units of 0"),
        ({"parts": ["layer 0 kv_groups"], "units": [4]}, r"'trial 1' keeps \(\) units; it must keep at least one"),
    ],
)
def test_results_that_hold_something_else_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "search.json"
    RESULTS.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"search.json': .*{said}"):
        SearchResults.read(path)


def test_widths_that_were_searched_stand_beside_bits(tmp_path: Path) -> None:
    NARROWED.write(path := tmp_path / "search.json")
    assert SearchResults.read(path) == NARROWED
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in variants_table(NARROWED).splitlines()]
    assert table[0][-4:] == ["bits", "multiply-adds", "KV groups", "FFN channels"]
    assert table[2][-4:] == ["8 8", "63,000", "3", "40 20"]
    write_search_report(RunFolder(tmp_path), NARROWED)
    assert f"{len(TRIALS)} plans were tried in {len(TRIALS)} trials" in RunFolder(tmp_path).report.read_text()


def test_trials_that_differ_in_multiply_adds_have_a_front_over_these_too() -> None:
    """By hand: trial 6 is as trial 2 and faster, trial 5 is slower than none of fewer bytes and less loss."""
    assert [one.name for one in pareto_front(NARROWED.trials)] == list(NARROWED.front)
    alike = [narrowed(trial, 2, 48, 7) for trial in TRIALS]  # which is the front of bytes and loss
    assert [one.name for one in pareto_front(alike)] == list(RESULTS.front)
    unknown = [*NARROWED.trials[:-1], TRIALS[-1]]  # of one it was not recorded
    assert [one.name for one in pareto_front(unknown)] == list(RESULTS.front)


def test_a_front_over_three_quantities_is_what_no_other_beats() -> None:
    generator = np.random.default_rng(1)
    costs = generator.integers(1, 20, (30, 3)).tolist()
    trials = [narrowed(tried(f"trial {place}", size, loss), count) for place, (size, loss, count) in enumerate(costs)]
    expected = {
        tuple(cost) for cost in costs if not any(other != cost and all(np.less_equal(other, cost)) for other in costs)
    }
    front = pareto_front(trials)
    assert len(front) == len(expected) > 3
    assert {(one.num_bytes, int(one.loss), (one.multiply_adds or 0) // 1000) for one in front} == expected


def test_the_report_names_the_multiply_adds_of_each_trial(tmp_path: Path) -> None:
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in trials_table(NARROWED).splitlines()
    )
    assert header == ["trial", "bytes", "multiply-adds", "validation loss", "front"]
    assert rows[0] == ["trial 1", "500", "57,000", "2.0000", "yes"]
    assert rows[1] == ["trial 2", "400", "56,000", "2.5000", ""]
    write_search_report(RunFolder(tmp_path), NARROWED)
    report = RunFolder(tmp_path).report.read_text()
    assert trials_table(NARROWED) in report
    assert "no other beats in loss, bytes and multiply-adds for a token at once: trial 6, trial 7, trial 1" in report
    write_search_report(RunFolder(tmp_path), RESULTS)
    assert "| multiply-adds |" not in RunFolder(tmp_path).report.read_text()


def test_the_board_has_the_multiply_adds_of_trials_that_differ_in_them(tmp_path: Path) -> None:
    for results, expected in ((NARROWED, [57000.0]), (RESULTS, None)):
        logger = TensorBoardLogger(tmp_path, str(expected))
        show_search(logger, results)
        events = EventAccumulator(str(Path(logger.log_dir) / "trial 1")).Reload()
        scalars = events.Tags()["scalars"]
        assert ("search/trial_multiply_adds" in scalars) is (expected is not None)
        if expected is not None:
            assert [event.value for event in events.Scalars("search/trial_multiply_adds")] == expected


def test_measured_seconds_stand_beside_multiply_adds_and_have_a_front(tmp_path: Path) -> None:
    """Trial 5 is the fastest of all here, and trial 1 slower than trial 8."""
    seconds = [7e-6, 6e-6, 5e-6, 1e-6, 4e-6, 8e-6, 3e-6]
    trials = [
        replace(trial, scores={**trial.scores, "seconds_per_token": {"1": one, "256": 1e-7}})
        for trial, one in zip(NARROWED.trials, seconds, strict=True)
    ]
    results = replace(NARROWED, trials=tuple(trials))
    results.write(path := tmp_path / "search.json")
    assert SearchResults.read(path) == results
    # Of the equal trials 2 and 6 the faster; trial 4 is faster than 1 but as trial 6 with more bytes and seconds.
    assert [one.name for one in pareto_front(trials, "1")] == ["trial 6", "trial 1", "trial 5", "trial 8"]
    assert [one.name for one in pareto_front(trials, "256")] == list(RESULTS.front)  # all the same
    write_search_report(RunFolder(tmp_path), results)
    report = RunFolder(tmp_path).report.read_text()
    assert "measured seconds of 1 token(s) at once in their place: trial 6, trial 1, trial 5, trial 8." in report
    header, _, first, *_ = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in trials_table(results).splitlines()
    )
    assert header[3:5] == ["µs a token, 1 at once", "µs a token, 256 at once"] and first[3:5] == ["7.0", "0.1"]
    with pytest.raises(UserError, match="The score seconds_per_token of 'trial 1'"):
        replace(trials[0], scores={**trials[0].scores, "seconds_per_token": {"1": "x"}})
