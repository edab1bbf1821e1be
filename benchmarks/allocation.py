"""How well sensitivities tell which blocks need bits, and what allocations by them miss, against measured assignments.

    python benchmarks/allocation.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows rows.jsonl
    python benchmarks/allocation.py ... --widths 2 4

reads the rows that `benchmarks/block_bits.py` measured with the same options. Two tables: without recovery, and with
it, the mean over its seeds.

Of up to six blocks all assignments were measured. The effect of a block is the mean difference of loss between its
fewer and its more bits, over all assignments of the others. The regret of an allocation with k blocks of more bits is
its loss above that of the best with k. Chance is the mean over all allocations with k.

Of more blocks a random sample of equal bytes was, and, with ``--methods``, what each method chooses at these bytes. The
place of a choice is the share of the random assignments that are better than it: 0 % is ahead of all, 50 % chance. Its
regret is its loss above that of the best assignment measured, as a share of what a random one loses on average.

A method's rank correlation over assignments is that of the sum of its sensitivities over the narrow blocks with the
measured loss, among assignments of equal bytes.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
from block_sensitivities import rank_correlation, sensitivities, with_largest
from block_study import MOST_BLOCKS, BlockStudy, add_study_arguments, setup_torch

from qpruner.records.tables import markdown_table

Losses = dict[str, float]
"""Of each assignment, such as ``484448``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, steps=0)
    parser.add_argument("--on", help="one of --texts, in place of the mean over all tokens")
    given = parser.parse_args()
    setup_torch(given)
    study = BlockStudy(given)
    by_run = measured(study)
    runs = [losses for (steps, _), losses in by_run.items() if steps]
    if len(runs) > 1:
        print(f"{noise(runs)}\n")
    by_method = sensitivities(study)
    tables = {
        "Without recovery": [losses for (steps, _), losses in by_run.items() if not steps],
        "After recovery": runs,
    }
    for name, group in tables.items():
        if not group:
            continue
        common = set.intersection(*map(set, group))
        losses = {bits: mean(one[bits] for one in group) for bits in group[0] if bits in common}
        table = of_all if study.num_blocks <= MOST_BLOCKS else of_sample
        print(f"{name}: {table(study, by_method, losses)}\n")


def measured(study: BlockStudy) -> dict[tuple[int, int], Losses]:
    """The losses of each run, by its steps and seed, of which all assignments are there."""
    shared = study.key("", 0, 0, 0.0)
    shared = {name: shared[name] for name in shared if name not in ("steps", "lr", "seed", "bits")}
    widths = set(map(str, study.given.widths))
    by_run: dict[tuple[int, int], Losses] = {}
    for row in map(json.loads, study.given.rows.read_text().splitlines()):
        if shared.items() <= row.items() and set(row["bits"]) <= widths:
            loss = row["losses"][study.given.on] if study.given.on else row["loss"]
            by_run.setdefault((row["steps"], row["seed"]), {})[row["bits"]] = loss
    return {run: losses for run, losses in by_run.items() if losses.keys() >= set(study.vectors)}


def of_all(study: BlockStudy, by_method: dict[str, list[float]], losses: Losses) -> str:
    """What methods miss of all assignments, as a table."""
    narrow, wide = sorted(study.given.widths)
    true = effects(losses, study.given.widths)
    chance = regrets_of_chance(losses, wide)
    lines = [["chance", "", "", *(f"{regret:.4f}" for regret in chance), "100 %"]]
    for method, values in by_method.items():
        regrets = regrets_of(values, losses, study.given.widths)
        share = f"{100 * sum(regrets) / sum(chance):.0f} %"
        over = f"{correlation_over(values, losses, study.given.widths):.2f}"
        correlation = f"{rank_correlation(values, true):.2f}"
        lines.append([method, correlation, over, *(f"{regret:.4f}" for regret in regrets), share])
    numbers = [f"{number} of {wide} bits" for number in range(1, len(true))]
    header = ["regret by", "rank correlation", "over assignments", *numbers, "of chance's"]
    costs = ", ".join(f"{effect:.4f}" for effect in true)
    return f"{narrow} bits cost the blocks {costs} nats per token.\n\n{markdown_table(header, lines)}"


