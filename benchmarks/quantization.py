"""Perplexity of a pruned and quantized model, before and after an equal recovery; rows are kept, so it can be resumed.

    python benchmarks/quantization.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows rows.jsonl

A row that is in the file already is not computed again; ``--table`` prints means and spreads over the seeds.
"""

import argparse
from functools import partial
from statistics import mean, stdev

import lightning as L
import torch
from pruning_criteria import Measurement
from studies import Row, add_arguments, complete, name_of, perplexity, recovery, text_data, uncompensated

from qpruner.callbacks import MixedPrecisionQuantization
from qpruner.datamodules import TextDataModule
from qpruner.records.tables import markdown_table
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

NUM_LAYERS = 6
WIDTHS: dict[str, int | list[int]] = {"4": 4, "8": 8, "mixed": [8, *[4] * (NUM_LAYERS - 2), 8], "16": 16}
"""Bits of the blocks; mixed leaves the first and the last of six at 8."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=30)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.2, 0.5])
    parser.add_argument("--bits", nargs="+", default=["4", "8", "mixed"], choices=WIDTHS)
    parser.add_argument("--loftq", type=int, nargs="+", default=[0, 1], help="iterations; 0 starts from zero")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.25, help="of the validation text, from its start")
    given = parser.parse_args()
    print(table(complete(given, wanted(given), partial(measure, given))))


def wanted(given: argparse.Namespace) -> list[Row]:
    """What tells a row from the others; whole tables of a seed first."""
    shared = {"base": name_of(given.base), "steps": given.steps, "share": given.share}
    return [
        shared | {"ratio": ratio, "bits": bits, "loftq": loftq, "seed": seed}
        for seed in given.seeds
        for ratio in given.ratios
        for bits in given.bits
        for loftq in given.loftq
    ]


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Compresses, measures, recovers and measures again."""
    data = text_data(given, key["seed"])
    module = LoRAFinetuner(given.base, optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10), seed=key["seed"])
    pruning = [uncompensated(key["ratio"])] if key["ratio"] else []
    quantization = MixedPrecisionQuantization(WIDTHS[key["bits"]], loftq_iterations=key["loftq"])
    compressed, started = Measurement(data, given.share), Start(data, given.share)
    trainer = recovery(given.steps, [*pruning, quantization, compressed, started])
    trainer.fit(module, datamodule=data)
    bits = module.compressed.average_bits
    assert bits is not None
    return {
        "average_bits": round(bits, 2),
        "quantized": round(compressed.perplexity, 3),
        "start": round(started.perplexity, 3),
        "recovered": round(perplexity(trainer, module, data, given.share), 3),
    }


class Start(L.Callback):
    """Measures the model with its adapters as they start."""

    def __init__(self, data: TextDataModule, share: float) -> None:
        self.data = data
        self.share = share

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.perplexity = perplexity(trainer, pl_module, self.data, self.share)


def table(rows: list[Row]) -> str:
    keys = list(dict.fromkeys((row["ratio"], row["bits"], row["loftq"]) for row in rows))
    lines = []
    for key in sorted(keys, key=str):
        same = [row for row in rows if (row["ratio"], row["bits"], row["loftq"]) == key]
        measured = [spread([row[name] for row in same]) for name in ("quantized", "start", "recovered")]
        lines.append([f"{key[0]}", key[1], f"{same[0]['average_bits']}", "LoftQ" if key[2] else "zero", *measured])
    header = ["ratio", "bits", "average bits", "start", "quantized", "with adapters", "recovered"]
    return markdown_table(header, lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
