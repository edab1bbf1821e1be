"""Trials on workers that a search starts, on those of a cluster that others started, and in this process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.toys import Toy, Unpreparable, outcomes

from qpruner.errors import UserError
from qpruner.search import cluster
from qpruner.search.cluster import ClusterExecutor
from qpruner.search.executors import ExecutorConfig, make_executor
from qpruner.search.local_cluster import local_cluster
from qpruner.search.workers import Executor

KINDS = ("serial", "processes", "dask")
LIMIT = 3.0


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
def test_a_trial_whose_worker_dies_is_begun_once_more(
    executors: dict[str, Executor], kind: str, tmp_path: Path
) -> None:
    lasting = {"choices": [0.5], "do": "die once", "file": str(tmp_path / "begun")}
    found = dict(executors[kind].run([lasting, {"choices": [0.3], "sleep": 0.3}]))
    assert [found[place].scores for place in (0, 1)] == [{"loss": pytest.approx(0.04)}, {"loss": 0.0}]
    processes = (tmp_path / "begun").read_text().split()
    assert len(processes) == len({*processes}) == 2
    wait_for_two_workers(executors[kind])


@pytest.mark.parametrize("kind", ["processes", pytest.param("dask", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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


def test_workers_share_the_threads_of_the_search(executors: dict[str, Executor]) -> None:
    for kind in KINDS[1:]:
        (found,) = outcomes(executors[kind], {"do": "where"})
        assert found.scores and found.scores["environment"]["OMP_NUM_THREADS"] == "1"  # half of one, and at least one


def interrupted() -> Iterator[Any]:
    raise KeyboardInterrupt


def prepared_names() -> list[str]:
    return list(cluster._trials)


def test_what_keeps_every_worker_of_others_from_its_work_ends_the_search(address: str) -> None:
    config = ExecutorConfig("dask", address=address)
    with pytest.raises(UserError, match=r"^There is no bank\.$"), make_executor(config, Unpreparable("user")):
        pass


def test_workers_that_die_while_they_prepare_themselves_end_the_search() -> None:
    config = ExecutorConfig("processes")
    with pytest.raises(UserError, match="3 workers in a row were lost"), make_executor(config, Unpreparable("die")):
        pass


@pytest.mark.slow
def test_a_scheduler_that_goes_fails_no_trial() -> None:
    with local_cluster(1) as started:
        config = ExecutorConfig("dask", address=started.scheduler_address)
        with make_executor(config, Toy()) as executor:
            trials = executor.run([{"choices": [0.0]}, {"choices": [0.0], "sleep": 1000}])
            assert next(trials)[1].scores
            started.close()
            with pytest.raises(UserError, match="The Dask scheduler is gone"):
                next(trials)


@pytest.mark.slow
def test_a_cluster_with_too_few_workers(
    executors: dict[str, Executor], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_two_workers(executors["dask"])
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", 0.3)
    config = ExecutorConfig("dask", workers=3, address=address)
    with pytest.raises(UserError, match="has 2 workers and executor.workers is 3"), make_executor(config, Toy()):
        pass
