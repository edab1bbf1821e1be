"""auto-round on the terms of `joint`: its bits for each linear, its rounding, then the same recovery; resumable.

    pip install auto-round
    python benchmarks/auto_rounding.py --base MODEL --train TRAIN.jsonl --report wikitext2=TEST.txt:20 --rows rows.jsonl
    python benchmarks/auto_rounding.py ... --bits 4 3 2.4

A whole number of bits is one width for all decoder linears, one with a point an average that AutoScheme shares out
among ``--widths``, scales and zero points counted. The weights that auto-round leaves are measured, and recovered by
LoRA that starts from zero, as what its formats hold: dense, so that no kernel of either side matters. Its text is that
of ``--train``, of which it takes as many sequences of as many tokens as ``--text`` says.
"""

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from joint import described
from measured import AfterCompression, add_report_arguments, perplexities
from studies import Row, add_arguments, complete, name_of, recovery, text_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpruner.records.tables import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=40)
    add_report_arguments(parser)
    parser.add_argument("--bits", nargs="+", default=["2.4"], help="a width, or with a point an average")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4], help="bits to choose from")
    parser.add_argument("--iterations", type=int, default=20, help="of auto-round's gradient steps for each block")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--text", type=int, nargs=2, default=[32, 256], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    shared = {
        "base": name_of(given.base), "group": given.group, "text": given.text, "widths": given.widths,
        "report": {report.name: report.rows for report in given.report},
        "length": given.length or given.max_length, "dtype": given.dtype, "seed": given.seed,
        "steps": given.steps, "batch": [given.batch_size, given.max_length], "lr": given.lr,
        "iterations": given.iterations,
    }  # fmt: skip
    keys = [shared | {"method": f"auto-round:{bits}"} for bits in given.bits]
    print(table(complete(given, keys, partial(measure, given))))


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Quantizes, measures, recovers and measures again."""
    with TemporaryDirectory() as folder:
        since = perf_counter()
        bits = quantize(given, key["method"].partition(":")[2], Path(folder) / "model")
        seconds = perf_counter() - since
        reports = partial(perplexities, given)
        module = described(argparse.Namespace(**{**vars(given), "base": str(Path(folder) / "model")}), key["seed"])
        after = AfterCompression(None, reports)
        trainer = recovery(given.steps, [after], folder)
        trainer.fit(module, datamodule=text_data(given, key["seed"]))
        return {
            "bits": round(bits, 3),
            "quantized": after.perplexities,
            "recovered": reports(trainer, module),
            "seconds": round(seconds, 1),
        }


def quantize(given: argparse.Namespace, bits: str, folder: Path) -> float:
    """Writes what auto-round makes of the base; the average bits of its decoder linears, scales counted."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    def scheme(width: int) -> QuantizationScheme:
        return QuantizationScheme(bits=width, group_size=given.group, sym=False, data_type="int", act_bits=16)

    model = AutoModelForCausalLM.from_pretrained(given.base, dtype=given.dtype)
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    sequences, length = given.text
    text: dict[str, Any] = {"dataset": given.train, "nsamples": sequences, "seqlen": length}
    wanted: Any = scheme(int(bits)) if bits.isdigit() else AutoScheme(
        avg_bits=float(bits), options=[scheme(width) for width in given.widths], **text
    )  # fmt: skip
    rounding = AutoRound(
        model, tokenizer=tokenizer, scheme=wanted, iters=given.iterations, batch_size=4, device_map="cpu", **text
    )
    quantized, layers = rounding.quantize()
    quantized.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return average(quantized, layers, given.group)


def average(model: Any, layers: dict[str, Any], group: int) -> float:
    """Bits of all decoder linears over the number of their weights: codes, a scale of 16 bits and a zero point."""
    held = [(module.weight.numel(), layers[name]["bits"]) for name, module in model.named_modules() if name in layers]
    quantized = [(number, bits) for number, bits in held if bits < 16]
    total = sum(number * (bits + (16 + bits) / group) for number, bits in quantized)
    return total / sum(number for number, _ in quantized)


def table(rows: list[Row]) -> str:
    texts = list(dict.fromkeys(text for row in rows for text in row["report"]))
    lines = [
        [row["base"], row["method"], f"{row['bits']:.2f}"]
        + [
            f"{row[when][text]:,.2f}" if text in row[when] else "-"
            for when in ("quantized", "recovered")
            for text in texts
        ]
        + [f"{row['seconds']:.0f}"]
        for row in rows
    ]
    header = ["base", "method", "bits", *(f"{text}: {when}" for when in ("quantized", "recovered") for text in texts)]
    return markdown_table([*header, "seconds"], lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
