"""Structure and precision under one budget of bytes: one after the other, learned or searched together; resumable.

    python benchmarks/joint.py --base MODEL --train TRAIN.jsonl --report wikitext2=TEST.txt:20 --rows rows.jsonl
    python benchmarks/joint.py ... --shares 0.15 0.1 --methods unpruned-mixed joint

Every method ends in a plan, which is carried out in the same way: compensation, rounding by text, adapters that start
from what rounding left, and a recovery of equal length. Shares are of the 16-bit bytes of the dense decoder linears.

    unpruned-uniform       nothing pruned, the widest bits that fit for all
    unpruned-mixed         nothing pruned, bits by unit, by the divergence from the dense model
    pruned-uniform:R       R of all parameters pruned by the default criterion, then the widest bits that fit for all
    pruned-mixed:R         the same, then bits by unit, as before
    pruned-searched:R      the same, then bits by a search of short fits (``--trials``)
    gates-mixed:R          units chosen by gates, unquantized, projected to 1 - R of the bytes as GRASPrune has it;
                           then bits by unit, as before
    start                  the plan that gates begin with, by Fisher information: nothing learned
    joint, joint+lifts ..  gates over both; ``+hyper``, ``+penalty``, ``+lifts``, ``+text`` and ``+straight`` change how
                           they learn, wherever gates do
    once                   a hypernetwork that learns for all ``--shares`` in turns, the first as its main budget
    searched               widths of layers and bits by a search of short fits
    searched-from-joint    the same, begun at the plan that gates have learned

Perplexities are of the packed model without adapters, and of the recovered one with them. ``seconds`` are those
of deciding; ``kept`` is the share of the decoder's weights that stays. With ``--banks`` the codes of the dense model in
all widths, and what each width costs, are made once for all rows of a base and seed; ``seconds`` then lack them.
With ``--models`` the recovered model of each row is kept for ``qpruner evaluate``, in a folder as ``joint-0.15-0``.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import lightning as L
import torch
from measured import AfterCompression, add_report_arguments, perplexities
from studies import Row, add_arguments, complete, name_of, recovery, text_data

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.anatomy import unit_weights
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import KeepModel, MixedPrecisionQuantization, PlannedPruning, StructuredPruning
from qpruner.datamodules import TextDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.joint.config import JointConfig
from qpruner.joint.space import unit_bytes
from qpruner.memory import tensor_bytes
from qpruner.plan import CompressionPlan
from qpruner.pretrained import held_in, load_config
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.records.folder import RunFolder
from qpruner.records.tables import markdown_table
from qpruner.runs.learning import Learning
from qpruner.search.config import SearchConfig
from qpruner.search.structure import StructureConfig
from qpruner.search.trainer import SearchTrainer
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

CHANGES: dict[str, dict[str, Any]] = {
    "hyper": {"gates": "hypernetwork"},
    "penalty": {"constraint": "penalty"},
    "lifts": {"lifts": True},
    "text": {"loss": "cross_entropy"},
    "straight": {"estimator": "straight_through"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=40)
    add_report_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.15, 0.1])
    parser.add_argument("--methods", nargs="+", default=["unpruned-mixed", "pruned-mixed:0.2", "joint"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4], help="bits to choose from")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--text", type=int, nargs=2, default=[128, 256], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--deciding-text", type=int, nargs=2, default=[16, 128], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--banks", type=Path, help="folder that keeps banks of the dense model for further rows")
    parser.add_argument("--models", type=Path, help="folder that keeps the recovered model of each row")
    parser.add_argument("--learning", type=int, default=200, help="steps in which gates learn")
    parser.add_argument("--trials", type=int, default=24, help="of searches, of 20 steps each")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    print(table(complete(given, wanted(given), partial(measure, given))))


def wanted(given: argparse.Namespace) -> list[Row]:
    """What tells a row from the others; what a row does not depend on is not part of its key."""
    shared = {
        "base": name_of(given.base), "group": given.group, "text": given.text, "widths": given.widths,
        "report": {report.name: report.rows for report in given.report},
        "length": given.length or given.max_length, "dtype": given.dtype,
        "steps": given.steps, "batch": [given.batch_size, given.max_length], "lr": given.lr,
    }  # fmt: skip
    return [
        shared
        | {"share": share, "method": method, "seed": seed}
        | ({"learning": given.learning} if any(name in method for name in ("joint", "gates", "once")) else {})
        | ({"shares": given.shares} if method == "once" else {})
        | ({"trials": given.trials} if "searched" in method else {})
        for seed in given.seeds
        for share in given.shares
        for method in given.methods
    ]


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Decides, carries the plan out, measures, recovers and measures again."""
    with TemporaryDirectory() as folder:
        since = perf_counter()
        plan = plan_of(given, key, Path(folder))
        seconds = perf_counter() - since
        reports = partial(perplexities, given)
        after = AfterCompression(None, reports)
        callbacks = [*carried_out(given, plan, key), after, *keeping(given, key)]
        module, data = described(given, key["seed"]), text_data(given, key["seed"])
        trainer = recovery(given.steps, callbacks, folder)
        with banked(given, key["seed"], RunFolder(Path(folder) / "fit")) as place:
            if key["method"] == "unpruned-mixed":  # the others decide on a model of their own, or have decided
                callbacks[0].folder = place  # type: ignore[attr-defined]
            trainer.fit(module, datamodule=data)
        done = module.compressed.known_plan()
        return {
            "bits": round(module.compressed.average_bits or 0, 3),
            "kept": round(unit_weights(done.widths) / unit_weights(done.architecture), 3),
            "of_budget": round(unit_bytes(done, 2) / (key["share"] * 2 * unit_weights(done.architecture)), 4),
            "bytes": tensor_bytes(module.compressed.network),
            "quantized": after.perplexities,
            "recovered": reports(trainer, module),
            "seconds": round(seconds, 1),
        }


