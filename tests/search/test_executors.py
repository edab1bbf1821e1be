"""Executors with real processes: those that a search starts, and those of a cluster that others started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import environment
from support.toys import Toy, Unpreparable

from qpruner.errors import UserError
from qpruner.search import cluster
from qpruner.search.cluster import ClusterExecutor
from qpruner.search.executors import ExecutorConfig, check_executor, make_executor
from qpruner.search.ledger import Key, Scores
from qpruner.search.local_cluster import local_cluster, worker_environments
from qpruner.search.workers import Executor, Outcome, evaluate

KINDS = ("serial", "processes", "dask")
LIMIT = 1.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of the scheduler of a cluster that stands for that of others, with two workers."""
    with local_cluster(2) as started:
        yield started.scheduler_address


@pytest.fixture(scope="module")
def executors(address: str) -> Iterator[dict[str, Executor]]:
    """One of each kind, the parallel ones with two workers; whatever a test does to it, the next one finds it whole."""
    environment = dict(os.environ)
    with (
        make_executor(ExecutorConfig("serial"), Toy()) as serial,
        make_executor(ExecutorConfig("processes", workers=2, time_limit=LIMIT), Toy()) as processes,
        make_executor(ExecutorConfig("dask", workers=2, address=address, time_limit=LIMIT), Toy()) as dask,
    ):
        yield {"serial": serial, "processes": processes, "dask": dask}
    assert dict(os.environ) == environment  # Dask sets threads in this process, too


def outcomes(executor: Executor, *keys: dict[str, Any]) -> list[Outcome]:
    found = dict(executor.run([{"choices": [0.0], **key} for key in keys]))
    assert sorted(found) == list(range(len(keys)))
    return [found[place] for place in range(len(keys))]


