"""What commands take to start, in processor time, over the imports that they cannot do without.

    python benchmarks/startup.py                  every command that needs no run
    python benchmarks/startup.py --run runs/x     `report` of a run, too
    python benchmarks/startup.py --rounds 9

Each command and each import is a process of its own; they take turns, so that a busy machine is as busy for all, and
medians of user and system time together are compared. Commands without a Trainer are to take at most 2.5 times
``import torch``, and the help of `fit` at most 1.2 times the import of torch, Lightning, transformers and PEFT.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from qpruner.records.tables import markdown_table

TORCH, ALL = "import torch", "import torch, lightning, transformers, peft"
EMBEDDED = "qpruner/stories"
DENSE_PLAN = f"""
from qpruner.anatomy import architecture_of
from qpruner.model_folder import read_base_config
from qpruner.plan import CompressionPlan
import pathlib, sys
CompressionPlan.dense(architecture_of(read_base_config("{EMBEDDED}")), None).write(pathlib.Path(sys.argv[1]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", help="folder of a run to report on")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = str(Path(folder) / "plan.json")
        subprocess.run([sys.executable, "-c", DENSE_PLAN, plan], check=True)
        without_trainer = [
            ["--help"],
            ["--version"],
            ["plan", "show", plan],
            ["plan", "diff", plan, plan],
            ["plan", "check", plan, "--base", EMBEDDED],
            ["plan", "ratios", EMBEDDED],
            ["report", "--help"],
            ["merge", "--help"],
            *([["report", given.run]] if given.run else []),
        ]
        with_trainer = [[command, "--help"] for command in ("fit", "search")]
        commands = {
            **{TORCH: ["-c", TORCH], ALL: ["-c", ALL]},
            **{" ".join(words): ["-m", "qpruner", *words] for words in without_trainer + with_trainer},
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(given.rounds):
            for name, command in commands.items():
                seconds[name].append(processor_seconds(command))
    medians = {name: median(times) for name, times in seconds.items()}
    rows = [
        [
            name.replace(plan, "PLAN"),
            f"{taken:.2f}",
            f"{taken / medians[TORCH]:.2f}",
            f"{taken / medians[ALL]:.2f}",
        ]
        for name, taken in medians.items()
    ]
    print(markdown_table(["", "seconds", "over torch", "over all four"], rows))


def processor_seconds(command: list[str]) -> float:
    """User and system time of a Python process with one thread for computing."""
    before = os.times()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


if __name__ == "__main__":
    main()
