"""A search with two workers, whose process ids it prints before both are at a trial that never answers."""

import signal

from qpruner.search.executors import ExecutorConfig, make_executor
from support.toys import Toy

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    with make_executor(ExecutorConfig("processes", workers=2), Toy()) as executor:
        where = [{"choices": [0.0], "do": "where", "sleep": 0.3}] * 2
        print(*[outcome.scores["pid"] for _, outcome in executor.run(where) if outcome.scores], flush=True)
        list(executor.run([{"choices": [0.0], "sleep": 1000}] * 2))
