"""Which optimizer finds the best assignment of bits in few trials, and what a prior is worth to it.

    python benchmarks/search_optimizers.py --rows benchmarks/block_bits.jsonl --base stories-c9af89e4

The rows, made by `benchmarks/block_bits.py`, hold the loss of every assignment of 4 and 8 bits to blocks of a model,
before and after a short recovery, so that a search looks its trials up. Its loss is that after recovery, the mean over
the seeds of which all assignments are there. A budget allows k blocks 8 bits. The regret of a search is the loss of the
best of its trials above that of the best assignment within the budget.

All optimizers move in the same space, whose origin is the plan of the prior. Three priors are tried: ``measured``, the
gain of 8 bits for each block alone before recovery (or ``--prior``); ``equal``; and ``reversed``, which has the gains
of ``measured`` given to the blocks in reverse order of rank. A plan that was tried before is a trial like any other;
``repeats`` is their share.
"""

import argparse
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpruner.allocation.solving import Choice
from qpruner.search.optimizers import OptimizerSettings, make_optimizer
from qpruner.search.space import SearchSpace

Plan = tuple[int, ...]  # of each block, 1 for 8 bits
Table = dict[Plan, float]  # losses

STOCK = ("OnePlusOne", "DiscreteOnePlusOne", "TBPSA", "DE", "CMA", "NGOpt", "PSO")
TPE = "TPE (Optuna)"
TPE_IF_THERE = [TPE] if find_spec("optuna") else []
REACH = 3.0  # of TPE, which wants bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--base", required=True, help="of the rows that count")
    parser.add_argument("--prior", type=float, nargs="+", help="gain of 8 bits for each block")
    parser.add_argument("--eights", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--trials", type=int, nargs="+", default=[5, 10, 15])
    parser.add_argument("--seeds", type=int, default=100, help="searches of each optimizer")
    parser.add_argument("--optimizers", nargs="+", default=["bayesian", "random", *STOCK, *TPE_IF_THERE])
    given = parser.parse_args()
    before, after = read(given.rows, given.base)
    measured = np.array(given.prior) if given.prior else gains_alone(before)
    reverse = np.sort(measured)[::-1][measured.argsort().argsort()]
    priors = {"measured": measured, "equal": np.ones(len(measured)), "reversed": reverse}
    print(f"{given.base}: gains {', '.join(f'{gain:.4f}' for gain in measured)}; {given.seeds} searches each")
    for eights in given.eights:
        fitting = [loss for plan, loss in after.items() if sum(plan) <= eights]
        print(f"\n{eights} blocks in 8 bits: regret in 0.001 nats, mean ± standard deviation; ", end="")
        print(f"the mean assignment within the budget has {1000 * (np.mean(fitting) - min(fitting)):.2f}\n")
        print("| optimizer | prior | " + " | ".join(f"{count} trials" for count in given.trials) + " | repeats |")
        print("|---" * (len(given.trials) + 3) + "|")
        for optimizer in given.optimizers:
            for prior, gains in priors.items():
                space = space_of(gains, eights)
                searches = [
                    list(search(optimizer, space, after, max(given.trials), seed)) for seed in range(given.seeds)
                ]
                best = np.minimum.accumulate([[after[plan] for plan in plans] for plans in searches], axis=1)
                regret = 1000 * (best - min(fitting))[:, np.array(given.trials) - 1]
                cells = [f"{mean:.2f} ± {sd:.2f}" for mean, sd in zip(regret.mean(0), regret.std(0), strict=True)]
                repeats = 1 - np.mean([len(set(plans)) / len(plans) for plans in searches])
                print(f"| {optimizer} | {prior} | {' | '.join(cells)} | {repeats:.0%} |", flush=True)


def read(path: Path, base: str) -> tuple[Table, Table]:
    """Losses before recovery and after it."""
    tables: dict[tuple[bool, int], Table] = defaultdict(dict)
    for row in map(json.loads, path.read_text().splitlines()):
        if row["base"] == base:
            plan = tuple(int(bits == "8") for bits in row["bits"])
            tables[row["steps"] > 0, row["seed"]][plan] = row["loss"]
    whole = [(trained, table) for (trained, _), table in tables.items() if len(table) == 2 ** len(next(iter(table)))]
    before, after = ([table for trained, table in whole if trained is wanted] for wanted in (False, True))
    if not before or not after:
        raise SystemExit(f"{path} lacks assignments of {base}; it has {sorted(tables)} (trained, seed).")
    return before[0], {plan: float(np.mean([table[plan] for table in after])) for plan in after[0]}


def gains_alone(table: Table) -> npt.NDArray[np.float64]:
    """[blocks], by how much the loss falls when one block alone has 8 bits."""
    blocks = len(next(iter(table)))
    return np.array([table[(0,) * blocks] - table[tuple(row)] for row in np.eye(blocks, dtype=int).tolist()])


def space_of(gains: npt.NDArray[np.float64], eights: int) -> SearchSpace:
    choices = [[Choice(1, 0.0), Choice(2, -float(gain))] for gain in gains]
    return SearchSpace(choices, [[4, 8]] * len(choices), len(choices) + eights)


def search(optimizer: str, space: SearchSpace, table: Table, num_trials: int, seed: int) -> Iterator[Plan]:
    """The plans of a search's trials."""

    def plan_of(point: npt.ArrayLike) -> Plan:
        return tuple(space.decode(np.asarray(point)[None])[0].tolist())

    trials = tpe if optimizer == TPE else ask_and_tell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimizers that would rather have more trials
        yield from trials(optimizer, space, plan_of, table, num_trials, seed)


def ask_and_tell(
    optimizer: str, space: SearchSpace, plan_of: Callable[..., Plan], table: Table, num_trials: int, seed: int
) -> Iterator[Plan]:
    proposer = make_optimizer(OptimizerSettings(optimizer, space, num_trials, num_workers=1, seed=seed))
    for _ in range(num_trials):
        candidate = proposer.ask()
        plan = plan_of(candidate.value)
        proposer.tell(candidate, table[plan])
        yield plan


def tpe(
    _: str, space: SearchSpace, plan_of: Callable[..., Plan], table: Table, num_trials: int, seed: int
) -> Iterator[Plan]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _number in range(num_trials):
        trial = study.ask()
        plan = plan_of([trial.suggest_float(f"x{axis}", -REACH, REACH) for axis in range(space.dimension)])
        study.tell(trial, table[plan])
        yield plan


if __name__ == "__main__":
    main()