def wait_for_two_workers(executor: Executor) -> None:
    deadline = time.monotonic() + 20
    pids: set[int] = set()
    while len(pids) < 2:
        assert time.monotonic() < deadline
        found = outcomes(executor, *[{"do": "where", "sleep": 0.1}] * 2)
        pids = {outcome.scores["pid"] for outcome in found if outcome.scores}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluates_each_key_once_and_gives_its_place(executors: dict[str, Executor], kind: str) -> None:
    found = outcomes(executors[kind], *({"choices": [0.3, x]} for x in range(5)))
    assert [outcome.scores for outcome in found] == [{"loss": (x - 0.3) ** 2} for x in range(5)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_an_outcome(executors: dict[str, Executor], kind: str) -> None:
    raised, memory, tensor, good = outcomes(executors[kind], {"do": "raise"}, {"do": "memory"}, {"do": "tensor"}, {})
    assert (raised.scores, raised.why) == (None, "LookupError: no such layer")
    assert 'raise LookupError("no such layer' in raised.details
    assert memory.why == "MemoryError"
    assert tensor.why == "TypeError: Object of type object is not JSON serializable"
    assert good.scores


@pytest.mark.parametrize("kind", KINDS)
def test_prepares_once_a_worker(executors: dict[str, Executor], kind: str) -> None:
    found = outcomes(executors[kind], *[{"do": "where", "sleep": 0.05}] * 6)
    prepared = {outcome.scores["prepared"] for outcome in found if outcome.scores}
    assert len(prepared) == (1 if kind == "serial" else 2)
    pids = {outcome.scores["pid"] for outcome in found if outcome.scores}
    assert (os.getpid() in pids) == (kind == "serial")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_gives_outcomes_as_they_come(executors: dict[str, Executor], kind: str) -> None:
    keys = [{"choices": [0.0], "sleep": seconds} for seconds in (0.4, 0.0, 0.0)]
    assert [place for place, _ in executors[kind].run(keys)] == [1, 2, 0]


@pytest.mark.parametrize(("kind", "how"), [("processes", "die"), ("processes", "kill"), ("dask", "kill")])
def test_a_worker_that_dies_costs_its_trial_only(executors: dict[str, Executor], kind: str, how: str) -> None:
    first, dead, last, other = outcomes(executors[kind], {"sleep": 0.5}, {"do": how}, {}, {})
    assert dead.why == "the worker died"
    assert first.scores and last.scores and other.scores
    wait_for_two_workers(executors[kind])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_worker_that_never_answers_costs_its_trial_only(executors: dict[str, Executor], kind: str) -> None:
    began = time.monotonic()
    silent, *others = outcomes(executors[kind], {"sleep": 1000}, {}, {}, {"sleep": LIMIT / 3})
    assert silent.why == f"no answer in {LIMIT:g} s"
    assert all(outcome.scores for outcome in others)
    assert LIMIT < time.monotonic() - began < LIMIT + 8
    wait_for_two_workers(executors[kind])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_worker_that_dies_between_trials_costs_nothing(executors: dict[str, Executor], kind: str) -> None:
    (where,) = outcomes(executors[kind], {"do": "where"})
    assert where.scores
    os.kill(where.scores["pid"], signal.SIGKILL)
    time.sleep(0.3)
    assert all(outcome.scores for outcome in outcomes(executors[kind], {}, {}, {}))


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_is_still_replaced() -> None:
    """Also where it is gone 15 seconds after it was first lost, when Dask would give it up."""
    with make_executor(ExecutorConfig("processes"), Toy()) as executor:
        began = time.monotonic()
        while time.monotonic() < began + 18:
            (where,) = outcomes(executor, {"do": "where"})
            if where.scores:
                os.kill(where.scores["pid"], signal.SIGKILL)
            time.sleep(0.3)
        time.sleep(3)
        assert all(outcome.scores for outcome in outcomes(executor, {}, {}))


def test_workers_of_others_forget_what_was_prepared_and_take_no_part_in_what_is_left(
    executors: dict[str, Executor], address: str
) -> None:
    wait_for_two_workers(executors["dask"])
    other = executors["dask"]
    assert isinstance(other, ClusterExecutor)
    with make_executor(ExecutorConfig("dask", workers=2, address=address), Toy()) as executor:
        assert [outcome.scores for outcome in outcomes(executor, {"choices": [1.3]}, {})] == [
            {"loss": 1.0},
            {"loss": pytest.approx(0.09)},
        ]
        assert all(len(names) == 2 for names in other.client.run(prepared_names).values())
    assert list(other.client.run(prepared_names).values()) == [[other.name]] * 2


def test_workers_of_others_that_are_at_work_when_a_search_ends_are_restarted(
    executors: dict[str, Executor], address: str
) -> None:
    wait_for_two_workers(executors["dask"])
    other = executors["dask"]
    assert isinstance(other, ClusterExecutor)
    before = set(other.client.nthreads())
    with make_executor(ExecutorConfig("dask", workers=1, address=address), Toy()) as executor:
        trials = executor.run([{"choices": [0.0]}, {"choices": [0.0], "sleep": 1000}])
        assert next(trials)[0] == 0
        executor._look = interrupted  # type: ignore[attr-defined]  # as ^C while the second one runs
        with pytest.raises(KeyboardInterrupt):
            next(trials)
    wait_for_two_workers(executors["dask"])
    assert len(before & set(other.client.nthreads())) == 1


def interrupted() -> Iterator[Any]:
    raise KeyboardInterrupt


def prepared_names() -> list[str]:
    return list(cluster._trials)


def test_workers_share_threads_and_gpus(executors: dict[str, Executor], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,1,7")
    environments = worker_environments(4)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["5", "1", "7", "5"]
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"2"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in worker_environments(2)] == ["0", "1"]
    for kind in KINDS[1:]:
        (found,) = outcomes(executors[kind], {"do": "where"})
        assert found.scores and found.scores["environment"]["OMP_NUM_THREADS"] == "1"  # half of one, and at least one


def test_each_worker_has_the_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setattr("qpruner.search.local_cluster.worker_environments", lambda workers: given[:workers])
    before = dict(os.environ)
    with make_executor(ExecutorConfig("dask", workers=2), Toy()) as executor:  # without an address as `processes`
        trials = outcomes(executor, *[{"do": "where", "sleep": 0.2}] * 2)
        devices = {trial.scores["environment"]["CUDA_VISIBLE_DEVICES"] for trial in trials if trial.scores}
    assert devices == {"5", "1"}
    assert dict(os.environ) == before


@pytest.mark.parametrize("kind", ["serial", "processes"])
def test_what_keeps_every_worker_from_its_work_ends_the_search(kind: str) -> None:
    config = ExecutorConfig(kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^There is no bank\.$"), make_executor(config, Unpreparable("user")):
        pass
    with pytest.raises(RuntimeError, match="There is no bank"), make_executor(config, Unpreparable("other")):
        pass


def test_what_keeps_every_worker_of_others_from_its_work_ends_the_search(address: str) -> None:
    config = ExecutorConfig("dask", address=address)
    with pytest.raises(UserError, match=r"^There is no bank\.$"), make_executor(config, Unpreparable("user")):
        pass


def test_workers_that_die_while_they_prepare_themselves_end_the_search() -> None:
    config = ExecutorConfig("processes")
    with pytest.raises(UserError, match="3 workers in a row were lost"), make_executor(config, Unpreparable("die")):
        pass


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
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


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match="No Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        check_executor(ExecutorConfig("dask", address="tcp://127.0.0.1:9"))


def test_a_scheduler_that_goes_fails_no_trial() -> None:
    with local_cluster(1) as started:
        config = ExecutorConfig("dask", address=started.scheduler_address)
        with make_executor(config, Toy()) as executor:
            trials = executor.run([{"choices": [0.0]}, {"choices": [0.0], "sleep": 1000}])
            assert next(trials)[1].scores
            started.close()
            with pytest.raises(UserError, match="The Dask scheduler is gone"):
                next(trials)


def test_a_cluster_with_too_few_workers(
    executors: dict[str, Executor], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_two_workers(executors["dask"])
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", 0.3)
    config = ExecutorConfig("dask", workers=3, address=address)
    with pytest.raises(UserError, match="has 2 workers and executor.workers is 3"), make_executor(config, Toy()):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "threads"}, "serial, processes and dask"),
        ({"workers": 0}, "at least 1"),
        ({"kind": "processes", "time_limit": 0.0}, "above 0"),
        ({"kind": "processes", "time_limit": float("nan")}, "above 0"),
        ({"workers": 2}, "one trial at a time"),
        ({"time_limit": 5.0}, "executor.kind processes, with 1 worker"),
        ({"kind": "processes", "address": "tcp://a:1"}, "only executor.kind dask"),
    ],
)
def test_impossible_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExecutorConfig(**options)


def test_a_mistake_of_the_user_is_told_without_the_name_of_its_class() -> None:
    def refused(key: Key) -> Scores:
        raise UserError("The loss is not finite.")

    assert evaluate(refused, {}).why == "The loss is not finite."
