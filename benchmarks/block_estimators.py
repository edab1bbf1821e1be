"""Two ways to find what few bits cost a block among others of random bits, at equal numbers of forward passes.

    python benchmarks/block_estimators.py --base MODEL --train TRAIN.txt --validation VALID.txt --widths 2 4

``paired``: each block in both widths inside random contexts, as `qpruner.allocation.marginal` does it. ``regression``:
independent assignments, each block in each width equally often, every second one the mirror of the one before; least
squares on indicators, with a ridge. The loss of all assignments on the calibration text is measured once; the truth is
the mean difference over all contexts. Of each estimate the table gives the rank correlation of its costs with the
truth, and its error as a share of the spread of the truth between blocks; means over draws.
"""

import argparse
from itertools import product
from statistics import mean

import numpy as np
import torch
from block_sensitivities import calibration_text, rank_correlation
from block_study import BlockStudy, add_study_arguments, vectors_of
from torch import Tensor

from qpruner.allocation.marginal import averaged, draw_contexts
from qpruner.likelihood import token_nll
from qpruner.records.tables import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, steps=0)
    parser.add_argument("--draws", type=int, default=100)
    given = parser.parse_args()
    study = BlockStudy(given)
    losses = losses_of_all(study)
    n = losses.ndim
    everywhere = torch.tensor(list(product(range(2), repeat=n)))
    truth = averaged(table_of(losses, everywhere))[0][:, 0].numpy()
    low, high = losses.flatten()[0], losses.flatten()[-1]
    print(f"All narrow {low:.4f}, all wide {high:.4f}; costs of blocks {np.round(truth, 4).tolist()}.\n")
    alone = [float(losses[tuple(int(b != block) for b in range(n))] - losses.flatten()[-1]) for block in range(n)]
    rows = [["each alone", f"{1 + n / 2:.0f}", *scores([np.array(alone)], truth)]]
    for number in given.contexts:
        passes = round(number * (1 + n / 2))
        paired = [
            averaged(table_of(losses, draw_contexts(n, 2, number, seed)))[0][:, 0].numpy()
            for seed in range(given.draws)
        ]
        rows.append([f"paired, {number} contexts", f"{passes}", *scores(paired, truth)])
        for ridge in (0.0, 0.1):
            fitted = [regression(losses, passes, ridge, seed) for seed in range(given.draws)]
            rows.append([f"regression, ridge {ridge:g}", f"{passes}", *scores(fitted, truth)])
    print(markdown_table(["estimate", "forward passes", "rank correlation", "relative error"], rows))


def losses_of_all(study: BlockStudy) -> Tensor:
    """Loss on the calibration text of each assignment; [2] * n, narrow first."""
    tokens = calibration_text(study).to(study.device)
    losses = []
    with torch.no_grad():
        for vector in vectors_of(study.num_blocks, study.given.widths):
            study.assemble(vector)
            network = study.model.network.eval().to(study.device)
            losses.append(mean(float(token_nll(network, part, part).double().mean()) for part in tokens.split(16)))
    return torch.tensor(losses, dtype=torch.float64).view([2] * study.num_blocks)


def table_of(losses: Tensor, contexts: Tensor) -> Tensor:
    """The losses of contexts with each block in both widths, [K, n, 2]."""
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [losses[tuple(place if b == block else c for b, c in enumerate(context))] for place in (0, 1)]
                    )
                    for block in range(len(context))
                ]
            )
            for context in contexts.tolist()
        ]
    )


def regression(losses: Tensor, passes: int, ridge: float, seed: int) -> np.ndarray:
    """Costs by least squares on mirrored draws."""
    contexts = draw_contexts(losses.ndim, 2, passes + passes % 2, seed)
    contexts = contexts.view(2, -1, losses.ndim).transpose(0, 1).reshape(-1, losses.ndim)[:passes]
    y = np.array([float(losses[tuple(context)]) for context in contexts.tolist()])
    x = 1.0 - contexts.double().numpy()  # 1 where narrow
    x_centred, y_centred = x - x.mean(0), y - y.mean()
    return np.linalg.lstsq(
        np.vstack([x_centred, np.sqrt(ridge * len(y) / 4) * np.eye(x.shape[1])]),
        np.concatenate([y_centred, np.zeros(x.shape[1])]),
        rcond=None,
    )[0]


def scores(estimates: list[np.ndarray], truth: np.ndarray) -> list[str]:
    correlation = mean(rank_correlation(estimate.tolist(), truth.tolist()) for estimate in estimates)
    error = mean(float(np.sqrt(np.mean((estimate - truth) ** 2))) for estimate in estimates) / truth.std()
    return [f"{correlation:.3f}", f"{error:.1%}"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
