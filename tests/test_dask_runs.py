"""Searches on a Dask cluster that others started: a scheduler and workers in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import environment

from qpruner.commands import run
from qpruner.records.folder import RunFolder

TRIALS = 6
MOMENT = 0.3  # for what a worker had sent already to reach the scheduler
SECONDS = 120


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Address of a scheduler with two workers, each of which its nanny restarts."""
    told = tmp_path / "scheduler.json"
    quiet = {"DASK_DISTRIBUTED__WORKER__DAEMON": "False", "OMP_NUM_THREADS": "1"}
    here = ("--host", "127.0.0.1", "--scheduler-file", str(told), "--no-dashboard")
    commands = [
        ("scheduler", "--port", "0", *here),
        (
            "worker",
            "--nworkers",
            "2",
            "--nthreads",
            "1",
            "--memory-limit",
            "0",
            "--local-directory",
            str(tmp_path),
            *here,
        ),
    ]
    log = (tmp_path / "dask.log").open("w")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *command], stdout=log, stderr=log, env=environment(**quiet), cwd=tmp_path
        )
        for command in commands
    ]
    try:
        wait_for(lambda: told.exists() and told.stat().st_size)  # it is there before it is whole
        yield json.loads(told.read_text())["address"]
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGINT)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        log.close()


def wait_for(happened: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def kills_a_worker(address: str, ledger: Path, after: int) -> Iterator[list[str]]:
    """Kills a worker in the middle of a trial, once so many are done; the addresses of those that were killed."""
    from distributed import Client

    killed: list[str] = []
    over = threading.Event()

    def kill() -> None:
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=SECONDS)
            pids = client.run(os.getpid)
            while not over.is_set() and not killed:
                time.sleep(0.02)
                if not ledger.exists() or ledger.read_text().count('"finished"') < after:
                    continue
                for worker, tasks in client.processing().items():
                    if any("_evaluate" in str(task) for task in tasks) and worker in pids:
                        os.kill(pids[worker], signal.SIGSTOP)
                        time.sleep(MOMENT)
                        if client.processing()[worker]:  # it had not sent its scores
                            os.kill(pids[worker], signal.SIGKILL)
                            killed.append(worker)
                            break
                        os.kill(pids[worker], signal.SIGCONT)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


def trials_of(path: Path) -> list[tuple[Any, ...]]:
    """Key, proposal and scores without seconds of every trial of a ledger, which is whole."""
    started: dict[int, Any] = {}
    ended: dict[int, Any] = {}
    lines = path.read_text().splitlines()
    for entry in map(json.loads, lines[1:]):
        match entry["record"]:
            case "started":
                assert entry["trial"] not in ended
                started[entry["trial"]] = entry["key"], entry["told"], entry["point"]
            case "finished" | "failed":
                assert entry["trial"] in started and entry["trial"] not in ended
                scores = {name: value for name, value in entry.get("scores", {}).items() if name != "seconds"}
                ended[entry["trial"]] = scores, entry.get("why"), entry["repeats"]
    assert started.keys() == ended.keys()
    return [(*started[number], *ended[number]) for number in sorted(started)]


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_trial_changes_nothing_of_a_search(
    config_that_prunes: dict[str, Any], tmp_path: Path, address: str
) -> None:
    allocation = {
        "allocation": "sensitivity",
        "budget": {"average_bits": 6.2},
        "deciding": {"granularity": "unit", "calibration": {"num_sequences": 8, "length": 12, "batch_size": 2}},
    }
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": allocation}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    executor = {"kind": "dask", "workers": 2, "address": address}
    search = {"trials": TRIALS, "steps": 20, "finalists": 1, "finalist_seeds": 1, "executor": executor}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config_that_prunes, "search": search}))
    disturbed, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    with kills_a_worker(address, disturbed.ledger, after=2) as killed:
        run(["search", "--config", str(path)])
    assert len(killed) == 1 and f"The worker at {killed[0]} is replaced" in disturbed.log.read_text()
    run(["search", "--config", str(path), "--run.name", "whole"])
    trials = trials_of(disturbed.ledger)
    assert len(trials) == TRIALS and all(scores and why is None for *_, scores, why, _ in trials)
    assert trials == trials_of(whole.ledger) and trials_of(disturbed.variants) == trials_of(whole.variants)
    assert disturbed.plan.read_bytes() == whole.plan.read_bytes()
    assert disturbed.pareto.read_bytes() == whole.pareto.read_bytes()
