"""Does a search pay? The bits of every unit, by `bayesian` and by `random`, against plans that nobody searched for.

    python benchmarks/search.py --base qpruner/stories --lr 3e-4 --rows rows.jsonl
    python benchmarks/search.py --base MODEL --train TRAIN.txt --validation VALID.txt --test TEST.txt --rows rows.jsonl

20 % is pruned, the budget is 6 bits per weight. Each row is one search of short fits; the trial with the lowest
validation loss is then fitted and scored on the test split, as are the others. A row that is in the file already is not
computed again, and a search that was cut off goes on. ``--table`` prints what is there.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from studies import Row, add_arguments, complete, name_of, study_data, uncompensated

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import Allocation, DecidingConfig
from qpruner.callbacks import MixedPrecisionQuantization
from qpruner.records.tables import markdown_table
from qpruner.search.config import SearchConfig
from qpruner.search.structured import part_of
from qpruner.search.trainer import Search, SearchTrainer
from qpruner.search.trial_trainer import TrialTrainer
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

PLANS = ("searched", "sensitivity", "mutual_information", "uniform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=20)
    parser.add_argument("--test", help="text; without it, the embedded stories")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--share", type=float, default=1.0, help="of the batches of validation text")
    parser.add_argument("--test-share", type=float, default=1.0, help="of the batches of test text")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--optimizers", nargs="+", default=["bayesian", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folders", type=Path, default=Path("runs/search_study"))
    given = parser.parse_args()
    print(table(complete(given, wanted(given), partial(measure, given))))


def wanted(given: argparse.Namespace) -> list[Row]:
    shared = {"base": name_of(given.base), "steps": given.steps, "lr": given.lr}
    shared |= {"trials": given.trials, "share": given.share}
    return [shared | {"seed": seed, "optimizer": name} for seed in given.seeds for name in given.optimizers]


def measure(given: argparse.Namespace, key: Row) -> Row:
    """Searches, then scores the best trial and the plans that were not searched for on the test split."""
    folder = given.folders / f"{key['base']}-{key['seed']}-{key['optimizer']}"
    folder.mkdir(parents=True, exist_ok=True)
    data = study_data(given, key["seed"])
    module = LoRAFinetuner(
        given.base, optimizer=OptimizerConfig(lr=given.lr, warmup_steps=given.steps // 4), seed=key["seed"]
    )
    quantization = MixedPrecisionQuantization(
        allocation="sensitivity", budget=Budget(average_bits=6.0), deciding=DecidingConfig(granularity="unit")
    )
    trainer = SearchTrainer(
        default_root_dir=folder,
        callbacks=[uncompensated(0.2), quantization],
        limit_val_batches=given.share,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    config = SearchConfig(key["optimizer"], trials=key["trials"], steps=key["steps"], finalists=1, finalist_seeds=1)
    search = Search(trainer, module, data, config)
    results = search.run()
    best = min(results.trials, key=lambda trial: trial.loss)
    plans = (
        {"searched": list(best.choices)}
        | {
            name: [decision.chosen for decision in Allocation.read(part_of(search.folder, name).allocation).decisions]  # type: ignore[arg-type]
            for name in PLANS[1:]
        }
    )
    validation = {variant.name.replace(" ", "_"): variant.loss for variant in results.variants}
    limits = TrialTrainer(search.settings.options | {"limit_val_batches": given.test_share})
    reported = replace(search.work(), split="test", trainer=limits).prepare()
    scores = {name: reported(search.key(plan, 0, key["steps"])) for name, plan in plans.items()}
    seconds = [trial.scores["seconds"] for trial in results.trials]
    useful = sum(trial["train"] + trial["evaluate"] for trial in seconds) / sum(trial["all"] for trial in seconds)
    return {
        "validation": {name: round(best.loss if name == "searched" else validation[name], 5) for name in PLANS},
        "test": {name: round(score["loss"], 5) for name, score in scores.items()},
        "bytes": {name: score["bytes"] for name, score in scores.items()},
        "best_so_far": [
            round(min(trial.loss for trial in results.trials[: end + 1]), 5) for end in range(key["trials"])
        ],
        "overhead": round(1 - useful, 4),
        "seconds_per_trial": round(mean(trial["all"] for trial in seconds), 2),
    }


def table(rows: list[Row]) -> str:
    lines = [
        [
            f"{row['base']}, seed {row['seed']}, {row['optimizer']}",
            *(f"{row['validation'][name]:.4f} / {row['test'][name]:.4f}" for name in PLANS),
            f"{row['overhead']:.1%}",
            f"{row['seconds_per_trial']:.1f} s",
        ]
        for row in rows
    ]
    header = ["validation / test loss", *(name.replace("_", " ") for name in PLANS), "overhead", "a trial"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
