"""Where trials run: what the options allow, and which executor they give."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.toys import Toy, Unpreparable

from qpruner.errors import UserError
from qpruner.search import cluster, executors
from qpruner.search.executors import ExecutorConfig, check_executor, make_executor
from qpruner.search.workers import SerialExecutor


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"kind": "processes", "workers": 2}, (2, None, None)),
        ({"kind": "dask", "workers": 2}, (2, None, None)),  # without an address as `processes`
        ({"kind": "dask", "address": "tcp://a:1", "time_limit": 5.0}, (1, "tcp://a:1", 5.0)),
    ],
)
def test_each_kind_has_its_executor(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], given: tuple[int, str | None, float | None]
) -> None:
    asked: list[Any] = []

    @contextmanager
    def opened(*arguments: Any) -> Iterator[str]:
        asked.append(arguments)
        yield "a cluster"

    monkeypatch.setattr(executors, "cluster_executor", opened)
    work = Toy()
    with make_executor(ExecutorConfig(), work) as executor:
        assert isinstance(executor, SerialExecutor) and asked == []
    with make_executor(ExecutorConfig(**options), work) as executor:
        assert executor == "a cluster" and asked == [(work, *given)]


def test_only_a_scheduler_that_is_named_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(executors, "check_scheduler", seen.append)
    check_executor(ExecutorConfig("processes", workers=2))
    check_executor(ExecutorConfig("dask", address="tcp://a:1"))
    assert seen == ["tcp://a:1"]


@pytest.mark.parametrize("kind", ["serial", "processes"])
def test_what_keeps_every_worker_from_its_work_ends_the_search(kind: str) -> None:
    config = ExecutorConfig(kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^There is no bank\.$"), make_executor(config, Unpreparable("user")):
        pass
    with pytest.raises(RuntimeError, match="There is no bank"), make_executor(config, Unpreparable("other")):
        pass


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match="No Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        check_executor(ExecutorConfig("dask", address="tcp://127.0.0.1:9"))


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
