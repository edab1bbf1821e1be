"""What each way to prune costs and leaves, by equal recovery; rows are kept, so it can be resumed.

    python benchmarks/peers.py --base MODEL --train TRAIN.txt --report wikitext=VALID.txt --rows rows.jsonl

A row prunes, measures perplexities, recovers for the same steps on the same rows whatever the method, and measures
again. ``--train`` is a text file, or JSON Lines with a field ``text``; nothing that is reported may stand in it.

    dense+lora              no pruning: the ceiling
    magnitude               magnitude_l2, layers compete
    taylor, taylor_global   param_first on 10 x 64 tokens, each layer the same share or layers compete
    flap                    score of FLAP alone; its own correction of biases is left out
    fisher, reconstruction  further criteria, with `--calibration` and layers that compete
    loraprune               LoRAPrune, which prunes while it trains and so has no perplexity in between
    torch-pruning           that package's pruner: FFN channels by Taylor, each layer the same share
    optipfair               that package's pruner: FFN channels by its default score, each layer the same share

``+comp`` adds the compensation that is the default, ``+local`` that without the errors of earlier layers, ``+distill``
learns from the dense model's distribution and ``+hidden`` from its last hidden states, too, ``+early`` has all of
LoRAPrune's units gone after 40 % of the steps, and ``+full`` trains all weights of the layers, in float32, in place of
adapters. Packages that are not there are left out. Seconds and memory are those of the compression alone: memory is the
peak above what the process, or the device, held with the dense model in it. A row that is in the file already is not
computed again; ``--table`` prints what is there.
"""

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from lora_guided import EARLY
from measured import AfterCompression, BeforeCompression, Cost, add_report_arguments, perplexities
from peer_packages import PEERS
from studies import Row, add_arguments, complete, name_of, recovery

from qpruner.anatomy import family_of
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import LoRAGuidedPruning, StructuredPruning
from qpruner.datamodules import TextDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.memory import num_parameters
from qpruner.pretrained import load_model
from qpruner.pruning.compensation import Compensation
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.selection import SelectionConfig
from qpruner.records.tables import markdown_table
from qpruner.training.distillation import DistillationConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

METHODS = (
    "dense+lora", "magnitude", "taylor", "taylor_global", "flap", "torch-pruning", "optipfair", "loraprune",
    "loraprune+early", "fisher", "fisher+local", "fisher+comp", "reconstruction+comp", "fisher+distill",
    "fisher+comp+distill", "fisher+comp+distill+hidden", "fisher+comp+full",
)  # fmt: skip
CRITERIA = {
    "magnitude": "magnitude_l2", "taylor": "param_first", "taylor_global": "param_first", "flap": "flap",
    "fisher": "fisher", "reconstruction": "reconstruction",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=100)
    add_report_arguments(parser)
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="several parts with +")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--full-lr", type=float, default=5e-4, help="learning rate where all weights are trained")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--calibration", type=int, nargs=2, default=[64, 128], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--compensation-text", type=int, nargs=2, default=[192, 128], metavar=("SEQUENCES", "LENGTH"))
    given = parser.parse_args()
    print(table(complete(given, wanted(given), partial(measure, given))))


