"""Scripts that repeat runs: random kills, disks that fill up, memory and files of long ones; and what they tell."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.runs import in_own_process

SCRIPTS = Path(__file__).parents[1] / "scripts"
ALONE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def random_kills(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import random_kills

    return random_kills


@pytest.fixture
def long_runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import long_runs

    return long_runs


def started(trial: int) -> dict[str, Any]:
    return {"record": "started", "trial": trial, "key": {"seed": 0}, "told": 0, "point": None, "time": "now"}


def finished(trial: int, loss: float, seconds: float = 1.0) -> dict[str, Any]:
    scores = {"loss": loss, "seconds": {"all": seconds}}
    return {"record": "finished", "trial": trial, "scores": scores, "repeats": None, "time": "now"}


def write_ledger(path: Path, *entries: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ({"kind": "ledger"}, *entries)))


def write_run(folder: Path, seconds: float) -> Path:
    """What a run leaves, in small, all of which tells how long it took."""
    model = folder / "run" / "model"
    (model / "reference").mkdir(parents=True)
    save_file({"codes": torch.arange(9)}, model / "model.safetensors")
    save_file({"logits": torch.tensor([1.0, 2.0])}, model / "reference" / "logits.safetensors")
    (folder / "run" / "summary.json").write_text(json.dumps({"stages": [{"loss": 0.5, "seconds": seconds}]}))
    (folder / "run" / "run.log").write_text(f"It took {seconds} s.")
    (folder / "run" / "adapter.json").write_text(json.dumps({"base": str(folder / "run")}))
    write_ledger(folder / "run" / "ledger.jsonl", *[started(0)] * int(seconds), finished(0, 0.5, seconds))
    return folder


def test_runs_that_took_another_time_are_equal_and_others_are_not(random_kills: ModuleType, tmp_path: Path) -> None:
    whole, other = write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2)

    def differing() -> list[str]:
        return random_kills.differing(dict(random_kills.content_of(whole)), dict(random_kills.content_of(other)))

    assert differing() == []
    run = other / "run"
    save_file({"logits": torch.tensor([1.0, 2.000001])}, run / "model" / "reference" / "logits.safetensors")
    assert differing() == []  # the last digits
    save_file({"logits": torch.tensor([1.0, 2.1])}, run / "model" / "reference" / "logits.safetensors")
    save_file({"codes": torch.arange(9).flip(0)}, run / "model" / "model.safetensors")
    (run / ".plan.json.here.12.tmp").write_text("{")
    (run / "summary.json").write_text(json.dumps({"stages": [{"loss": 0.6, "seconds": 1}]}))
    write_ledger(run / "ledger.jsonl", started(0), finished(0, 0.4))
    assert differing() == [
        "run/.plan.json.here.12.tmp",
        "run/ledger.jsonl",
        "run/model/model.safetensors",
        "run/model/reference/logits.safetensors",
        "run/summary.json",
    ]


def test_a_trial_in_its_second_attempt_is_seen(random_kills: ModuleType, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    for entries, second in (
        ([started(0)], False),
        ([started(0), started(1), started(0)], True),
        ([started(0), started(0), finished(0, 0.5), started(1)], False),
    ):
        write_ledger(ledger, *entries)
        with ledger.open("a") as file:
            file.write('{"record": "star')  # as a kill leaves it
        assert random_kills.in_second_attempt(tmp_path) == second


def test_growth_is_seen(long_runs: ModuleType) -> None:
    assert long_runs.slope([5.0, 7.0, 9.0, 11.0]) == pytest.approx(2)
    assert long_runs.slope([3.0, 5.0, 3.0, 5.0, 3.0]) == pytest.approx(0)


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_as_others(tmp_path: Path) -> None:
    done = in_own_process(str(SCRIPTS / "random_kills.py"), str(tmp_path), "--kills", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed after") == 6 and done.stdout.endswith("All are equal.\n")


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0,
    reason="needs a name space in which a disk can be mounted",
)
def test_runs_whose_disk_is_full_end_as_others_when_there_is_room(tmp_path: Path) -> None:
    done = in_own_process(str(SCRIPTS / "full_disks.py"), str(tmp_path), "--times", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should be") == 6 and "Make room" in done.stdout


@pytest.mark.slow
def test_memory_and_open_files_of_long_runs_do_not_grow(tmp_path: Path) -> None:
    done = in_own_process(str(SCRIPTS / "long_runs.py"), str(tmp_path), "--trials", "40", "--steps", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["search", "fit"]
