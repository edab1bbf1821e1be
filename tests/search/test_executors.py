"""Executors with real processes and a real Dask cluster."""

import builtins
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from toys import Toy, Unpreparable

from qpruner.errors import UserError
from qpruner.search import cluster
from qpruner.search.executors import ExecutorConfig, ProcessWorker, make_executor, worker_environments
from qpruner.search.ledger import Key, Scores
from qpruner.search.workers import Executor, Outcome, evaluate

KINDS = ("serial", "processes", "dask")
LIMIT = 1.0


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[str, Executor]]:
    """One of each kind, the parallel ones with two workers; whatever a test does to it, the next one finds it whole."""
    threads = os.environ.get("OMP_NUM_THREADS")
    with (
        make_executor(ExecutorConfig("serial"), Toy()) as serial,
        make_executor(ExecutorConfig("processes", workers=2, time_limit=LIMIT), Toy()) as processes,
        make_executor(ExecutorConfig("dask", workers=2, time_limit=LIMIT), Toy()) as dask,
    ):
        yield {"serial": serial, "processes": processes, "dask": dask}
    assert os.environ.get("OMP_NUM_THREADS") == threads  # Dask sets it in this process too


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


def test_a_cluster_is_found_by_its_address_and_forgets_what_was_prepared(executors: dict[str, Executor]) -> None:
    wait_for_two_workers(executors["dask"])
    # The pool's own cluster stands for one that others started.
    worker = executors["dask"]._workers[0]  # type: ignore[attr-defined]
    client, own = worker.crew.client, worker.crew.name
    config = ExecutorConfig("dask", workers=2, address=client.scheduler.address)
    with make_executor(config, Toy()) as executor:
        assert [outcome.scores for outcome in outcomes(executor, {"choices": [1.3]}, {})] == [
            {"loss": 1.0},
            {"loss": pytest.approx(0.09)},
        ]
        assert all(len(names) == 2 for names in client.run(prepared_names).values())
    assert list(client.run(prepared_names).values()) == [[own]] * 2


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


def test_the_environment_is_given_to_the_worker_and_not_kept() -> None:
    before = dict(os.environ)
    worker = ProcessWorker(Toy(), {"QPRUNER_DEVICE": "3", "HOME": "/nowhere"})
    try:
        assert dict(os.environ) == before
        while not worker.ready():
            time.sleep(0.01)
        worker.begin({"choices": [], "do": "where"})
        while (outcome := worker.answer()) is None:
            time.sleep(0.01)
    finally:
        worker.dismiss()
    assert outcome.scores
    assert outcome.scores["environment"]["QPRUNER_DEVICE"] == "3"
    assert outcome.scores["environment"]["HOME"] == "/nowhere"


@pytest.mark.parametrize("kind", ["serial", "processes"])
def test_what_keeps_every_worker_from_its_work_ends_the_search(kind: str) -> None:
    config = ExecutorConfig(kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^There is no bank\.$"), make_executor(config, Unpreparable("user")):
        pass
    with pytest.raises(RuntimeError, match="There is no bank"), make_executor(config, Unpreparable("other")):
        pass


def test_what_keeps_every_cluster_worker_from_its_work_ends_the_search(executors: dict[str, Executor]) -> None:
    address = executors["dask"]._workers[0].crew.client.scheduler.address  # type: ignore[attr-defined]
    config = ExecutorConfig("dask", address=address)
    with pytest.raises(UserError, match=r"^There is no bank\.$"), make_executor(config, Unpreparable("user")):
        pass


def test_workers_that_die_while_they_prepare_themselves_end_the_search() -> None:
    config = ExecutorConfig("processes")
    with pytest.raises(UserError, match="3 workers in a row were lost"), make_executor(config, Unpreparable("die")):
        pass


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    config = ExecutorConfig("dask", address="tcp://127.0.0.1:9")
    with (
        pytest.raises(UserError, match="No Dask scheduler answers at 'tcp://127.0.0.1:9'"),
        make_executor(config, Toy()),
    ):
        pass


def test_a_cluster_with_too_few_workers(executors: dict[str, Executor], monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_two_workers(executors["dask"])
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", 0.3)
    address = executors["dask"]._workers[0].crew.client.scheduler.address  # type: ignore[attr-defined]
    config = ExecutorConfig("dask", workers=3, address=address)
    with pytest.raises(UserError, match="has 2 workers and executor.workers is 3"), make_executor(config, Toy()):
        pass


def test_dask_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "distributed":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    remedy = r"pip install 'qpruner\[cluster\]'"
    with pytest.raises(UserError, match=remedy), make_executor(ExecutorConfig("dask"), Toy()):
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
