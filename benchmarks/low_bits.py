"""One to eight bits: each way to round, right after it and after the same recovery; resumable.

    python benchmarks/low_bits.py --base MODEL --train TRAIN.jsonl --report wikitext2=TEST.txt:20 --rows rows.jsonl
    python benchmarks/low_bits.py ... --sizes 2 3 4 2.5 --methods nearest gptq+neuqi+dense --starts none calibrated

A size is a number of bits for all decoder linears; with a point, an average under which bits are shared out by
``--allocation`` among ``--widths``, scales counted; or ``0.25x``, a share of the dense 16-bit bytes of the decoder
linears, whatever was pruned before.

    nearest     each weight to the nearest value between the least and the greatest of its group
    mse, neuqi  nearest, on a grid that was searched for
    gptq        columns make up for each other's errors, on such text as ``--text`` says

``+mse``, ``+neuqi`` search the grid, ``+order`` takes the columns with the largest inputs first, ``+first`` adds the
first-order term, ``+refine`` fits scales and codes in turns afterwards, ``+half`` and ``+dense`` aim at the dense
model's outputs by half or in full, ``+loss`` weighs tokens by the gradient of the loss at the end of the model,
``+loss4`` by that of each of four groups of outputs, ``+skip`` and ``+normed`` leave out the first tokens of a
sequence, or count errors as shares of the hidden states. ``default`` is what `MixedPrecisionQuantization` does with
``calibrated: {}``.

A start is what adapters begin with before the recovery: ``zero``, ``weight`` (nearest to the weight, as LoftQ) or
``calibrated`` (nearest in the outputs); ``none`` recovers nothing. Perplexities are of the packed model without
adapters, and of the recovered one with them. Seconds and memory are those of the compression.
"""

import argparse
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from measured import AfterCompression, BeforeCompression, Cost, add_report_arguments, perplexities
from studies import Row, add_arguments, complete, name_of, recovery

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.datamodules import TextDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.memory import tensor_bytes
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.rounding import RoundingConfig
from qpruner.records.tables import markdown_table
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

