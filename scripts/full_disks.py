"""Fills the disk under a fit, a search and a calibration, makes room, repeats them, and compares what they left.

    python scripts/full_disks.py FOLDER --times 12

The disk is a tmpfs that this process sees alone. At a random moment, drawn from a seed that is printed, it shrinks to
what is on it and at most 64 KiB more: so it is full in the middle of one write after the other, of tokens, the base,
the bank, rounded layers, checkpoints, the ledger, pictures and reports. Then the command has to end with status 2, name
a place on the disk, ask for room, and leave nothing half-written; with what room there was, it may also end well.
Repeated when there is room, it has to end as one that nothing disturbed, see `random_kills.py`.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from random_kills import KINDS, begin, content_of, differing, last_written
from tiny_runs import import_libraries, tiny_base, write_config

ALONE = "QPRUNER_SEES_ITS_MOUNTS_ALONE"
AMPLE, SLACK = 2**28, 2**16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="place where the disk is mounted, and what is not on it lies")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--times", type=int, default=12, help="times that the disk is filled, for each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first time; the next has the next one")
    given = parser.parse_args()
    if ALONE not in os.environ:
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(command[0], command, os.environ | {ALONE: "1"})
    folder: Path = given.folder.absolute()
    disk = folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={AMPLE}", "tmpfs", str(disk)], check=True)
    import_libraries()
    making = get_context("fork").Process(target=tiny_base, args=[folder / "base"])  # this process begins no threads
    making.start()
    making.join()
    seeds = range(given.seed, given.seed + given.times)
    wrong = [what for kind in given.kinds for what in runs_without_room(folder, disk, kind, seeds)]
    print(f"{len(wrong)} things are not as they should be." if wrong else "All are as they should be.")
    sys.exit(bool(wrong))


def runs_without_room(folder: Path, disk: Path, kind: str, seeds: range) -> Iterator[str]:
    """Runs whose disk is filled, each by a seed; what is wrong with those with which something is."""
    config = write_config(disk / kind / "config.yaml", kind, folder / "base")
    since = time.perf_counter()
    assert run(kind, config, folder / "printed.txt")[0] == 0
    seconds, expected = time.perf_counter() - since, dict(content_of(config.parent))
    for seed in seeds:
        moments = random.Random(seed)
        shutil.rmtree(config.parent)
        write_config(config, kind, folder / "base")
        moment, slack = moments.uniform(0, seconds), moments.randrange(SLACK)
        status, printed, last = run(kind, config, folder / "printed.txt", moment, slack)
        halves = [str(path) for path in disk.rglob(".*tmp")]
        resize(disk, AMPLE)
        repeated, *_ = run(kind, config, folder / "printed.txt")
        others = differing(expected, dict(content_of(config.parent)))
        told = printed[-1] if printed else ""
        wrong = []
        if status != 0:
            asks = "oom" in told or "Free some" in told
            wrong += [f"status {status}"] * (status != 2) + ["says otherwise"] * (str(disk) not in told or not asks)
            wrong += ["a traceback"] * any("Traceback" in line for line in printed)
            wrong += [f"half-written {', '.join(halves)}"] * bool(halves)
        wrong += [f"status {repeated} when repeated"] * bool(repeated)
        wrong += [f"DIFFERS in {', '.join(others)}"] * bool(others)
        print(
            f"{kind}, seed {seed}: {slack:,} bytes left after {moment:.2f} s, when {last} was written last: "
            f"{'; '.join(wrong) or 'as it should be'}{f': {told}' if status else ''}",
            flush=True,
        )
        yield from wrong


def run(
    kind: str, config: Path, printed: Path, moment: float | None = None, slack: int = 0
) -> tuple[int, list[str], str]:
    """Runs the command; after some seconds the disk shrinks to what is on it and a few bytes.

    Returns:
        The status, the lines that were printed, and the file that was written last before the disk shrank.
    """
    printed.unlink(missing_ok=True)
    process: Any = begin(kind, config, printed)
    last = ""
    if moment is not None:
        process.join(moment)
        last, used = last_written(config.parent), shutil.disk_usage(config.parent).used
        resize(config.parents[1], used + slack, check=False)  # what was written meanwhile may be more
    process.join()
    return process.exitcode, printed.read_text().strip().splitlines(), last


def resize(disk: Path, size: int, *, check: bool = True) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=check, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