@contextmanager
def banked(given: argparse.Namespace, seed: int, place: RunFolder) -> Iterator[RunFolder]:
    """The folder of a run meanwhile takes what earlier rows measured of the dense model, and leaves it for later ones.

    A link in the place of the bank outlives that runs remove it when they are done.
    """
    if given.banks is None:
        yield place
        return
    kept: Path = given.banks / f"{name_of(given.base)}-{seed}-{'-'.join(map(str, given.widths))}"
    kept.mkdir(parents=True, exist_ok=True)
    place.path.mkdir(parents=True)
    place.bank.symlink_to((kept / "bank").absolute())
    (kept / "bank").mkdir(exist_ok=True)
    measured = kept / place.sensitivities.name
    if measured.exists():
        shutil.copyfile(measured, place.sensitivities)
    yield place
    if place.sensitivities.exists():
        shutil.copyfile(place.sensitivities, measured)


def described(given: argparse.Namespace, seed: int) -> LoRAFinetuner:
    optimizer = OptimizerConfig(lr=given.lr, warmup_steps=min(10, given.steps // 2))
    return LoRAFinetuner(given.base, dtype=given.dtype, optimizer=optimizer, seed=seed)


def quantization(given: argparse.Namespace, share: float, **options: Any) -> MixedPrecisionQuantization:
    """What shares out a budget among units, by codes that text rounds."""
    deciding = DecidingConfig(
        widths=given.widths, granularity="unit", measure="kl", calibration=CalibrationConfig(*given.deciding_text)
    )
    return MixedPrecisionQuantization(
        **{
            "allocation": "sensitivity",
            "budget": Budget(share=share),
            "deciding": deciding,
            "calibrated": CalibratedConfig(text=CalibrationConfig(*given.text)),
            **options,
        },
        formats=dict.fromkeys(given.widths, "affine-double"),
        group=given.group,
    )


def carried_out(given: argparse.Namespace, plan: CompressionPlan | list[L.Callback], key: Row) -> list[L.Callback]:
    """The callbacks that carry a plan out; those that decide as they go come as they are."""
    if isinstance(plan, list):
        return plan
    return [PlannedPruning(plan), MixedPrecisionQuantization.of_plan(plan, quantization(given, key["share"]))]


def keeping(given: argparse.Namespace, key: Row) -> list[L.Callback]:
    """What keeps the model of a row, if that is wanted."""
    if given.models is None:
        return []
    folder = given.models / f"{key['method'].replace(':', '-')}-{key['share']:g}-{key['seed']}"
    return [KeepModel(folder, folder)]


def plan_of(given: argparse.Namespace, key: Row, folder: Path) -> CompressionPlan | list[L.Callback]:
    """The plan of a method, or the callbacks that make it."""
    share, (name, _, ratio), seed = key["share"], key["method"].partition(":"), key["seed"]
    method, *changes = name.split("+")
    config = JointConfig(given.learning, **{k: v for change in changes for k, v in CHANGES[change].items()})
    uniform, mixed = quantization(given, share, allocation="uniform"), quantization(given, share)
    pruning = StructuredPruning(float(ratio or 0.2))
    match method:
        case "unpruned-uniform":
            return [uniform]
        case "unpruned-mixed":
            return [mixed]
        case "pruned-uniform":
            return [pruning, uniform]
        case "pruned-mixed":
            return [pruning, mixed]
        case "pruned-searched":
            return searched(given, seed, folder, [pruning, mixed])
        case "gates-mixed":
            size = held_in(load_config(given.base), given.dtype).itemsize  # while shares are of 16 bits
            unquantized = quantization(
                given,
                (1 - float(ratio)) * size / 2,
                allocation="uniform",
                deciding=DecidingConfig(widths=(16,)),
                calibrated=None,
            )
            alone = argparse.Namespace(**{**vars(given), "banks": None})  # that of other widths stays
            learnt = learned(alone, seed, folder, [pruning, unquantized], config)
            return [PlannedPruning(learnt), mixed]
        case "searched":
            return searched(given, seed, folder, [pruning, mixed], StructureConfig())
        case "searched-from-joint":
            start = learned(given, seed, folder / "learned", [pruning, mixed], config)
            start.write(folder / "start.json")
            structure = StructureConfig(start=str(folder / "start.json"))
            return searched(given, seed, folder, [pruning, mixed], structure)
        case "start":
            return learned(given, seed, folder, [pruning, mixed], JointConfig(steps=1, lr=1e-9))
        case "joint":
            return learned(given, seed, folder, [pruning, mixed], config)
        case "once":
            first, *further = given.shares
            config = JointConfig(
                given.learning, gates="hypernetwork", further_budgets=[Budget(share=other) for other in further]
            )
            main = learned(given, seed, folder, [pruning, quantization(given, first)], config)
            place = RunFolder(folder / "run").plans / f"budget-{given.shares.index(share)}.json"
            return main if share == first else CompressionPlan.read(place)
    raise ValueError(f"There is no method {method!r}.")


def learned(
    given: argparse.Namespace, seed: int, folder: Path, callbacks: list[L.Callback], config: JointConfig
) -> CompressionPlan:
    """The plan that gates learn."""
    place = RunFolder(folder / "run")
    data = text_data(given, seed)
    learning = Learning.of(place, described(given, seed), data, callbacks, config)
    with banked(given, seed, learning.part):
        learning.run({**QUIET}, checkpoint_every_n_steps=10**6)
    return CompressionPlan.read(place.learned_plan)


def searched(
    given: argparse.Namespace,
    seed: int,
    folder: Path,
    callbacks: list[L.Callback],
    structure: StructureConfig | None = None,
) -> CompressionPlan:
    """The plan that a search of short fits finds; ``--validation`` chooses, or what is held out of the text."""
    place = RunFolder(folder / "search")
    for callback in callbacks:
        callback.folder = place  # type: ignore[attr-defined]
    trainer = SearchTrainer(**QUIET, default_root_dir=str(place.path), callbacks=callbacks, limit_val_batches=20)
    data = TextDataModule(
        tokenizer=given.base,
        train=given.train,
        validation=given.validation,
        held_out=0.0 if given.validation else 0.05,
        layout="packed",
        max_length=given.max_length,
        loader=LoaderConfig(batch_size=given.batch_size),
        seed=seed,
    )
    config = SearchConfig(trials=given.trials, finalist_seeds=2, structure=structure)
    trainer.search(described(given, seed), data, config)
    return CompressionPlan.read(place.plan)


QUIET = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip


def table(rows: list[Row]) -> str:
    """Per base and share, one line for each method and seed."""
    texts = list(dict.fromkeys(text for row in rows for text in row["report"]))
    header = ["base", "share", "method", "seed", "bits", "kept", "of budget", "MB"]
    header += [f"{text}: {when}" for when in ("quantized", "recovered") for text in texts]
    lines = [
        [
            row["base"],
            f"{row['share']:g}",
            row["method"],
            str(row["seed"]),
            f"{row['bits']:.2f}",
            f"{row['kept']:.0%}",
            f"{row['of_budget']:.1%}",
            f"{row['bytes'] / 1e6:.1f}",
            *(
                f"{row[when][text]:,.2f}" if text in row[when] else "-"
                for when in ("quantized", "recovered")
                for text in texts
            ),
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(rows, key=lambda row: (row["base"], -row["share"]))
    ]
    return markdown_table([*header, "seconds to decide"], lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
