"""QPruner's table on a model: seven tasks, each way to compress, equal recovery; what is done is kept and goes on.

    python benchmarks/seven_tasks.py --base MODEL --train alpaca.json.gz --tasks-folder FOLDER --rows rows.jsonl
    python benchmarks/seven_tasks.py ... --report wikitext2=test.txt --methods dense qpruner3 --ratios 0.2

    dense           the model as it is
    quantized       nothing pruned, 4 bits everywhere, LoftQ, LoRA
    pruned          pruned and LoRA, in the 16 bits of the base: LLM-Pruner's column
    qpruner1        pruned, 4 bits everywhere, LoftQ, LoRA
    qpruner2        pruned, 4 or 8 bits a layer by mutual information under a budget, LoftQ, LoRA
    qpruner3        pruned, the bits that a search of short fits finds under the same budget, LoftQ, LoRA
    loraprune       pruned in the course of `--guided-steps` of LoRA, in 16 bits, then the LoRA of the others

Pruning is `StructuredPruning` and `LoRAGuidedPruning` with their defaults. Each row is a run under ``--work``, made by
`qpruner.runs.Run` and measured by ``qpruner evaluate``, so that a study that was killed goes on inside of the row where
it stopped; a row that is in the file is not computed again, and other options need another ``--work``. ``--table``
prints what is there. Rows are compared with the dense model, question by question, by McNemar's test.

The tasks are read from FOLDER/TASK/; of a search with ``--score accuracy`` one half of the questions chooses and the
other is reported (``--split test``). ``seconds`` are those of compressing and training and of the trials of a search,
without measuring; ``peak`` is the highest of training.

The defaults are for SmolLM2-135M on two idle cores, where 450 tokens/s train and 1,900 pass forward. A step of 4 x 256
tokens so takes 2.3 s, and by estimate a row 10 minutes, half of them scores and compensation, and a search of 20 trials
with its finalists 40 minutes more: 12 rows and 2 searches for two ratios, about 3.5 hours.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from studies import Row, complete, name_of

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.callbacks import LoRAGuidedPruning, MixedPrecisionQuantization, StructuredPruning
from qpruner.datamodules import InstructionDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.datamodules.choice_tasks import ChoiceTasksConfig
from qpruner.datamodules.questions import TASKS
from qpruner.evaluate_command import evaluate
from qpruner.records.comparison import compare_folders, describe
from qpruner.records.evaluation import Evaluation
from qpruner.records.folder import RunFolder
from qpruner.records.measured import EVALUATION, evaluation_in
from qpruner.records.statistics import Estimate, mean_over_tasks, standard_error
from qpruner.records.tables import markdown_table, mebibytes, number, percent
from qpruner.runs import PhaseConfig, Run
from qpruner.search.config import SearchConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

METHODS = ("dense", "quantized", "pruned", "qpruner1", "qpruner2", "qpruner3", "loraprune")
UNPRUNED = ("dense", "quantized")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--train", required=True, help="instructions, such as Alpaca; 5 %% of them choose in searches")
    parser.add_argument("--tasks-folder", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--items", type=int, default=400, help="most questions of a task")
    parser.add_argument("--split", default="all", choices=("all", "test", "validation"))
    parser.add_argument("--report", action="append", default=[], metavar="NAME=FILE", help="text for a perplexity")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window of such a text")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--average-bits", type=float, default=6.0, help="budget of qpruner2 and qpruner3")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the recovery")
    parser.add_argument("--guided-steps", type=int, default=40, help="optimizer steps in which loraprune prunes")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--trial-steps", type=int, default=20)
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--finalist-seeds", type=int, default=2)
    parser.add_argument("--score", default="loss", choices=("loss", "accuracy"), help="what the search goes by")
    parser.add_argument("--validation-batches", type=int, default=8, help="batches of each validation set in a trial")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a batch of an evaluation")
    parser.add_argument("--dtype", default="auto", help="number format of the base")
    parser.add_argument("--precision", default="bf16-mixed", help="of the Trainer")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/seven_tasks"), help="folder of the runs")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines; what is there is not computed again")
    parser.add_argument("--table", action="store_true", help="print the rows that are there and stop")
    given = parser.parse_args()
    if given.score == "accuracy" and given.split != "test":
        parser.error("with --score accuracy some questions of the tasks choose; report the others: --split test")
    keys = wanted(given)
    rows = complete(given, keys, partial(measure, given))
    print(f"\n{table(rows)}")
    places = [folder_of(given, key) for key in keys if any(key.items() <= row.items() for row in rows)]
    if not given.table and len(places) > 1:
        print("\n" + "\n".join(describe(compare_folders(places, [place.name for place in places]))))


def wanted(given: argparse.Namespace) -> list[Row]:
    """What tells a row from the others; what a method does not depend on is not part of its key."""
    shared = {
        "base": name_of(given.base), "tasks": given.tasks, "items": given.items, "split": given.split,
        "report": [text.partition("=")[0] for text in given.report], "length": given.length,
    }  # fmt: skip
    training = {"steps": given.steps, "lr": given.lr, "batch": [given.batch_size, given.max_length]}
    of_method: dict[str, Row] = {
        "qpruner2": {"budget": given.average_bits},
        "qpruner3": {
            "budget": given.average_bits, "trials": given.trials, "trial_steps": given.trial_steps,
            "finalists": [given.finalists, given.finalist_seeds], "score": given.score,
        },
        "loraprune": {"guided_steps": given.guided_steps},
    }  # fmt: skip
    rows = []
    for seed in given.seeds:
        for ratio in given.ratios:
            for method in given.methods:
                row = {"method": method, "ratio": 0.0 if method in UNPRUNED else ratio} | shared
                row |= {} if method == "dense" else training | {"seed": seed} | of_method.get(method, {})
                rows += [row] if row not in rows else []  # what is not pruned has one ratio
    return rows


def folder_of(given: argparse.Namespace, key: Row) -> Path:
    parts = [key["base"], key["method"], *([f"{key['ratio']:.0%}"] if key["ratio"] else [])]
    return given.work / "-".join([*parts, *([str(key["seed"])] if "seed" in key else [])])


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Compresses, trains and evaluates, or what is left of that."""
    folder = folder_of(given, key)
    cost = Cost(0.0, None) if key["method"] == "dense" else compress(given, key, folder)
    evaluate(
        given.base if key["method"] == "dense" else str(folder),
        tasks=given.tasks,
        folder=given.tasks_folder,
        split=given.split,
        items=given.items,
        texts=given.report,
        lengths=[given.length],
        new_tokens=0,
        output=RunFolder(folder).evaluation,
        batch_tokens=given.batch_tokens,
        dtype=given.dtype,
        accelerator=given.accelerator,
    )
    measured = Evaluation.read(RunFolder(folder).evaluation / EVALUATION)
    accuracies = {
        name: [score.accuracy, standard_error(score.accuracy, score.items), score.items]
        for name, score in measured.tasks.items()
    }
    mean = mean_over_tasks([Estimate(accuracy, error) for accuracy, error, _ in accuracies.values()])
    return {
        "parameters": measured.parameters,
        "bytes": measured.tensor_bytes,
        "average_bits": measured.average_bits,
        "accuracies": accuracies,
        "mean": [mean.value, mean.error],
        "perplexities": {text.name: round(text.perplexity, 3) for text in measured.texts},
        "against_dense": against_dense(given, key, folder),
        "seconds": round(cost.seconds, 1),
        "peak": cost.peak,
        "peak_evaluating": measured.peak_inference,
    }