def of_sample(study: BlockStudy, by_method: dict[str, list[float]], losses: Losses) -> str:
    """Where among random assignments the choices of methods are, as a table."""
    random = [losses[bits] for bits in study.vectors]
    best = min(losses.values())
    lines = []
    for method, values in by_method.items():
        over = f"{correlation_over(values, {bits: losses[bits] for bits in study.vectors}, study.given.widths):.2f}"
        loss = losses.get(with_largest(values, study.num_blocks // 2, study.given.widths))
        where = ["", "", ""]
        if loss is not None:
            place = 100 * mean(other < loss for other in random)
            where = [f"{loss:.4f}", f"{place:.0f} %", f"{100 * (loss - best) / (mean(random) - best):.0f} %"]
        lines.append([method, over, *where])
    header = ["method", "correlation over assignments", "loss of its choice", "place", "regret, of chance's"]
    return (
        f"losses of {len(random)} random assignments {min(random):.4f} to {max(random):.4f}, mean {mean(random):.4f}, "
        f"standard deviation {stdev(random):.4f}; the best of all measured {best:.4f}.\n\n"
        f"{markdown_table(header, lines)}"
    )


def effects(losses: Losses, widths: Sequence[int]) -> list[float]:
    """What the fewer bits cost each block, over all assignments of the others."""
    narrow, wide = map(str, sorted(widths))
    num_blocks = len(next(iter(losses)))
    return [
        mean(loss for bits, loss in losses.items() if bits[block] == narrow)
        - mean(loss for bits, loss in losses.items() if bits[block] == wide)
        for block in range(num_blocks)
    ]


def correlation_over(values: list[float], losses: Losses, widths: Sequence[int]) -> float:
    """Rank correlation of predicted and measured losses among assignments of equal bytes, the mean over all bytes."""
    narrow, wide = map(str, sorted(widths))
    correlations = []
    for number in sorted({bits.count(wide) for bits in losses}):
        equal = [bits for bits in losses if bits.count(wide) == number]
        predicted = [sum(value for value, held in zip(values, bits, strict=True) if held == narrow) for bits in equal]
        if len(set(predicted)) > 1:
            correlations.append(rank_correlation(predicted, [losses[bits] for bits in equal]))
    return mean(correlations) if correlations else float("nan")


def regrets_of(values: list[float], losses: Losses, widths: Sequence[int]) -> list[float]:
    """What the allocations by a sensitivity lose to the best of 1, 2, ... blocks of more bits."""
    return [
        losses[with_largest(values, number, list(widths))] - min(_of_number(losses, number, max(widths)))
        for number in range(1, len(values))
    ]


def regrets_of_chance(losses: Losses, wide: int) -> list[float]:
    """What the allocations of 1, 2, ... blocks of more bits lose to the best one on average."""
    num_blocks = len(next(iter(losses)))
    return [
        mean(of_number) - min(of_number) for of_number in (_of_number(losses, n, wide) for n in range(1, num_blocks))
    ]


def _of_number(losses: Losses, number: int, wide: int) -> list[float]:
    return [loss for bits, loss in losses.items() if bits.count(str(wide)) == number]


def noise(runs: list[Losses]) -> str:
    """How much of the spread between assignments is due to the seed of the recovery."""
    table = np.array([[losses[bits] for bits in sorted(losses)] for losses in runs])  # [seeds, assignments]
    residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    of_seed = (residual**2).sum() / ((len(runs) - 1) * (table.shape[1] - 1))
    spread = table.mean(0).var(ddof=1)
    return (
        f"{len(runs)} seeds: losses after recovery {table.min():.4f} to {table.max():.4f}; standard deviation between "
        f"assignments {spread**0.5:.5f}, of one of them between seeds {of_seed**0.5:.5f} "
        f"({of_seed / len(runs) / spread:.1%} of the variance of the means); correlation between the seeds "
        f"{np.corrcoef(table)[0, 1]:.3f}."
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*mutual information is chance.*")
    main()
