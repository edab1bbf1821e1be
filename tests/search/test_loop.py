"""The loop: the same search however it is cut, whoever ends first, and whatever fails."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import environment
from support.killed_search import IN_A_TRIAL, MOMENTS, NUM_TRIALS, WORKERS, key_of, loss_of, make_optimizer
from support.shared import filled_once
from support.toys import Counting, Toy, quadratic

from qpruner.errors import UserError
from qpruner.search.executors import ExecutorConfig, make_executor
from qpruner.search.ledger import Key, Ledger, TrialRecord
from qpruner.search.loop import Judge, run_trials
from qpruner.search.workers import Executor, Outcome


class Scripted:
    """Proposes what it is told to, and keeps what it hears."""

    def __init__(self, *values: Any) -> None:
        self.values = iter(values)
        self.heard: list[Any] = []

    def ask(self) -> Any:
        return SimpleNamespace(value=next(self.values))

    def tell(self, candidate: Any, loss: Any) -> None:
        self.heard.append((candidate.value, loss))


def search(path: Path, executor: Executor | None = None, **changes: Any) -> tuple[TrialRecord, ...]:
    ledger = Ledger.open(path, {"seed": 7})
    options: dict[str, Any] = {
        "num_trials": NUM_TRIALS,
        "workers": WORKERS,
        "key_of": key_of,
        "on_trial": lambda trial: None,
    }
    optimizer = changes.pop("optimizer", None) or make_optimizer()
    judge = Judge(changes.pop("score_of", loss_of), changes.pop("first_penalty", 1e6))
    run_trials(optimizer, ledger, executor or Counting(), judge=judge, **options | changes)
    return ledger.records


def scripted(path: Path, *values: Any, **changes: Any) -> tuple[list[float], tuple[TrialRecord, ...]]:
    """What an optimizer that proposes these values is told of each, and the ledger."""
    optimizer = Scripted(*values)
    options = {"num_trials": len(values), "workers": 1, "key_of": lambda value: {"choices": [value]}}
    records = search(path, optimizer=optimizer, **options | changes)
    assert [value for value, _ in optimizer.heard] == list(values)
    return [told for _, told in optimizer.heard], records


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[TrialRecord, ...]]:
    path = tmp_path_factory.mktemp("uninterrupted") / "ledger.jsonl"
    return path, search(path)


def outcome(records: Sequence[TrialRecord]) -> list[Any]:
    return [(trial.key, trial.told, trial.scores, trial.repeats) for trial in records]


def test_is_the_loop_one_would_write_by_hand(uninterrupted: tuple[Path, tuple[TrialRecord, ...]]) -> None:
    optimizer, keys = make_optimizer(), []
    for _ in range(0, NUM_TRIALS, WORKERS):
        candidates = [optimizer.ask() for _ in range(WORKERS)]
        for candidate in candidates:
            keys.append(key_of(candidate.value))
            optimizer.tell(candidate, quadratic(keys[-1])["loss"])
    records = uninterrupted[1]
    assert [trial.key for trial in records] == keys
    assert [trial.scores for trial in records] == [quadratic(key) for key in keys]
    assert any(trial.repeats is not None for trial in records)  # so that the tests below see repeated trials


def test_goes_on_from_any_number_of_records(
    uninterrupted: tuple[Path, tuple[TrialRecord, ...]], tmp_path: Path
) -> None:
    whole, expected = uninterrupted
    lines = whole.read_text().splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(lines[:count]))
        held = {trial.number for trial in Ledger.open(path, {"seed": 7}).records if trial.done}
        executor, seen = Counting(), list[int]()
        records = search(path, executor, on_trial=lambda trial, seen=seen: seen.append(trial.number))
        assert outcome(records) == outcome(expected)
        fresh = [trial for trial in expected if trial.number not in held]
        assert executor.ran == [trial.key["choices"] for trial in fresh if trial.repeats is None]
        assert seen == [trial.number for trial in fresh]


def test_order_of_completion_changes_nothing(
    uninterrupted: tuple[Path, tuple[TrialRecord, ...]], tmp_path: Path
) -> None:
    assert outcome(search(tmp_path / "backwards.jsonl", Counting(backwards=True))) == outcome(uninterrupted[1])
    finished = []
    for slow_sum in (0.0, 3.0):
        path = tmp_path / f"{slow_sum}.jsonl"
        with make_executor(ExecutorConfig("processes", workers=2), Toy(slow_sum=slow_sum)) as executor:
            assert outcome(search(path, executor)) == outcome(uninterrupted[1])
        finished.append([line.partition('"time"')[0] for line in path.read_text().splitlines() if "finished" in line])
    assert sorted(finished[0]) == sorted(finished[1])
    assert finished[0] != finished[1]


def test_more_trials_are_those_of_a_longer_search(
    uninterrupted: tuple[Path, tuple[TrialRecord, ...]], tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    assert outcome(search(path, num_trials=5)) == outcome(uninterrupted[1][:5])
    assert outcome(search(path)) == outcome(uninterrupted[1])
    executor = Counting()
    search(path, executor, num_trials=3)
    assert executor.ran == []


def test_the_number_of_workers_may_change_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    search(path, workers=3, num_trials=6)
    search(path, workers=1, num_trials=8)
    records = search(path, workers=4)
    assert [trial.told for trial in records] == [0, 0, 0, 3, 3, 3, 6, 7, 7, 7, 7, 11, 11, 11]
    executor = Counting()
    assert search(path, executor, workers=2) == records
    assert executor.ran == []


def test_a_repeated_key_is_not_run_again_and_counts(tmp_path: Path) -> None:
    executor, seen = Counting(), list[TrialRecord]()
    told, records = scripted(
        tmp_path / "ledger", 0.3, 1.3, 1.3, 0.3, 1.3, executor=executor, workers=3, on_trial=seen.append
    )
    assert executor.ran == [[0.3], [1.3]]
    assert told == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert [trial.repeats for trial in records] == [None, None, 1, 0, 1]
    assert tuple(seen) == records


def doing(value: Any) -> Key:
    return {"choices": [value]} if isinstance(value, float) else {"choices": [], "do": value}


def test_failed_trials_are_told_as_a_penalty_and_not_run_again(tmp_path: Path) -> None:
    path, values = tmp_path / "ledger", ("raise", 1.3, "memory", 2.3, "nan", "raise")
    expected = [1e6, 1.0, 2.0, 4.0, 7.0, 7.0]
    executor = Counting()
    told, records = scripted(path, *values, key_of=doing, executor=executor)
    assert told == pytest.approx(expected)
    assert [trial.why for trial in records] == [
        "LookupError: no such layer", None, "MemoryError", None, "loss is nan", "LookupError: no such layer",
    ]  # fmt: skip
    assert records[5].repeats == 0
    assert len(executor.ran) == 5
    again, _ = scripted(path, *values, key_of=doing, executor=executor)
    assert again == told
    assert len(executor.ran) == 5


def test_a_penalty_has_the_shape_of_a_score(tmp_path: Path) -> None:
    told, _ = scripted(
        tmp_path / "ledger",
        *("raise", 0.3, "memory", 1.3, "tensor"),
        key_of=doing,
        score_of=lambda scores: [scores["loss"], 5.0 - scores["loss"]],
        first_penalty=[9.0, 8.0],
    )
    assert told == [[9.0, 8.0], [0.0, 5.0], [1.0, 10.0], [1.0, 4.0], [2.0, 6.0]]


def test_a_score_that_is_not_finite_fails(tmp_path: Path) -> None:
    told, records = scripted(
        tmp_path / "ledger", 0.3, 1.3, score_of=lambda scores: 2 / scores["loss"] if scores["loss"] else float("inf")
    )
    assert [trial.why for trial in records] == ["the score is inf", None]
    assert told == [1e6, 2.0]


def test_a_trial_that_the_search_was_cut_off_in_twice_fails(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    class Cutting(Counting):
        def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
            if [1.3] in [key["choices"] for key in keys]:
                raise Cut
            yield from super().run(keys)

    path = tmp_path / "ledger"
    for _ in range(2):
        with pytest.raises(Cut):
            scripted(path, 0.3, 1.3, 2.3, executor=Cutting())
    told, records = scripted(path, 0.3, 1.3, 2.3, executor=Cutting())
    assert [trial.why for trial in records] == [None, "the search was cut off 2 times while it ran", None]
    assert [trial.attempts for trial in records] == [1, 2, 1]
    assert told == pytest.approx([0.0, 1.0, 4.0])


def test_a_ledger_that_does_not_fit_is_refused(
    uninterrupted: tuple[Path, tuple[TrialRecord, ...]], tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    shutil.copy(uninterrupted[0], path)
    with pytest.raises(UserError, match=r"its trial \d+ was \{'choices'.* and now the optimizer proposes"):
        search(path, optimizer=make_optimizer(seed=8))
    assert path.read_bytes() == uninterrupted[0].read_bytes()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        script = [sys.executable, "-m", "support.killed_search", str(folder)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment())
        assert done.returncode == 0, done.stderr

    return filled_once(tmp_path_factory, "killed_searches", fill)


@pytest.mark.parametrize("moment", [*MOMENTS, *IN_A_TRIAL])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(
    killed: Path, moment: str, uninterrupted: tuple[Path, tuple[TrialRecord, ...]]
) -> None:
    path = killed / f"{moment}.jsonl"
    assert outcome(Ledger.open(path, {"seed": 7}).records) == outcome(uninterrupted[1])
    if moment == "never":
        return
    at_cut = Ledger.open(path.with_suffix(".cut"), {"seed": 7}).records
    assert sum(trial.done for trial in at_cut) < NUM_TRIALS
    if moment.startswith("serial"):  # each outcome was written before the next trial began
        assert sum(trial.done and trial.repeats is None for trial in at_cut) == int(moment.partition("-")[2]) - 1
    before = path.with_suffix(".evaluations_at_cut")
    all_lines = path.with_suffix(".evaluations").read_text().splitlines()
    lines = all_lines[len(before.read_text().splitlines()) if before.exists() else 0 :]
    evaluated = [line.partition(" ")[2] for line in lines]
    unfinished = [trial.key["choices"] for trial in uninterrupted[1] if trial.repeats is None]
    unfinished = [key for key in unfinished if key not in [trial.key["choices"] for trial in at_cut if trial.done]]
    assert sorted(evaluated) == sorted(map(str, unfinished))


def test_workers_end_with_the_search_that_was_killed(killed: Path) -> None:
    lines = (killed / "processes-5.evaluations_at_cut").read_text().splitlines()
    pids = {int(line.partition(" ")[0]) for line in lines}
    assert len(pids) == 2  # one of them in a trial without end
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
