"""What two ranks take to start over what one takes: seconds until the first step, and memory of the machine.

    python benchmarks/ranks.py                            the embedded model, and a random Llama of 110 M parameters
    python benchmarks/ranks.py --bits 4 --ratio 0.2       pruned by text before it is quantized
    python benchmarks/ranks.py --strategy fsdp2           split between the ranks

Each fit is a run of its own in a process of its own, with a thread for each rank. Seconds count from the moment when
all ranks have read the data, before any of them loads the model, until each is about to take its first step: what
Lightning takes to start a process and Python to import libraries is left out. Memory is the sum over ranks of the
proportional set (PSS of /proc/PID/smaps_rollup), which counts a page that both have once: its highest sum, less the sum
at that moment, which is what Python and its libraries take.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from random_llama import add_arguments, random_llama

from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.records.tables import markdown_table
from qpruner.runs.run import Run
from qpruner.training.module import LoRAFinetuner

EVERY = 0.05
"""Seconds between two looks at the memory."""
READ, BEGAN = "ranks:read", "ranks:began"


class Data(StoriesDataModule):
    """Says when it was read."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert self.trainer is not None
        self.trainer.strategy.barrier()
        say(READ)


class Start(Callback):
    """Says when training begins."""

    def on_train_start(self, *_: Any) -> None:
        say(BEGAN)


def say(what: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{what} {time.monotonic()}", flush=True)


def fit(given: argparse.Namespace) -> None:
    """One fit, on one rank or on two."""
    callbacks: list[Callback] = [Start()]
    if given.ratio:
        callbacks.append(StructuredPruning(given.ratio))
    callbacks.append(MixedPrecisionQuantization(given.bits))
    trainer = {"accelerator": "cpu", "devices": given.ranks, "max_steps": 1, "enable_progress_bar": False,
               "enable_model_summary": False, "limit_val_batches": 0, "logger": False,
               "strategy": given.strategy if given.ranks > 1 else "auto"}  # fmt: skip
    data = Data(tokenizer=EMBEDDED, num_train=200, num_validation=1, num_test=given.rows, num_choices=0)
    Run(given.folder, LoRAFinetuner(given.base), data, callbacks, trainer).fit()


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds to start and bytes at most, of a fit in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL, env=environment)
        moments: dict[str, float] = {}
        before, most = 0, 0
        while process.poll() is None and BEGAN not in moments:
            if READ in moments:
                now = proportional_set(process.pid)
                before, most = before or now, max(most, now)
            time.sleep(EVERY)
            words = [line.split() for line in Path(said.name).read_text().splitlines()]
            moments |= {line[0]: float(line[1]) for line in words if len(line) == 2 and line[0] in (READ, BEGAN)}
        process.wait()
    return moments[BEGAN] - moments[READ], most - before


def proportional_set(pid: int) -> int:
    """Bytes of a process and those that it started, pages that several have once."""
    total = 0
    for process in (pid, *children(pid)):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="float32")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.0, help="share to prune; 0 for none")
    parser.add_argument("--rows", type=int, default=16, help="of the test split, on which stages are measured")
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("--base", "--folder"):  # of one fit
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.base is not None:
        fit(given)
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        llama = Path(place) / "llama"
        random_llama(given).save_pretrained(llama)
        load_tokenizer(EMBEDDED).save_pretrained(llama)
        for name, base in (("embedded", EMBEDDED), ("random Llama", str(llama))):
            best = {}
            for ranks in (1, 2):
                tries = []
                for number in range(given.rounds):
                    folder = f"{place}/{name[:3]}{ranks}{number}"
                    options = ["--base", base, "--ranks", str(ranks), "--folder", folder]
                    tries.append(measure([sys.executable, *sys.argv, *options]))
                best[ranks] = [min(column) for column in zip(*tries, strict=True)]
                rows.append([name, str(ranks), f"{best[ranks][0]:.1f}", f"{best[ranks][1] / 2**20:.0f}"])
            seconds, memory = (two / one for one, two in zip(best[1], best[2], strict=True))
            rows.append([name, "2 over 1", f"{seconds:.2f}", f"{memory:.2f}"])
            print(json.dumps({"base": name, "seconds": seconds, "memory": memory}), flush=True)
    print(markdown_table(["base", "ranks", "seconds to start", "MiB above libraries"], rows))


if __name__ == "__main__":
    main()
