"""Perplexity after pruning by each criterion, before and after an equal recovery; rows are kept, so it can be resumed.

    python benchmarks/pruning_criteria.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows rows.jsonl

A row that is in the file already is not computed again; ``--table`` prints what is there.
"""

import argparse
from functools import partial

import lightning as L
import torch
from studies import Row, add_arguments, complete, name_of, perplexity, recovery, text_data, uncompensated

from qpruner.calibration.text import CalibrationConfig
from qpruner.datamodules import TextDataModule
from qpruner.memory import num_parameters
from qpruner.pruning.selection import SelectionConfig
from qpruner.records.tables import markdown_table
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

CRITERIA = ("param_first", "param_second", "param_mix", "vectorize", "wanda", "magnitude_l2", "magnitude_l1", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=100)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--scopes", nargs="+", default=["local"], choices=["local", "global", "uniform"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--length", type=int, default=64)
    given = parser.parse_args()
    print(table(complete(given, wanted(given), partial(measure, given))))


def wanted(given: argparse.Namespace) -> list[Row]:
    """What tells a row from the others."""
    shared = {"base": name_of(given.base), "steps": given.steps, "calibration": [given.sequences, given.length]}
    return [
        shared | {"ratio": ratio, "criterion": criterion, "scope": scope, "seed": seed}
        for ratio in given.ratios
        for scope in given.scopes
        for criterion in given.criteria
        for seed in given.seeds
    ]


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Prunes, measures, recovers and measures again."""
    data = text_data(given, key["seed"])
    module = LoRAFinetuner(given.base, optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10), seed=key["seed"])
    scope = "local" if key["scope"] == "local" else "global"
    pruning = uncompensated(
        key["ratio"],
        criterion=key["criterion"],
        selection=SelectionConfig(scope=scope, uniform=key["scope"] == "uniform"),  # type: ignore[arg-type]
        calibration=CalibrationConfig(given.sequences, given.length),
    )
    after_pruning = Measurement(data)
    trainer = recovery(given.steps, [pruning, after_pruning])
    module.load_base()
    total = num_parameters(module.model)
    trainer.fit(module, datamodule=data)
    return {
        "removed": round(1 - after_pruning.parameters / total, 4),
        "pruned": round(after_pruning.perplexity, 3),
        "recovered": round(perplexity(trainer, module, data), 3),
    }


class Measurement(L.Callback):
    """Measures the model as the callbacks before it left it."""

    def __init__(self, data: TextDataModule, share: float = 1.0) -> None:
        self.data = data
        self.share = share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LoRAFinetuner)
        self.parameters = num_parameters(pl_module.model)
        self.perplexity = perplexity(trainer, pl_module, self.data, self.share)


def table(rows: list[Row]) -> str:
    columns = ("base", "calibration", "ratio", "removed", "scope", "criterion", "seed", "pruned", "recovered")
    return markdown_table(list(columns), [[str(row[name]) for name in columns] for row in rows])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
