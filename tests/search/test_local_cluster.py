"""Workers of this machine: what each of them has of it, and that they end whatever ends the search."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import environment
from support.toys import Toy, outcomes

from qpruner.search.executors import ExecutorConfig, make_executor
from qpruner.search.local_cluster import environment_kept, thread_limits, worker_environments


@pytest.mark.parametrize(("threads", "workers", "each"), [(9, 4, "2"), (9, 9, "1"), (2, 5, "1"), (8, 1, "8")])
def test_workers_share_threads(monkeypatch: pytest.MonkeyPatch, threads: int, workers: int, each: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert thread_limits(workers) == {"OMP_NUM_THREADS": each, "MKL_NUM_THREADS": each}


@pytest.mark.parametrize(
    ("visible", "count", "workers", "devices"),
    [
        ("5,1,7", 3, 4, ["5", "1", "7", "5"]),  # with more workers than GPUs, some share one
        ("5,1,7", 3, 2, ["5", "1"]),
        ("5,9", 1, 2, ["5", "5"]),  # torch does not see the other
        (None, 3, 2, ["0", "1"]),
        ("", 2, 2, ["0", "1"]),
        (None, 0, 2, [None, None]),
    ],
)
def test_workers_share_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, workers: int, devices: list[str | None]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environments = worker_environments(workers)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments] == devices
    assert all(environment.items() >= thread_limits(workers).items() for environment in environments)


def test_the_environment_is_afterwards_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOES", "1")
    monkeypatch.setenv("CHANGES", "1")
    before = dict(os.environ)
    with environment_kept():
        del os.environ["GOES"]
        os.environ |= {"CHANGES": "2", "COMES": "3"}
    assert dict(os.environ) == before


def test_each_worker_has_the_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setattr("qpruner.search.local_cluster.worker_environments", lambda workers: given[:workers])
    before = dict(os.environ)
    with make_executor(ExecutorConfig("dask", workers=2), Toy()) as executor:  # without an address as `processes`
        trials = outcomes(executor, *[{"do": "where", "sleep": 0.2}] * 2)
        devices = {trial.scores["environment"]["CUDA_VISIBLE_DEVICES"] for trial in trials if trial.scores}
    assert devices == {"5", "1"}
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "how", ["SIGKILL", *(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGINT", "SIGTERM"))]
)
def test_workers_end_with_the_search_however_it_ends(how: str) -> None:
    """While each is at a trial that never answers."""
    search = subprocess.Popen(
        [sys.executable, "-m", "support.hanging_search"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    assert search.stdout is not None
    pids = [int(pid) for pid in search.stdout.readline().split()]
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    if how == "SIGINT":
        os.killpg(search.pid, signal.SIGINT)  # as the terminal does
    else:
        search.send_signal(signal.Signals[how])
    _, errors = search.communicate(timeout=30)
    assert search.returncode == -signal.Signals[how]
    if how == "SIGINT":
        assert errors.strip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_script_without_a_main_part_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(
        "from support.toys import Toy\n"
        "from qpruner.search.executors import ExecutorConfig, make_executor\n"
        "with make_executor(ExecutorConfig('processes'), Toy()):\n"
        "    pass\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment())
    assert ran.returncode == 1
    assert "let the search stand under: if __name__ == '__main__'" in ran.stderr.splitlines()[-1]