@dataclass(frozen=True)
class Cost:
    """What it takes to make a model.

    Args:
        seconds: seconds of compressing, searching and training.
        peak: highest use of memory in training, in bytes; None where nothing is trained.
    """

    seconds: float
    peak: int | None


def compress(given: argparse.Namespace, key: Row, folder: Path) -> Cost:
    """Makes the model of a row in the folder of a run, and the search before it in a folder beside it."""
    method = key["method"]
    informed = MixedPrecisionQuantization(
        allocation="mutual_information",
        budget=Budget(average_bits=given.average_bits),
        deciding=DecidingConfig(widths=(4, 8)),
    )
    quantizing: dict[str, list[L.Callback]] = {
        "quantized": [MixedPrecisionQuantization(bits=4)],
        "qpruner1": [MixedPrecisionQuantization(bits=4)],
        "qpruner2": [informed],
        "qpruner3": [informed],
    }
    callbacks = quantizing.get(method, [])
    if method == "loraprune":
        callbacks = [LoRAGuidedPruning(key["ratio"])]
    elif method not in UNPRUNED:
        callbacks = [StructuredPruning(key["ratio"]), *callbacks]
    searching, plan = 0.0, None
    if method == "qpruner3":
        place = folder.with_name(f"{folder.name}-search")
        results = run_of(given, key, place, callbacks, choosing=True).search(
            SearchConfig(
                trials=given.trials,
                steps=given.trial_steps,
                finalists=given.finalists,
                finalist_seeds=given.finalist_seeds,
                score=given.score,
            )
        )
        searching = sum(trial.scores["seconds"]["all"] for trial in results.trials)
        plan = RunFolder(place).plan
    further = [PhaseConfig(max_steps=given.steps)] if method == "loraprune" else []
    steps = given.guided_steps if method == "loraprune" else given.steps
    run = run_of(given, key, folder, callbacks, max_steps=steps, phases=further, plan=plan)
    run.fit()
    stages = run.summary.stages
    return Cost(
        searching + sum(stage.seconds for stage in stages),
        max((stage.peak_training for stage in stages if stage.peak_training is not None), default=None),
    )