def wanted(given: argparse.Namespace) -> list[Row]:
    """What tells a row from the others, for methods whose packages are there."""
    methods = []
    for method in given.methods:
        package = method.partition("+")[0]
        if package in PEERS and find_spec(package.replace("-", "_")) is None:
            print(f"{package} is not installed: left out")
        else:
            methods.append(method)
    shared = {
        "base": name_of(given.base),
        "steps": given.steps,
        "batch": [given.batch_size, given.max_length],
        "lr": given.lr,
        "calibration": given.calibration,
        "compensation_text": given.compensation_text,
        "report": {report.name: report.rows for report in given.report},
    }
    rows = [
        shared | {"ratio": 0.0 if method.startswith("dense") else ratio, "method": method, "seed": seed}
        for seed in given.seeds
        for ratio in given.ratios
        for method in methods
    ]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]  # the dense model has one ratio


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Prunes, measures, recovers and measures again."""
    name, *parts = key["method"].split("+")
    torch.manual_seed(key["seed"])
    data = TextDataModule(
        tokenizer=given.base,
        train=given.train,
        held_out=0.0,
        max_length=given.max_length,
        loader=LoaderConfig(batch_size=given.batch_size),
        seed=key["seed"],
    )
    full = "full" in parts
    cost = Cost()
    with TemporaryDirectory() as folder:
        base = given.base
        if name in PEERS:
            base = str(Path(folder, "pruned"))
            model = load_model(given.base, dtype=given.dtype, trust_remote_code=False)
            text = data.calibration(*given.calibration)
            with cost.of_work(model):
                model = PEERS[name](model, key["ratio"], text)
            model.save_pretrained(base)
            data.tokenizer.save_pretrained(base)
            del model
        module = (AllWeights if full else LoRAFinetuner)(
            base,
            dtype="float32" if full else given.dtype,
            optimizer=OptimizerConfig(lr=given.full_lr if full else given.lr, warmup_steps=min(10, given.steps // 2)),
            seed=key["seed"],
            distillation=DistillationConfig(hidden=float("hidden" in parts)) if "distill" in parts else None,
        )
        reports = partial(perplexities, given)
        after = AfterCompression(cost if name in CRITERIA else None, reports)
        callbacks: list[L.Callback] = [after]
        if name in CRITERIA:
            callbacks = [BeforeCompression(cost), structured(given, name, parts, key["ratio"]), after]
        elif name == "loraprune":
            schedule = EARLY if "early" in parts else CubicSchedule()
            callbacks = [LoRAGuidedPruning(key["ratio"], schedule=schedule)]
        trainer = recovery(given.steps, callbacks, folder, precision=given.precision)
        trainer.fit(module, datamodule=data)
        parameters = sum(p.numel() for part, p in module.model.named_parameters() if "lora_" not in part)
        dense = num_parameters(load_model(given.base, dtype=given.dtype, trust_remote_code=False))
        return {
            "removed": round(1 - parameters / dense, 4),
            "parameters": parameters,
            "pruned": after.perplexities,
            "recovered": reports(trainer, module),
            "seconds": cost.seconds,
            "megabytes": cost.megabytes,
        }


def structured(given: argparse.Namespace, name: str, parts: list[str], ratio: float) -> StructuredPruning:
    """The callback of a method that scores, and prunes before the first step."""
    compensation: Compensation = "sequential" if "comp" in parts else "local" if "local" in parts else "none"
    short = name in ("taylor", "taylor_global")
    return StructuredPruning(
        ratio,
        criterion=CRITERIA[name],  # type: ignore[arg-type]
        selection=SelectionConfig(scope="local" if name == "taylor" else "global"),
        calibration=CalibrationConfig(10, 64) if short else CalibrationConfig(*given.calibration),
        compensation=compensation,
        compensation_text=CalibrationConfig(*given.compensation_text),
    )


class AllWeights(LoRAFinetuner):
    """Trains all weights of the layers, and the adapters, which are part of the same linears."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        network = self.model.get_base_model()
        network.get_submodule(family_of(network.config)[1].layers).requires_grad_(True)
        return super().configure_optimizers()


def table(rows: list[Row]) -> str:
    """Per base, steps and ratio, one line for each method: means over seeds, and their standard deviation."""
    parts = []
    for base, steps, ratio in sorted({(row["base"], row["steps"], row["ratio"]) for row in rows}):
        here = [row for row in rows if (row["base"], row["steps"], row["ratio"]) == (base, steps, ratio)]
        texts = list(here[0]["report"])
        header = ["method", "seeds", "removed", "parameters", *(f"{text}: pruned" for text in texts)]
        header += [*(f"{text}: recovered" for text in texts), "seconds", "MB above the model"]
        lines = []
        for method in dict.fromkeys(row["method"] for row in here):
            same = [row for row in here if row["method"] == method]
            numbers = [[row["removed"] for row in same], [row["parameters"] for row in same]]
            numbers += [
                [row[when][text] if row[when] else None for row in same]
                for when in ("pruned", "recovered")
                for text in texts
            ]
            numbers += [[row[what] for row in same] for what in ("seconds", "megabytes")]
            lines.append([method, str(len(same)), *map(spread, numbers)])
        parts.append(f"{base}, {ratio:.0%} of the parameters, {steps} steps\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


def spread(values: list[float | None]) -> str:
    """The mean of the values that are there, with the standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    center = mean(known)
    digits = 0 if center >= 1000 else 3 if center < 1 else 1 if center >= 100 else 2
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 and len(set(known)) > 1 else ""
    return f"{center:,.{digits}f}{deviation}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
