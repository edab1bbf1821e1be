"""Memory and file handles of a long search and of a long fit, which must not grow.

    python scripts/long_runs.py FOLDER --trials 500 --steps 5000

A search of many trials and a fit of many steps, of a random Llama with two layers, by the true commands, each in a
process of its own. The resident memory and the open files of that process are sampled after every trial, or every few
steps: after the first fifth, in which libraries fill what they keep, memory may grow by so many per cent and the number
of open files not at all. The slope is that of a straight line through the samples, over a whole run of that length.
What was cut off goes on with the same command; its samples count from there.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tiny_runs import command_of, import_libraries, run_command, tiny_base, write_config

SAMPLES = 100  # of a run
SETTLING = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--base", help="model of the fit and the search; without it, a random Llama of two layers")
    parser.add_argument("--most", type=float, default=5.0, help="per cent that memory may grow by")
    given = parser.parse_args()
    folder = given.folder.absolute()
    import_libraries()
    grown = [
        grows(kind, folder, given.base, number, given.most)
        for kind, number in (("search", given.trials), ("fit", given.steps))
        if number
    ]
    sys.exit(any(grown))


def grows(kind: str, folder: Path, base: str | None, number: int, most: float) -> bool:
    """Runs, prints how much memory and how many files it had, and says whether that is more than it may be."""
    samples = folder / f"{kind}.jsonl"
    arguments = kind, folder, base, number, samples
    process = get_context("fork").Process(target=measured_run, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"The {kind} ended with status {process.exitcode}; see {folder / kind / 'printed.txt'}.")
    rows: list[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
    rows = [row for row in rows if row["process"] == rows[-1]["process"]]
    rows = rows[int(SETTLING * len(rows)) :]
    memory, handles = [row["resident"] for row in rows], [row["handles"] for row in rows]
    per_cent = 100 * slope(memory) * (len(memory) - 1) / memory[0]
    print(
        f"{kind}, {number} {'trials' if kind == 'search' else 'steps'}: resident {memory[0] / 2**20:.1f} MiB after "
        f"{rows[0]['at']}, {memory[-1] / 2**20:.1f} MiB at the end, {max(memory) / 2**20:.1f} MiB at most, "
        f"{per_cent:+.2f} % by the slope; {handles[0]} open files, {handles[-1]} at the end, {max(handles)} at most",
        flush=True,
    )
    return per_cent > most or 100 * (memory[-1] / memory[0] - 1) > most or handles[-1] > handles[0]


def slope(values: Sequence[float]) -> float:
    """Of the straight line through values at 0, 1, 2 and so on."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    moved = sum((place - middle) * (value - mean) for place, value in enumerate(values))
    return moved / sum((place - middle) ** 2 for place in range(len(values)))


def measured_run(kind: str, folder: Path, base: str | None, number: int, samples: Path) -> None:
    """Runs the command in this process, and samples it."""
    from qpruner.search.progress import Progress
    from qpruner.training.module import LoRAFinetuner

    model = Path(base) if base else tiny_base(folder / "base")
    config = write_config(folder / kind / "config.yaml", kind, model, steps=number, trials=number)
    every = max(number // SAMPLES, 1)

    def sample(at: int) -> None:
        if at % every == 0:
            row = {
                "at": at,
                "process": os.getpid(),
                "resident": resident(),
                "handles": len(os.listdir("/proc/self/fd")),
            }
            with samples.open("a") as file:
                file.write(json.dumps(row) + "\n")

    if kind == "search":
        report = Progress.report

        def reported(progress: Progress, record: Any) -> None:
            report(progress, record)
            sample(record.number + 1)

        Progress.report = reported  # type: ignore[method-assign]
    else:
        end = LoRAFinetuner.on_train_batch_end

        def ended(module: LoRAFinetuner, *arguments: Any) -> None:
            end(module, *arguments)
            sample(module.trainer.global_step)

        LoRAFinetuner.on_train_batch_end = ended  # type: ignore[method-assign]
    words = [command_of(kind), "--config", str(config)]
    run_command(words, config.with_name("printed.txt"), {"XDG_CACHE_HOME": str(folder / "cache")})


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