def run_of(
    given: argparse.Namespace,
    key: Row,
    folder: Path,
    callbacks: list[L.Callback],
    *,
    choosing: bool = False,
    max_steps: int = -1,
    **options: Any,
) -> Run:
    """A run of a fit or, where it is choosing, of a search, whose validation split may have the tasks."""
    asks = choosing and given.score == "accuracy"
    tasks = ChoiceTasksConfig(str(given.tasks_folder), given.tasks, given.items) if asks else None
    data = InstructionDataModule(
        tokenizer=given.base,
        train=given.train,
        response_only=False,
        max_length=given.max_length,
        loader=LoaderConfig(batch_size=given.batch_size, eval_tokens_per_batch=given.batch_tokens),
        seed=key["seed"],
        tasks=tasks,
    )
    steps = given.trial_steps if choosing else given.steps
    module = LoRAFinetuner(
        given.base,
        dtype=given.dtype,
        optimizer=OptimizerConfig(lr=given.lr, warmup_steps=min(10, steps // 2)),
        seed=key["seed"],
    )
    trainer = {
        "accelerator": given.accelerator,
        "devices": 1,
        "precision": given.precision,
        "max_steps": max_steps,
        "limit_val_batches": given.validation_batches if choosing else 0,
        "limit_test_batches": 1,  # of every stage; what is reported is measured by `qpruner evaluate`
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Run(folder, module, data, callbacks, trainer, checkpoint_every_n_steps=10, **options)


def against_dense(given: argparse.Namespace, key: Row, folder: Path) -> Row | None:
    """The difference to the dense model on all questions together, in [-1, 1], with its error and McNemar's p."""
    dense = folder_of(given, {"base": key["base"], "method": "dense", "ratio": 0.0})
    if key["method"] == "dense" or evaluation_in(dense) is None:
        return None
    pair = compare_folders([dense, folder], ["dense", "row"]).against_first[0].together
    return None if pair is None else {"difference": pair.difference, "error": pair.error, "p": pair.p_value}


def table(rows: list[Row]) -> str:
    """A line for each row; accuracies in percent."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["accuracies"]))
    texts = list(dict.fromkeys(text for row in rows for text in row["perplexities"]))
    header = ["base", "method", "pruned", "parameters", "bytes", "bits", *texts, *tasks, "mean", "against dense", "p"]
    lines = []
    for row in rows:
        against = row["against_dense"]
        estimates = [row["accuracies"].get(task) for task in tasks]
        lines.append(
            [
                row["base"],
                row["method"],
                f"{row['ratio']:.0%}",
                f"{row['parameters']:,}",
                f"{row['bytes']:,}",
                number(row["average_bits"], ".2f"),
                *(number(row["perplexities"].get(text), ",.2f") for text in texts),
                *("-" if each is None else percent(each[0], each[1], "") for each in estimates),
                percent(*row["mean"], ""),
                "-" if against is None else percent(against["difference"], against["error"], ""),
                "-" if against is None else f"{against['p']:.4f}",
                f"{row['seconds']:,.0f} s",
                mebibytes(row["peak"]),
            ]
        )
    return markdown_table([*header, "time", "peak"], lines)


if __name__ == "__main__":
    main()
