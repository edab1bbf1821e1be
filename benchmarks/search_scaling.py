"""How well a search uses many workers, and what keeps it from more: simulated, with trial times of a real ledger.

    python benchmarks/search_scaling.py --ledger runs/search/ledger.jsonl
    python benchmarks/search_scaling.py --folder FOLDER

The loop, the optimizer and the ledger are the true ones, and the seconds that they take are measured and counted; only
the trials are not run: a clock goes on by seconds that are drawn, for each plan, from those of the ledger, and by the
time between two looks at a worker. Their scores are drawn, too. Without a ledger a search of the embedded model is run
first. A worker's start, which imports the libraries and loads the base, is measured in a process that does so.

Efficiency is the share of the workers' time that trials take. What is lost goes to starting, while workers load;
asking, while all wait for proposals, for scores to be told and for records to be written; rounds, while some wait for
the slowest trial of a round, since as many are proposed at a time as there are workers; and the last round, which may
have fewer.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from qpruner.allocation.solving import Choice
from qpruner.records.tables import markdown_table
from qpruner.search.cluster import POLL_SECONDS
from qpruner.search.ledger import Key, Ledger, OptimizerRecord, identity
from qpruner.search.loop import Judge, run_trials
from qpruner.search.optimizers import OptimizerSettings
from qpruner.search.proposals import open_proposals
from qpruner.search.space import SearchSpace
from qpruner.search.workers import Outcome
from qpruner.seeds import derive_seed

SHORT = ("--search.trials=8", "--search.steps=5", "--search.finalists=1", "--search.finalist_seeds=1")
WORKER = """
import sys, time
from pathlib import Path
import distributed
from qpruner.compressed import CompressedModel
from qpruner.records.folder import RunFolder
from qpruner.search import trial
from qpruner.search.reference import Reference
folder = RunFolder(Path(sys.argv[1]))
CompressedModel.open(folder.base, check_hashes=False)
Reference.read(folder.reference)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, help="of a search that is over, in its folder")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/scaling"), help="for a search, where no ledger is given"
    )
    parser.add_argument("--trials", type=int, default=192)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--optimizers", nargs="+", default=["bayesian", "random"])
    parser.add_argument("--start", type=float, help="seconds of a worker's start; measured where none are given")
    parser.add_argument("--times", type=float, default=1.0, help="number that trial times are multiplied by")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    path: Path = given.ledger or searched(given.folder)
    measured = trials_of(path)
    seconds = given.times * np.array([scores["seconds"]["all"] for _, scores in measured])
    start = seconds_of_start(path.parent) if given.start is None else given.start
    print(
        f"{len(measured)} trials of {path} took {seconds.mean():.2f} s in the mean, {seconds.min():.2f} to "
        f"{seconds.max():.2f} s; a worker's start takes {start:.1f} s. A search of {given.trials} trials:\n"
    )
    rows = []
    for optimizer in given.optimizers:
        for workers in given.workers:
            clock = Simulated(workers, start, seconds, [scores["loss"] for _, scores in measured], given.seed)
            simulate(optimizer, space_of([key for key, _ in measured]), clock, given.trials, given.seed)
            rows.append([optimizer, *clock.row()])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    header = ("optimizer", "workers", "wall time", "efficiency", "starting", "asking", "rounds", "last round", "limit")
    print(markdown_table(header, rows))


def searched(folder: Path) -> Path:
    """The ledger of a short search of the embedded model, run now unless it was before."""
    config = Path(__file__).parents[1] / "configs" / "search.yaml"
    run = ["search", "--config", str(config), f"--run.dir={folder.parent}", f"--run.name={folder.name}", *SHORT]
    subprocess.run([sys.executable, "-m", "qpruner", *run], check=True)
    return folder / "ledger.jsonl"


