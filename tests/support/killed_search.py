"""Searches that are killed, as a power cut would, and go on: ``-m support.killed_search FOLDER``.

For each of the `MOMENTS` a search in a process of its own writes ``FOLDER/MOMENT.jsonl`` and dies; its ledger at that
time is kept as ``.cut``, and another process goes on. One import of the libraries serves them all.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpruner.search.executors import ExecutorConfig, make_executor
from qpruner.search.ledger import Ledger
from qpruner.search.loop import Judge, run_trials
from support.toys import Toy

NUM_TRIALS, WORKERS = 14, 2
MOMENTS = (
    "never",
    *(f"{moment}-{n}" for moment in ("before", "half", "after") for n in (1, 2, 3, 12)),
    "tell-5",
)
IN_A_TRIAL = ("serial-3", "serial-4", "processes-5")


def make_optimizer(seed: int = 7) -> Any:
    import nevergrad as ng

    choices = ng.p.Choice([0.0, 0.25, 0.5, 1.0], repetitions=3)
    choices.random_state.seed(seed)
    return ng.optimizers.OnePlusOne(choices, budget=100, num_workers=WORKERS)


def key_of(value: Any) -> dict[str, Any]:
    return {"choices": list(value), "seed": 0}


def loss_of(scores: dict[str, Any]) -> float:
    return scores["loss"]


def search(path: Path, kind: str = "serial", optimizer: Any = None, hang_at: int | None = None) -> None:
    config = ExecutorConfig(kind, workers=1 if kind == "serial" else WORKERS)  # type: ignore[arg-type]
    with make_executor(config, Toy(str(path.with_suffix(".evaluations")), hang_at=hang_at)) as executor:
        run_trials(
            optimizer or make_optimizer(),
            Ledger.open(path, {"seed": 7}),
            executor,
            num_trials=NUM_TRIALS,
            workers=WORKERS,
            key_of=key_of,
            judge=Judge(loss_of),
            on_trial=lambda trial: None,
        )


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(ledger: Ledger, entry: dict[str, Any]) -> None:
    with ledger.path.open("a") as file:
        file.write(json.dumps(entry)[:20])
    die()


def at_call(number: int, function: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return then(*args) if calls == number else function(*args)

    return counted


def killed(path: Path, moment: str, number: int) -> None:
    optimizer, append = make_optimizer(), Ledger._append
    match moment:
        case "before":
            Ledger._append = at_call(number, append, die)  # type: ignore[method-assign]
        case "half":
            Ledger._append = at_call(number, append, half)  # type: ignore[method-assign]
        case "after":
            Ledger._append = at_call(number, append, lambda *args: (append(*args), die()))  # type: ignore[method-assign]
        case "tell":
            optimizer.tell = at_call(number, optimizer.tell, die)
    in_a_trial = moment in ("serial", "processes")
    search(path, moment if in_a_trial else "serial", optimizer, hang_at=number if in_a_trial else None)


def forked(function: Callable[[], None]) -> int:
    if child := os.fork():
        return child
    try:
        function()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> None:
    import nevergrad  # noqa: F401
    import torch  # noqa: F401

    os.fsync = lambda file: None  # what a killed process wrote is not lost, and this is what takes the time
    for name in (*MOMENTS, *IN_A_TRIAL):
        path = folder / f"{name}.jsonl"
        moment, _, number = name.partition("-")
        if moment != "never":
            child = forked(lambda path=path, moment=moment, number=number: killed(path, moment, int(number)))
            if name in IN_A_TRIAL:
                evaluations = path.with_suffix(".evaluations")
                while not evaluations.exists() or len(evaluations.read_text().splitlines()) < int(number):
                    time.sleep(0.01)
                time.sleep(0.1)
                os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
            shutil.copy(path, path.with_suffix(".cut"))
            if (evaluations := path.with_suffix(".evaluations")).exists():
                shutil.copy(evaluations, path.with_suffix(".evaluations_at_cut"))
        child = forked(
            lambda path=path, moment=moment: search(path, "processes" if moment == "processes" else "serial")
        )
        assert os.waitpid(child, 0)[1] == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
