"""Trials that take no model: what a key says, they do."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.search.ledger import Key
from qpruner.search.workers import Executor, Outcome, SerialExecutor, Trial


def quadratic(key: dict[str, Any]) -> dict[str, Any]:
    return {"loss": sum((x - 0.3) ** 2 for x in key["choices"])}


@dataclass(frozen=True)
class Toy:
    """Evaluates a quadratic, and does what else the key asks for.

    Args:
        evaluations: file that gets a line for each evaluation.
        slow_sum: evaluations whose choices are nearest to this sum take longest.
        hang_at: evaluation, from 1, that takes for ever.
    """

    evaluations: str | None = None
    slow_sum: float | None = None
    hang_at: int | None = None

    def prepare(self) -> Trial:
        prepared = f"{os.getpid()} at {time.monotonic()}"

        def trial(key: dict[str, Any]) -> dict[str, Any]:
            if self.evaluations:
                with Path(self.evaluations).open("a") as file:
                    file.write(f"{os.getpid()} {key['choices']}\n")
                if len(Path(self.evaluations).read_text().splitlines()) == self.hang_at:
                    time.sleep(1000)
            if self.slow_sum is not None:
                time.sleep(0.3 / (1 + abs(sum(key["choices"]) - self.slow_sum)))
            time.sleep(key.get("sleep", 0))
            match key.get("do"):
                case "die":
                    os._exit(3)
                case "die once":
                    with (begun := Path(key["file"])).open("a") as file:
                        file.write(f"{os.getpid()}\n")
                    if len(begun.read_text().split()) == 1:
                        os._exit(3)
                case "kill":
                    os.kill(os.getpid(), 9)
                case "raise":
                    raise LookupError("no such layer\nand more")
                case "memory":
                    raise MemoryError
                case "nan":
                    return {"loss": math.nan}
                case "tensor":
                    return {"loss": object()}
                case "where":
                    return {"loss": 0.0, "prepared": prepared, "pid": os.getpid(), "environment": dict(os.environ)}
            return quadratic(key)

        return trial


@dataclass(frozen=True)
class Unpreparable:
    how: str

    def prepare(self) -> Trial:
        if self.how == "die":
            os._exit(3)
        try:
            raise OSError("disk on fire")
        except OSError as error:
            raise (UserError if self.how == "user" else RuntimeError)("There is no bank.") from error


class Counting(SerialExecutor):
    """Runs in this process, and knows what it ran; backwards, when asked for."""

    def __init__(self, backwards: bool = False) -> None:
        super().__init__(Toy().prepare())
        self.ran: list[list[Any]] = []
        self.backwards = backwards

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        self.ran += [key["choices"] for key in keys]
        found = list(super().run(keys))
        yield from reversed(found) if self.backwards else found


def outcomes(executor: Executor, *keys: dict[str, Any]) -> list[Outcome]:
    """What became of each key, whenever it came."""
    found = dict(executor.run([{"choices": [0.0], **key} for key in keys]))
    assert sorted(found) == list(range(len(keys)))
    return [found[place] for place in range(len(keys))]
