"""A Trainer that also searches: it has Lightning's `fit`, `validate`, `test` and `predict`, and `search`."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.choices import ChoiceExamples
from qpruner.errors import UserError
from qpruner.files import hash_json
from qpruner.plan import CompressionPlan
from qpruner.processes import Processes
from qpruner.records.folder import RunFolder
from qpruner.records.search import SearchResults, Tried, pareto_front, ranked, show_search, write_search_report
from qpruner.search.aim import Aim
from qpruner.search.assembly import columns_folder
from qpruner.search.config import SearchConfig
from qpruner.search.executors import check_executor, make_executor
from qpruner.search.ledger import Key, Ledger, Scores
from qpruner.search.loop import Judge, finish_started, run_listed, run_trials
from qpruner.search.preparation import compressing, prepare
from qpruner.search.progress import Progress
from qpruner.search.proposals import OptimizerFailed, Point, Score, open_proposals
from qpruner.search.rehearsal import check_runs
from qpruner.search.results import named, proposers, timed, tried, write_front
from qpruner.search.speed import measured
from qpruner.search.start import departures
from qpruner.search.structured import part_of
from qpruner.search.succession import settings_of, succeed
from qpruner.search.trial import TrialWork
from qpruner.search.trial_trainer import TrialTrainer, check_options
from qpruner.search.workers import Executor
from qpruner.training.evaluation import num_batches
from qpruner.training.module import LoRAFinetuner


class SearchTrainer(Trainer):
    """A Trainer with an outer loop that proposes bit vectors and scores each by a short fit (arXiv 2412.11629).

    A search keeps everything in the Trainer's ``default_root_dir``, and an interrupted search resumes from there. Which
    of a Trainer's options a trial takes over is listed in `qpruner.search.trial_trainer`.

    Attributes:
        given: arguments that the Trainer was constructed with.
    """

    def __init__(self, **options: Any) -> None:
        # Before Lightning adds callbacks of its own, such as the timer of max_time, to the list that it is given.
        self.given = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        super().__init__(**options)

    def search(
        self,
        model: LoRAFinetuner,
        datamodule: TokenDataModule,
        search: SearchConfig = SearchConfig(),  # noqa: B008  # frozen
    ) -> SearchResults:
        """Finds the bits of each layer under the budget of `MixedPrecisionQuantization`, and its widths if requested.

        The base is pruned by the Trainer's callbacks once, or by each trial where widths are searched; no plan is
        scored on the test split.

        Args:
            model: module as for a fit; it is given no model.
            datamodule: data module as for a fit; its validation split decides between plans.
            search: options of the search.

        Raises:
            UserError: no budget or validation split, options of the Trainer that a trial cannot follow, an unknown
                optimizer, or a folder that holds another search.
        """
        return Search(self, model, datamodule, search).run()


class Search:
    """One search, from the dense model to its results.

    Args:
        trainer: Trainer whose callbacks, logger and options the search uses.
        module: module that holds the model to search for.
        data: text to fit on and to compare plans with.
        config: options of the search.

    Raises:
        UserError: options of the Trainer that a trial cannot follow, or no callback that quantizes.
    """

    def __init__(self, trainer: SearchTrainer, module: LoRAFinetuner, data: TokenDataModule, config: SearchConfig):
        check_options(trainer, trainer.given)
        self.trainer = trainer
        self.module = module
        self.data = data
        self.config = config
        self.folder = RunFolder(Path(trainer.default_root_dir))
        self.settings = TrialTrainer.of(trainer, trainer.given)
        self.pruning, self.quantization = compressing(trainer.callbacks)  # type: ignore[attr-defined]

    def run(self) -> SearchResults:
        config = self.config
        check_runs(config.optimizer, config.executor.workers)
        check_executor(config.executor)
        if "validation" not in self.data.prepared.splits:
            raise UserError("A search chooses on the validation split, and there is none. Give one to the data module.")
        self.aim, self.start  # noqa: B018  # what cannot be aimed at or read is told before the work
        if config.max_seconds is not None:
            rank_zero_warn(
                "search.max_seconds makes trials depend on how fast they run: this search cannot be repeated."
            )
        self.prepare()
        if self.space.is_single:
            rank_zero_warn(
                f"A budget of {self.prior.budget} leaves one plan, and nothing to search for. Give another budget."
            )
        self.ledger = Ledger.open(self.folder.ledger, self.identity("trials"))
        succeed(
            self.ledger, config.optimizer, self.space, self.judge(),
            num_trials=config.trials, workers=config.executor.workers, seed=self.module.seed, starts=self.starts,
        )  # fmt: skip
        self.progress = Progress(
            self.ledger, self.aim, config.trials, self.trainer.logger, self.folder.tensorboard,
            searches_widths=self.space.structure is not None,
        )  # fmt: skip
        self.progress.show_missing()
        with make_executor(config.executor, self.work()) as executor:
            self.try_plans(executor)
            variants = self.compare(executor)
        return self.finish(variants)

    @cached_property
    def aim(self) -> Aim:
        """The objective that is minimized.

        Raises:
            UserError: the score asks for tasks that the validation data do not have.
        """
        answered: dict[str, int] = {}
        for loader in self.data.evaluation_loaders("validation") if self.config.score != "loss" else []:
            if isinstance(loader.examples, ChoiceExamples):
                read = loader.batches()[: num_batches(loader, self.settings.limit_validation)]
                answered[loader.examples.task] = sum(map(len, read))
        return Aim.of(self.config.score, answered)

    def prepare(self) -> None:
        """Prunes the base, makes the prior and fills the bank, unless an earlier session did; then sets the space.

        Raises:
            UserError: see `qpruner.search.preparation.prepare`.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)  # a run has made it; from Python it may not exist
        alone = Processes.alone(self.trainer.strategy.root_device, self.trainer.precision_plugin.forward_context)
        processes = replace(alone, precision=str(self.trainer.precision))
        self.prepared = prepare(
            self.module, self.data, self.pruning, self.quantization, processes, self.folder, self.config.structure,
            self.config.ranks, self.start,
        )  # fmt: skip
        self.prior = self.prepared.prior
        self.space = self.prepared.space(self.prior, spends=self.config.front)
        self.tell_start()

    @cached_property
    def start(self) -> CompressionPlan | None:
        """The plan that is to be tried among the first; None for none.

        Raises:
            UserError: the named file holds no plan.
        """
        structure = self.config.structure
        if structure is None or structure.start is None:
            return None
        return CompressionPlan.read(Path(structure.start).expanduser())

    @property
    def starts(self) -> tuple[Point, ...]:
        """Points to try among the first."""
        if self.start is None or self.space.structure is None:
            return ()
        row = self.prepared.candidates.row(self.start, self.space.structure)
        return (self.space.encode(row).tolist(),)

    def tell_start(self) -> None:
        """Says what the plan that is tried for `start` has otherwise, if this search cannot try `start` itself."""
        if self.start is None or self.config.structure is None:
            return
        (row,) = self.space.decode(np.array(self.starts)).tolist()
        tried = self.prepared.candidates.plan(self.key(row, 0, self.config.steps))
        if told := departures(self.start, tried, self.module.lora.r):
            rank_zero_info(
                f"The plan {str(self.config.structure.start)!r} is not one that this search can try, with "
                f"search.structure.least {self.config.structure.least} under a budget of {self.prior.budget}; the one "
                f"tried in its place {'; '.join(told)}."
            )

    def work(self) -> TrialWork:
        """What workers are sent; each reads the rows of the data from the cache."""
        structured, rounding = self.prepared.structured, self.prepared.rounding
        compensates = structured is not None and structured.compensates
        has_sums = compensates or (structured is not None and rounding is not None)
        return TrialWork(
            base=self.folder.base,
            bank=part_of(self.folder, self.prior.method).bank,
            reference=self.folder.reference,
            options=dict(self.module.hparams),
            loftq_iterations=self.prepared.loftq_iterations,
            data=self.data.for_another_trainer(keep_rows=False),
            items=tuple(decision.item for decision in self.prior.decisions),
            precisions=self.prepared.precisions,
            tables=self.quantization.tables,
            trainer=self.settings,
            max_seconds=self.config.max_seconds,
            recorded_in=self.folder.teacher,
            ranking=self.prepared.ranking,
            ranks=self.prepared.ranks,
            rounding=rounding,
            sums=self.folder.structure if has_sums else None,
            compensates=compensates,
        )

    def try_plans(self, executor: Executor) -> None:
        """Runs the trials that are not in the ledger yet."""
        config = self.config
        if len(self.ledger.records) >= config.trials:
            finish_started(
                self.ledger, executor, num_trials=config.trials, score_of=self.score, on_trial=self.progress.report
            )
            return
        settings = settings_of(self.ledger.optimizers[-1], self.space, self.module.seed, self.starts)
        try:
            with open_proposals(settings) as proposals:
                run_trials(
                    proposals,
                    self.ledger,
                    executor,
                    num_trials=config.trials,
                    workers=config.executor.workers,
                    key_of=lambda point: self.key(self.space.decode(np.array([point]))[0].tolist(), 0, config.steps),
                    judge=self.judge(),
                    on_trial=self.progress.report,
                )
        except OptimizerFailed as error:
            safe = sum(record.done for record in self.ledger.records)
            raise UserError(
                f"{error} The {safe} trials so far are safe in {str(self.folder.ledger)!r}: the same command with "
                f"another --search.optimizer, such as bayesian, goes on with them."
            ) from error

    def key(self, plan: Sequence[int], repetition: int, steps: int) -> Key:
        """The key of a trial; all plans of one repetition share the data order and the random draws.

        Args:
            plan: row of a plan, as returned by `SearchSpace.decode`.
            repetition: number of the seed, from 0.
            steps: number of optimizer steps of the trial.
        """
        structure, ranks = self.space.structure, self.prepared.ranks
        ends = self.space.num_parts, self.space.num_parts + len(self.prior.decisions)
        key: Key = {"choices": list(plan[slice(*ends)]), "steps": steps, "seed": self.module.seed + repetition}
        if structure is not None:
            key["units"] = structure.counts(plan[: ends[0]])
        if ranks is not None:
            key["ranks"] = [ranks.choices[place] for place in plan[ends[1] :]]
        return key

    def judge(self) -> Judge:
        worst = [1e6, float(self.space.limit)]
        if self.space.structure is not None:
            worst.append(float(self.space.structure.most))
        return Judge(self.score, first_penalty=worst if self.config.front else 1e6)

    def score(self, scores: Scores) -> Score:
        """The score that is minimized; for a front also bytes and, where widths are searched, multiply-adds."""
        value = self.aim.of_scores(scores)
        traded = ["bytes"] if self.space.structure is None else ["bytes", "multiply_adds"]
        return [value, *(float(scores[name]) for name in traded)] if self.config.front else value

    def identity(self, part: str) -> dict[str, Any]:
        """What identifies this search's ledger; more trials or workers or another optimizer do not change it."""
        compression = [*self.pruning, self.quantization]
        free = {"optimizer", "trials", "finalists", "finalist_seeds", "finalist_steps", "executor"}
        options = asdict(self.config)
        if self.config.score == "loss":  # as before there were other scores
            del options["score"]
        for name in ("structure", "ranks"):
            if not getattr(self.config, name):
                del options[name]
        if "structure" in options:  # of the plan to start from the content counts, not the path: its file may move
            options["structure"]["start"] = None
        start = {} if self.start is None else {"start": hash_json(self.start.to_json())}
        rounding = {} if self.prepared.rounding is None else {"rounding": hash_json(self.prepared.rounding.origin)}
        return {
            "part": part,
            **start,
            **rounding,
            "search": {name: value for name, value in options.items() if name not in free},
            "model": dict(self.module.hparams),
            "base_sha256": self.prepared.base_sha256,
            "kept_sha256": self.prepared.kept_sha256,
            "compression": {type(callback).__name__: callback.options for callback in compression},
            "data": {
                **self.data.fingerprint(),
                "batch_size": self.data.loader.batch_size,
                "seed": self.data.seed,
            },
            "trainer": self.settings.options,
            "prior": hash_json(asdict(self.prior)),
        }

    def compare(self, executor: Executor) -> list[Tried]:
        """Runs the finalists and the plans that were not searched for, each with all seeds."""
        trials = [trial for trial in self.ledger.records if trial.scores is not None]
        succeeded = {named(trial.key): trial for trial in reversed(trials)}
        if not succeeded:
            why = (self.ledger.records[0].why or "").rstrip(".")
            raise UserError(f"Every trial failed. Of the first one: {why}. See the log of the run.")
        best_first = sorted(
            succeeded.values(),
            key=lambda trial: (self.aim.of_scores(trial.scores), trial.number),  # type: ignore[arg-type]
        )
        comparison = self.config.comparison
        finalists, steps, seeds = best_first[: comparison.finalists], comparison.steps, comparison.seeds
        plans = {
            f"trial {trial.number + 1}": [
                trial.key | {"steps": steps, "seed": self.module.seed + number} for number in range(seeds)
            ]
            for trial in finalists
        }
        for name, row in self.prepared.unsearched(self.folder).items():
            plans.setdefault(name, [self.key(row, number, steps) for number in range(seeds)])
        keys = list(chain.from_iterable(plans.values()))
        ledger = Ledger.open(self.folder.variants, self.identity("variants"))
        outcomes = run_listed(keys, ledger, executor, known=self.ledger)
        variants = []
        for place, name in enumerate(plans):
            repeated = outcomes[place * seeds : (place + 1) * seeds]
            if records := [record for record in repeated if record.scores is not None]:
                variants.append(tried(name, records, self.aim))
        return variants

    def finish(self, variants: Sequence[Tried]) -> SearchResults:
        """Writes the results, the winner's plan, the front and the report."""
        records = self.ledger.records
        trials = [
            tried(f"trial {trial.number + 1}", [trial], self.aim) for trial in records if trial.scores is not None
        ]
        if self.prepared.structured is not None:
            trials = self.timed(trials, self.prepared.structured.dtype)
        front = pareto_front(trials)
        parts = () if self.space.structure is None else self.space.structure.parts
        results = SearchResults(
            protocol=self.data.protocol,
            prior=self.prior.method,
            items=tuple(str(decision.item) for decision in self.prior.decisions),
            bits=tuple(precision.bits for precision in self.prepared.precisions),
            budget=self.prior.budget,
            trials=tuple(trials),
            failed={trial.number + 1: trial.why for trial in records if trial.why is not None},
            variants=tuple(ranked(variants)),
            front=tuple(point.name for point in front),
            proposers=tuple(proposers(self.ledger)),
            parts=tuple(map(str, parts)),
            units=tuple(part.counts[-1] for part in parts),
            ranked=() if self.prepared.ranks is None else self.prepared.ranks.layers,
            comparison=self.config.comparison,
        )
        write_front(self.folder, front, self.plan)
        self.plan(results.winner).write(self.folder.plan)
        write_search_report(self.folder, results)
        if isinstance(self.trainer.logger, TensorBoardLogger):
            show_search(self.trainer.logger, results)
        shutil.rmtree(columns_folder(self.folder.structure), ignore_errors=True)
        results.write(self.folder.results)  # last: it marks the search as finished
        return results

    def timed(self, trials: Sequence[Tried], dtype: torch.dtype) -> list[Tried]:
        """Trials with the seconds per token of each, on the device of this process."""
        plans = [self.plan(trial) for trial in trials]
        speeds = measured(self.folder.structure / "speeds.json", plans, self.trainer.strategy.root_device, dtype)
        return timed(trials, [speeds.per_token(plan) for plan in plans])

    def plan(self, chosen: Tried) -> CompressionPlan:
        """The plan with these choices, and with these units and ranks where they are searched."""
        return self.prepared.candidates.plan({"choices": chosen.choices, "units": chosen.units, "ranks": chosen.ranks})
