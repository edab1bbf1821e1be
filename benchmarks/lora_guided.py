"""Pruning before and while a model trains, by equal numbers of training steps; rows are kept, so it can be resumed.

    python benchmarks/lora_guided.py --base qpruner/stories --seeds 0 1 2 --rows benchmarks/lora_guided.jsonl
    python benchmarks/lora_guided.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows ...
    python benchmarks/lora_guided.py --base qpruner/stories --correlation --rows benchmarks/lora_guided.jsonl

Every method trains the same adapters for the same steps on the same batches. ``magnitude`` and ``taylor`` prune before
the first step; ``taylor rounds`` likewise in ten rounds of scoring and pruning; the others while they train, ``early``
with all units gone after 40 % of the steps in place of 90 %. With
``--correlation`` the rows say how the ranks of units by the adapters' gradients agree with those by the gradients of
the weights, in the course of one fit. A row that is in the file already is not computed again; ``--table`` prints what
is there.
"""

import argparse
import time
from functools import partial
from typing import Any

import lightning as L
import torch
from studies import Row, add_arguments, complete, evaluated, name_of, recovery, study_data, uncompensated

from qpruner.callbacks import Compression, LoRAGuidedPruning
from qpruner.pruning.lora_guided import MovingAverage, score_adapted
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import Kept, SelectionConfig
from qpruner.pruning.weight_gradients import WeightGradients
from qpruner.records.tables import markdown_table
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

METHODS = (
    "magnitude", "taylor", "taylor rounds", "lora paper", "lora code", "gradient paper", "gradient code",
    "lora paper early", "lora code early",
)  # fmt: skip
EARLY = CubicSchedule(warmup=0.05, cooldown=0.6, every_n_steps=5)
"""For short fits: more than half of the steps are left to recover."""
VARIANTS = ("paper", "code")


def pruning(method: str, ratio: float) -> Compression:
    """The callback of a method."""
    match method.split():
        case ["magnitude"]:
            return uncompensated(ratio, criterion="magnitude_l2")
        case ["taylor", *rounds]:
            return uncompensated(ratio, rounds=10 if rounds else 1)
        case [criterion, variant, *early]:
            schedule = EARLY if early else CubicSchedule()
            local = SelectionConfig(scope="local")
            return LoRAGuidedPruning(ratio, criterion, variant, schedule=schedule, selection=local)  # type: ignore[arg-type]
    raise ValueError(method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=150)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the validation text that is evaluated")
    parser.add_argument("--correlation", action="store_true")
    given = parser.parse_args()
    shared = {"base": name_of(given.base), "steps": given.steps}
    if given.correlation:
        wanted = [
            shared | {"correlation": True, "ratio": r, "seed": seed} for r in given.ratios for seed in given.seeds
        ]
        rows = complete(given, wanted, partial(measure_correlation, given))
    else:
        wanted = [
            shared | {"ratio": ratio, "method": method, "seed": seed}
            for ratio in given.ratios
            for seed in given.seeds
            for method in given.methods
        ]
        rows = complete(given, wanted, partial(measure, given))
    print(table([row for row in rows if "method" in row]))
    print(correlation_table([row for row in rows if "correlation" in row]))


def fit(given: argparse.Namespace, seed: int, callbacks: list[L.Callback]) -> tuple[L.Trainer, LoRAFinetuner, Any]:
    data = study_data(given, seed)
    module = LoRAFinetuner(given.base, optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10), seed=seed)
    trainer = recovery(given.steps, callbacks)
    trainer.fit(module, datamodule=data)
    return trainer, module, data


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Prunes, trains and measures."""
    since = time.perf_counter()
    trainer, module, data = fit(given, key["seed"], [pruning(key["method"], key["ratio"])])
    seconds = time.perf_counter() - since
    results = evaluated(trainer, module, data, given.share)
    assert module.plan is not None
    dense, widths = module.plan.architecture, module.plan.widths
    return {
        "loss": round(results["loss"], 4),
        "perplexity": round(results["perplexity"], 3),
        "kept": [sum(widths.kv_groups) / sum(dense.kv_groups), sum(widths.ffn_channels) / sum(dense.ffn_channels)],
        "seconds": round(seconds, 1),
    }


class Correlation(L.Callback):
    """Averages scores by adapters' and by weights' gradients beside one another, and compares their ranks.

    Args:
        every_n_steps: optimizer steps between two comparisons.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.comparisons: list[Row] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LoRAFinetuner)
        self.weights = WeightGradients(pl_module.model.get_base_model())
        self.averages: dict[str, MovingAverage] = {}
        pl_module.after_clipping.append(partial(self.observe, trainer, pl_module))

    def observe(self, trainer: L.Trainer, module: LoRAFinetuner, finite: bool) -> None:
        model, gradients = module.model.get_base_model(), self.weights.take(lambda gradient: gradient)
        for variant in VARIANTS:
            for name, by in (("lora", None), ("gradient", gradients)):
                scores = score_adapted(model, variant, by)  # type: ignore[arg-type]
                zeros = [LayerScores(0 * layer.kv_groups, 0 * layer.ffn_channels) for layer in scores]
                self.averages.setdefault(f"{name} {variant}", MovingAverage(0.9, zeros)).add(scores)
        step = trainer.global_step + 1
        if step == 1 or step % self.every_n_steps == 0:
            masks = module.compressed.masks
            assert masks is not None
            self.comparisons.append({"step": step, **{v: self.compared(v, masks.kept) for v in VARIANTS}})

    def compared(self, variant: str, kept: Kept) -> list[float]:
        """Mean over layers of the rank correlations of KV groups and of FFN channels that are alive."""
        pairs = zip(*(self.averages[f"{name} {variant}"].scores for name in ("lora", "gradient")), strict=True)
        of_layers = [
            (spearman(a.kv_groups[groups], b.kv_groups[groups]), spearman(a.ffn_channels[ffn], b.ffn_channels[ffn]))
            for (a, b), (groups, ffn) in zip(pairs, kept, strict=True)
        ]
        return [round(sum(kind) / len(kind), 3) for kind in zip(*of_layers, strict=True)]


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Rank correlation of two vectors without ties; 0 where there is one entry."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1]) if len(first) > 1 else 0.0


def measure_correlation(given: argparse.Namespace, key: Row) -> Row:
    """Follows one fit that prunes by the adapters' gradients."""
    following = Correlation(every_n_steps=10)
    fit(given, key["seed"], [pruning("lora code", key["ratio"]), following])
    return {"correlations": following.comparisons}


def table(rows: list[Row]) -> str:
    columns = ("base", "ratio", "seed", "method", "loss", "perplexity", "seconds")
    return markdown_table(list(columns), [[str(row[name]) for name in columns] for row in rows])


def correlation_table(rows: list[Row]) -> str:
    header = ["base", "ratio", "seed", "step", *(f"{v}: {u}" for v in VARIANTS for u in ("KV groups", "FFN channels"))]
    cells = [
        [row["base"], row["ratio"], row["seed"], at["step"], *at["paper"], *at["code"]]
        for row in rows
        for at in row["correlations"]
    ]
    return markdown_table(header, [list(map(str, line)) for line in cells])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
