"""How well sensitivities tell which blocks need bits, and what allocations by them miss, against all 64 assignments.

    python benchmarks/allocation.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows rows.jsonl

reads the rows that `benchmarks/block_bits.py` measured with the same model and text. Two tables: without recovery, and
with it. The effect of a block is the mean difference of loss between its 4 and its 8 bits, over all assignments of the
others. The regret of an allocation with k blocks of 8 bits is its loss above that of the best with k. Chance is the
mean over all allocations with k.
"""

import argparse
import json
import warnings
from itertools import product
from statistics import mean

import numpy as np
import torch
from block_bits import PRECISIONS, pruned
from studies import add_arguments, name_of, study_data

from qpruner.allocation.items import items_of
from qpruner.allocation.mutual_information import MutualInformationConfig
from qpruner.allocation.observation import layer_information
from qpruner.allocation.rises import first_order_rises, measured_rises
from qpruner.allocation.solving import Choice, exact
from qpruner.calibration.text import Calibration
from qpruner.processes import Processes
from qpruner.quantization.bank import fill
from qpruner.records.tables import markdown_table

TRIFLE = 1e-9
Losses = dict[str, float]
"""Of each assignment, such as ``484448``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=0)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--sequences", type=int, default=64, help="of 64 tokens, on which sensitivities are found")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()]
    rows = [row for row in rows if row["base"] == name_of(given.base)]
    by_run: dict[tuple[int, int], Losses] = {}
    for row in rows:
        by_run.setdefault((row["steps"], row["seed"]), {})[row["bits"]] = row["loss"]
    bare = by_run.pop((0, 0))
    recovered = {bits: mean(losses[bits] for losses in by_run.values()) for bits in bare}
    print(f"{noise(list(by_run.values()))}\n")
    by_method = sensitivities(given)
    for name, losses in (("Without recovery", bare), ("After recovery", recovered)):
        true = effects(losses)
        print(f"{name}: 4 bits cost the blocks {', '.join(f'{effect:.4f}' for effect in true)} nats per token.\n")
        chance = regrets_of_chance(losses)
        lines = [["chance", "", *(f"{regret:.4f}" for regret in chance), "100 %"]]
        for method, values in by_method.items():
            regrets = regrets_of(values, losses)
            share = f"{100 * sum(regrets) / sum(chance):.0f} %"
            correlation = f"{rank_correlation(values, true):.2f}"
            lines.append([method, correlation, *(f"{regret:.4f}" for regret in regrets), share])
        numbers = [f"{number} of 8 bits" for number in range(1, len(true))]
        print(markdown_table(["regret by", "rank correlation", *numbers, "of chance's"], lines), "\n")


def effects(losses: Losses) -> list[float]:
    """What 4 bits cost each block, over all assignments of the others."""
    num_blocks = len(next(iter(losses)))
    return [
        mean(loss for bits, loss in losses.items() if bits[block] == "4")
        - mean(loss for bits, loss in losses.items() if bits[block] == "8")
        for block in range(num_blocks)
    ]


def regrets_of(values: list[float], losses: Losses) -> list[float]:
    """What the allocations by a sensitivity lose to the best of 1, 2, ... blocks of 8 bits."""
    regrets = []
    for number in range(1, len(values)):
        # As in a fit: no gain below 0, and where nothing is gained more bits are still taken.
        choices = [[Choice(0, max(value, 0.0) + TRIFLE), Choice(1, 0.0)] for value in values]
        bits = "".join("48"[wide] for wide in exact(choices, number))
        regrets.append(losses[bits] - min(_of_number(losses, number)))
    return regrets


def regrets_of_chance(losses: Losses) -> list[float]:
    """What the allocations of 1, 2, ... blocks of 8 bits lose to the best one on average."""
    num_blocks = len(next(iter(losses)))
    return [mean(of_number) - min(of_number) for of_number in (_of_number(losses, n) for n in range(1, num_blocks))]


def _of_number(losses: Losses, number: int) -> list[float]:
    return [loss for bits, loss in losses.items() if bits.count("8") == number]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    ranks = [
        [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]
        for values in (a, b)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


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


def sensitivities(given: argparse.Namespace) -> dict[str, list[float]]:
    """What each way to find sensitivities gives the blocks of the pruned model."""
    data = study_data(given, 0)
    compressed = pruned(given.base, given.ratio, data)
    model, plan = compressed.network, compressed.known_plan()
    tokens = data.calibration(given.sequences, 64)
    calibration = Calibration.share(tokens, Processes.alone(), batch_size=1024)
    by_method: dict[str, list[float]] = {}
    options = product(("histogram", "neighbours"), ("argmax", "log_probability"), ("mean", "norm", "max"))
    for estimator, prediction, summary in options:
        config = MutualInformationConfig(estimator=estimator, prediction=prediction, summary=summary)  # type: ignore[arg-type]
        name = f"mutual information: {estimator}, {summary}, {prediction}"
        by_method[name] = layer_information(model, calibration, config)
    precisions, items = list(PRECISIONS.values()), items_of(plan.architecture.num_layers, "block", ())
    bank = fill(model, precisions, None, device=torch.device("cpu"))
    kl, loss = measured_rises(model, bank, items, precisions, calibration)
    first_order = first_order_rises(model, bank, items, precisions, calibration)
    for name, rises in {"KL, measured": kl, "loss, measured": loss, "loss, first order": first_order}.items():
        by_method[name] = (rises[:, 0] - rises[:, 1]).tolist()
    return by_method


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*mutual information is chance.*")
    main()