SHARING = ("allocation", "widths", "deciding_text", "granularity", "measure")
"""What tells how a size is shared out."""
STARTS = ("none", "zero", "weight", "calibrated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=40)
    add_report_arguments(parser)
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0], help="of all parameters, pruned before")
    parser.add_argument("--sizes", nargs="+", default=["4", "3", "2"], metavar="SIZE")
    parser.add_argument("--methods", nargs="+", default=["nearest", "default"], metavar="METHOD")
    parser.add_argument("--starts", nargs="+", default=["none"], choices=STARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--format", default="affine-double", help="number format of all widths")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="of sizes that are shared out"
    )
    parser.add_argument("--allocation", default="sensitivity", choices=("uniform", "sensitivity", "marginal"))
    parser.add_argument("--granularity", default="block", choices=("block", "unit"), help="what gets bits of its own")
    parser.add_argument("--measure", default="loss", choices=("loss", "kl"), help="cost of a width")
    parser.add_argument("--text", type=int, nargs=2, default=[128, 256], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--deciding-text", type=int, nargs=2, default=[16, 128], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    print(table(complete(given, wanted(given), partial(measure, given))))


def wanted(given: argparse.Namespace) -> list[Row]:
    """What tells a row from the others; what a row does not depend on is not part of its key."""
    shared = {
        "base": name_of(given.base), "format": given.format, "group": given.group, "text": given.text,
        "report": {report.name: report.rows for report in given.report},
        "length": given.length or given.max_length, "dtype": given.dtype,
    }  # fmt: skip
    training = {"steps": given.steps, "batch": [given.batch_size, given.max_length], "lr": given.lr}
    training["precision"] = given.precision
    sharing = {name: getattr(given, name) for name in SHARING}
    return [
        shared
        | {"ratio": ratio, "size": size, "method": method, "start": start, "seed": seed}
        | (training if start != "none" else {})
        | (sharing if is_shared(size) else {})
        for seed in given.seeds
        for ratio in given.ratios
        for size in given.sizes
        for method in given.methods
        for start in given.starts
    ]


def is_shared(size: str) -> bool:
    """Whether bits are shared out, rather than the same for all."""
    return not size.isdigit()


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Compresses, measures, recovers and measures again."""
    data = TextDataModule(
        tokenizer=given.base,
        train=given.train,
        held_out=0.0,
        max_length=given.max_length,
        loader=LoaderConfig(batch_size=given.batch_size),
        seed=key["seed"],
    )
    cost, steps = Cost(), 0 if key["start"] == "none" else given.steps
    module = LoRAFinetuner(
        given.base,
        dtype=given.dtype,
        optimizer=OptimizerConfig(lr=given.lr, warmup_steps=min(10, given.steps // 2)),
        seed=key["seed"],
    )
    reports = partial(perplexities, given)
    after = AfterCompression(cost, reports)
    pruning: list[L.Callback] = [StructuredPruning(key["ratio"])] if key["ratio"] else []
    callbacks = [BeforeCompression(cost), *pruning, quantization(given, key), after]
    with TemporaryDirectory() as folder:
        trainer = recovery(max(steps, 1), callbacks, folder, precision=given.precision)
        if steps:
            trainer.fit(module, datamodule=data)
        else:
            module.trainer = trainer  # type: ignore[assignment]
            trainer.datamodule = data  # type: ignore[attr-defined]
            data.prepare_data()
            data.setup("fit")
            for callback in callbacks:
                callback.setup(trainer, module, "fit")
        return {
            "bits": round(module.compressed.average_bits or 0, 3),
            "bytes": tensor_bytes(module.compressed.network),
            "quantized": after.perplexities,
            "recovered": reports(trainer, module) if steps else None,
            "seconds": cost.seconds,
            "megabytes": cost.megabytes,
        }


def quantization(given: argparse.Namespace, key: Row) -> MixedPrecisionQuantization:
    """The callback that a row asks for."""
    size, method, start = key["size"], key["method"], key["start"]
    plain = method == "nearest" and start != "calibrated"
    options: dict[str, Any] = {}
    if not is_shared(size):
        options = {"bits": int(size)}
    else:
        budget = Budget(share=float(size[:-1])) if size.endswith("x") else Budget(average_bits=float(size))
        deciding = DecidingConfig(
            widths=given.widths,
            granularity=given.granularity,
            measure=given.measure,
            calibration=CalibrationConfig(*given.deciding_text),
        )
        options = {"allocation": given.allocation, "budget": budget, "deciding": deciding}
    return MixedPrecisionQuantization(
        formats=dict.fromkeys(given.widths, given.format),
        group=given.group,
        loftq_iterations=0 if start in ("none", "zero") else 1,
        calibrated=None if plain else calibrated(method, start, CalibrationConfig(*given.text)),
        **options,
    )


def calibrated(method: str, start: str, text: CalibrationConfig) -> CalibratedConfig:
    """The options that the parts of a method's name ask for."""
    adapters: Any = start if start in ("weight", "calibrated") else "weight"
    if method == "default":
        return CalibratedConfig(text=text, adapters=adapters)
    name, *parts = method.split("+")
    return CalibratedConfig(
        rounding=RoundingConfig(
            method="gptq" if name == "gptq" else "nearest",
            grid=next((grid for grid in ("mse", "neuqi") if grid in (name, *parts)), "minmax"),  # type: ignore[arg-type]
            act_order="order" in parts,
            first_order=0.1 if "first" in parts else 0.0,
            refinements=3 if "refine" in parts else 0,
            alpha=1.0 if "dense" in parts else 0.5 if "half" in parts else 0.0,
        ),
        output_groups=4 if "loss4" in parts else int("loss" in parts),
        tokens="skip" if "skip" in parts else "normed" if "normed" in parts else "equal",
        adapters=adapters,
        text=text,
    )


def table(rows: list[Row]) -> str:
    """Per base, share pruned and size, one line for each method, start and seed."""
    texts = list(dict.fromkeys(text for row in rows for text in row["report"]))
    header = ["base", "pruned", "size", "shared out by", "bits", "MB", "method", "start", "seed"]
    header += [f"{text}: {when}" for when in ("quantized", "recovered") for text in texts]
    lines = [
        [
            row["base"],
            f"{row['ratio']:.0%}",
            row["size"],
            " ".join(map(str, (row[key] for key in SHARING if key in row))),
            f"{row['bits']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            row["method"],
            row["start"],
            str(row["seed"]),
            *(
                f"{row[when][text]:,.2f}" if row[when] and text in row[when] else "-"
                for when in ("quantized", "recovered")
                for text in texts
            ),
            f"{row['seconds']:.0f}",
            f"{row['megabytes']:,.0f}",
        ]
        for row in rows
    ]
    return markdown_table([*header, "seconds", "MB above the model"], lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