def trials_of(path: Path) -> list[tuple[Key, dict]]:
    """Key and scores of each trial that succeeded and was none again."""
    keys: dict[int, Key] = {}
    trials = []
    for entry in map(json.loads, path.read_text().splitlines()[1:]):
        if entry["record"] == "started":
            keys[entry["trial"]] = entry["key"]
        elif entry["record"] == "finished" and entry["repeats"] is None:
            trials.append((keys[entry["trial"]], entry["scores"]))
    return trials


def seconds_of_start(folder: Path) -> float:
    since = time.perf_counter()
    subprocess.run([sys.executable, "-c", WORKER, str(folder)], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - since


def space_of(keys: Sequence[Key]) -> SearchSpace:
    """As many items with as many widths as the search had, half of whose bytes above the least there are to spend."""
    items, widths = len(keys[0]["choices"]), max(max(key["choices"]) for key in keys) + 1
    choices = [[Choice(1 + width, -float(width * (1 + item))) for width in range(widths)] for item in range(items)]
    levels = [[4 + 4 * width for width in range(widths)]] * items
    return SearchSpace(choices, levels, limit=items + items * (widths - 1) // 2)


@dataclass
class Lost:
    """Seconds of all workers together in which no trial ran, by what they waited for."""

    starting: float = 0.0
    asking: float = 0.0
    rounds: float = 0.0
    last_round: float = 0.0


class Simulated:
    """An executor whose trials take no time but on its clock.

    Args:
        workers: number of workers.
        start: seconds until they can begin.
        seconds: seconds of trials to draw from.
        losses: losses of trials to draw from.
        seed: seed of the draws; a plan has the same seconds and loss whatever the workers.
    """

    def __init__(self, workers: int, start: float, seconds: np.ndarray, losses: Sequence[float], seed: int) -> None:
        self.workers, self.seconds, self.losses, self.seed = workers, seconds, losses, seed
        self.now, self.busy = start, 0.0
        self.lost = Lost(starting=workers * start)
        self._since, self._spent = time.perf_counter(), 0.0  # on all but trials

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        """One round: no more keys than workers."""
        asked = self._spent + time.perf_counter() - self._since
        draws = [np.random.default_rng(derive_seed(self.seed, "simulated", identity(key))) for key in keys]
        took = [float(draw.choice(self.seconds)) for draw in draws]
        length = max(took, default=0.0) + POLL_SECONDS  # an answer is seen at the next look
        self.now += asked + length
        self.busy += sum(took)
        self.lost.asking += self.workers * asked
        self.lost.rounds += self.lost.last_round
        self.lost.last_round = self.workers * length - sum(took)
        self._spent = 0.0
        for place in sorted(range(len(keys)), key=took.__getitem__):
            self._since = time.perf_counter()
            yield place, Outcome(scores={"loss": float(draws[place].choice(self.losses))})
            self._spent += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def row(self) -> list[str]:
        """Workers, wall time, efficiency, and the shares that are lost, the largest of which is the limit."""
        total = self.workers * self.now
        shares = {name.replace("_", " "): seconds / total for name, seconds in vars(self.lost).items()}
        limit = max(shares, key=lambda name: shares[name])
        told = [f"{share:.1%}" for share in (self.busy / total, *shares.values())]
        return [str(self.workers), f"{self.now:,.0f} s", *told, limit]


def simulate(optimizer: str, space: SearchSpace, executor: Simulated, num_trials: int, seed: int) -> None:
    """Runs the true loop on simulated workers."""
    settings = OptimizerSettings(optimizer, space, num_trials, executor.workers, seed)
    with TemporaryDirectory() as folder, open_proposals(settings) as proposals:
        ledger = Ledger.open(Path(folder) / "ledger.jsonl", {})
        ledger.begin(OptimizerRecord(optimizer, 0, num_trials, executor.workers))
        run_trials(
            proposals,
            ledger,
            executor,
            num_trials=num_trials,
            workers=executor.workers,
            key_of=lambda point: {"choices": space.decode(np.array([point]))[0].tolist()},
            judge=Judge(lambda scores: scores["loss"]),
            on_trial=lambda trial: None,
        )


if __name__ == "__main__":
    main()
