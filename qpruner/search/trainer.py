"""The Trainer that also searches: `fit`, `validate`, `test` and `predict` of Lightning, and `search`."""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner.allocation.decision import Allocation, Method, with_choices
from qpruner.allocation.solving import Choice
from qpruner.callbacks.compression import Compression
from qpruner.callbacks.quantization import MixedPrecisionQuantization
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.files import hash_json, write_json
from qpruner.model_folder import read_plan
from qpruner.plan import CompressionPlan
from qpruner.runs.folder import RunFolder
from qpruner.runs.search import SearchResults, Tried, pareto_front, ranked, show_search, write_search_report
from qpruner.search.config import SearchConfig
from qpruner.search.executors import check_executor, make_executor
from qpruner.search.ledger import Key, Ledger, Scores, TrialRecord
from qpruner.search.loop import Judge, finish_started, run_listed, run_trials
from qpruner.search.preparation import DenseReference, SearchPreparation, part_of
from qpruner.search.proposals import OptimizerFailed, Score, open_proposals
from qpruner.search.rehearsal import check_runs
from qpruner.search.results import proposers, tried
from qpruner.search.space import SearchSpace
from qpruner.search.succession import settings_of, succeed
from qpruner.search.trial import TrialTrainer, TrialWork
from qpruner.search.workers import Executor
from qpruner.training.module import LoRAFinetuner


class SearchTrainer(Trainer):
    """A Trainer with an outer loop that proposes bit vectors and scores each by a short fit (arXiv 2412.11629).

    Everything of a search lies in the Trainer's ``default_root_dir``, and a search that was cut off goes on from there.
    """

    def search(
        self,
        model: LoRAFinetuner,
        datamodule: TokenDataModule,
        search: SearchConfig = SearchConfig(),  # noqa: B008  # frozen
    ) -> SearchResults:
        """Finds the bits of each layer under the budget of `MixedPrecisionQuantization`.

        The base is pruned by the Trainer's callbacks once; no plan is scored on the test split.

        Args:
            model: as for a fit.
            datamodule: as for a fit; its validation split chooses.
            search: how to search.

        Raises:
            UserError: no budget or validation split, several devices, an unknown optimizer, or a folder that holds
                another search.
        """
        if self.world_size > 1:
            raise UserError(
                f"A trial uses one device, and the Trainer has {self.world_size}. Give --trainer.devices 1, and more "
                f"workers by --search.executor.kind processes --search.executor.workers {self.world_size}."
            )
        return Search(self, model, datamodule, search).run()


class Search:
    """One search, from the dense model to its results.

    Args:
        trainer: whose callbacks, logger and options it uses.
        model: to search for.
        data: to fit and to choose with.
        config: how to search.
    """

    def __init__(self, trainer: Trainer, model: LoRAFinetuner, data: TokenDataModule, config: SearchConfig) -> None:
        self.trainer = trainer
        self.model = model
        self.data = data
        self.config = config
        self.folder = RunFolder(Path(trainer.default_root_dir))
        self.settings = TrialTrainer.of(trainer)

    def run(self) -> SearchResults:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError("A search has no rehearsal: drop --trainer.fast_dev_run and give --search.trials 1.")
        config = self.config
        check_runs(config.optimizer, config.executor.workers)
        check_executor(config.executor)
        if "validation" not in self.data.prepared.splits:
            raise UserError("A search chooses on the validation split, and there is none. Give one to the data module.")
        if config.max_seconds is not None:
            rank_zero_warn(
                "search.max_seconds makes trials depend on how fast they run: this search cannot be repeated."
            )
        method = self.prepare()
        self.prior = Allocation.read(part_of(self.folder, method).allocation)
        self.space = SearchSpace(
            choices=[
                [Choice(*pair) for pair in zip(one.sizes, one.costs, strict=True)] for one in self.prior.decisions
            ],
            levels=[[precision.bits for precision in one.choices] for one in self.prior.decisions],
            limit=self.prior.for_items,
            spends=config.front,
        )
        if self.space.is_single:
            rank_zero_warn(
                f"A budget of {self.prior.budget} leaves one plan, and nothing to search for. Give another budget."
            )
        self.ledger = Ledger.open(self.folder.ledger, self.identity("trials"))
        succeed(
            self.ledger, config.optimizer, self.space, self.judge(),
            num_trials=config.trials, workers=config.executor.workers, seed=self.model.seed,
        )  # fmt: skip
        self.already = sum(record.done for record in self.ledger.records)
        self.since = time.perf_counter()
        with make_executor(config.executor, self.work(method)) as executor:
            self.try_plans(executor)
            variants = self.compare(executor)
        return self.finish(variants)

    def try_plans(self, executor: Executor) -> None:
        """Runs the trials that are not in the ledger yet."""
        config = self.config
        if len(self.ledger.records) >= config.trials:
            finish_started(
                self.ledger, executor, num_trials=config.trials, score_of=self.score, on_trial=self.report_trial
            )
            return
        settings = settings_of(self.ledger.optimizers[-1], self.space, self.model.seed)
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
                    on_trial=self.report_trial,
                )
        except OptimizerFailed as error:
            safe = sum(record.done for record in self.ledger.records)
            raise UserError(
                f"{error} The {safe} trials so far are safe in {str(self.folder.ledger)!r}: the same command with "
                f"another --search.optimizer, such as bayesian, goes on with them."
            ) from error

    def prepare(self) -> Method:
        """Prunes the base, finds the prior and fills the bank, unless an earlier session did."""
        callbacks: Sequence[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        quantizations = [callback for callback in callbacks if isinstance(callback, MixedPrecisionQuantization)]
        if not quantizations:
            raise UserError("A search spends a budget: add MixedPrecisionQuantization, with one, to the callbacks.")
        preparation = SearchPreparation(quantizations[0])
        preparation.folder = self.folder
        self.pruning = [one for one in callbacks if isinstance(one, Compression) and one is not quantizations[0]]
        for callback in (*self.pruning, preparation):
            callback.check_text(self.data)
        self.model.kept_in = self.folder.base
        trainer = self.settings.trainer(0, callbacks=[DenseReference(self.folder), *self.pruning, preparation])
        trainer.fit(self.model, datamodule=self.data)  # of no steps: it ends when all is set up
        self.preparation = preparation
        self.base_sha256 = self.model.compressed.base_sha256
        self.model.release()  # trials load the pruned base for themselves
        return preparation.allocator.method

    def work(self, method: Method) -> TrialWork:
        """What workers get; the data module as it was before it met a Trainer."""
        data = copy.copy(self.data)
        data.trainer = None
        data._prepared = None  # each worker reads it from the cache
        return TrialWork(
            base=self.folder.base,
            bank=part_of(self.folder, method).bank,
            reference=self.folder.reference,
            options=dict(self.model.hparams),
            loftq_iterations=self.preparation.allocator.loftq_iterations,
            data=data,
            items=tuple(decision.item for decision in self.prior.decisions),
            precisions=self.prior.decisions[0].choices,
            tables=self.preparation.quantization.tables,
            trainer=self.settings,
            max_seconds=self.config.max_seconds,
        )

    def key(self, choices: Sequence[int], repetition: int, steps: int) -> Key:
        """What a trial evaluates; the same data order and draws for all plans of one repetition."""
        return {"choices": list(choices), "steps": steps, "seed": self.model.seed + repetition}

    def judge(self) -> Judge:
        return Judge(self.score, first_penalty=[1e6, float(self.space.limit)] if self.config.front else 1e6)

    def score(self, scores: Scores) -> Score:
        return [scores["loss"], float(scores["bytes"])] if self.config.front else scores["loss"]

    def identity(self, part: str) -> dict[str, Any]:
        """What tells this search's ledger from others; more trials, workers or another optimizer are no other."""
        quantization = self.preparation.quantization
        free = {"optimizer", "trials", "finalists", "finalist_seeds", "finalist_steps", "executor"}
        return {
            "part": part,
            "search": {name: value for name, value in asdict(self.config).items() if name not in free},
            "model": dict(self.model.hparams),
            "base_sha256": self.base_sha256,
            "compression": {type(one).__name__: one.options for one in (*self.pruning, quantization)},
            "data": {
                **self.data.fingerprint(),
                "batch_size": self.data.loader.batch_size,
                "seed": self.data.seed,
            },
            "trainer": asdict(self.settings),
            "prior": hash_json(asdict(self.prior)),
        }

    def report_trial(self, record: TrialRecord) -> None:
        """Says how a trial went, and how long the others may take."""
        done = [one for one in self.ledger.records if one.done]
        left = self.config.trials - len(done)
        rate = (time.perf_counter() - self.since) / (len(done) - self.already)
        succeeded = [one for one in done if one.scores is not None]
        if record.scores is None:
            outcome = f"failed: {record.why}"
        else:
            outcome = f"loss {record.scores['loss']:.4f}, {record.scores['bytes']:,} bytes"
        if record.repeats is not None:
            outcome = f"the plan of trial {record.repeats + 1} again, {outcome}"
        best = min(succeeded, key=lambda one: one.scores["loss"], default=None)  # type: ignore[index]
        best_line = "" if best is None else f"; best so far {best.scores['loss']:.4f} in trial {best.number + 1}"  # type: ignore[index]
        rank_zero_info(
            f"Trial {record.number + 1} of {self.config.trials}: {outcome}{best_line}; "
            f"{left} left, about {left * rate / 60:.1f} min."
        )
        logger = self.trainer.logger
        if isinstance(logger, TensorBoardLogger) and record.scores is not None and best is not None:
            board = logger.experiment
            board.add_scalar("search/loss", record.scores["loss"], record.number)
            board.add_scalar("search/best", best.scores["loss"], record.number)  # type: ignore[index]
            board.add_scalar("search/bytes", record.scores["bytes"], record.number)
            board.flush()

    def compare(self, executor: Executor) -> list[Tried]:
        """The finalists and the plans that were not searched for, each with all seeds."""
        succeeded = {tuple(one.key["choices"]): one for one in reversed(self.ledger.records) if one.scores is not None}
        if not succeeded:
            why = (self.ledger.records[0].why or "").rstrip(".")
            raise UserError(f"Every trial failed. Of the first one: {why}. See the log of the run.")
        best_first = sorted(succeeded.values(), key=lambda one: (one.scores["loss"], one.number))  # type: ignore[index]
        plans = {f"trial {one.number + 1}": list(one.key["choices"]) for one in best_first[: self.config.finalists]}
        for method in ("uniform", "mutual_information", self.preparation.allocator.method):
            allocation = Allocation.read(part_of(self.folder, method).allocation)
            plans.setdefault(method.replace("_", " "), [one.chosen for one in allocation.decisions])
        steps, seeds = self.config.finalist_steps or self.config.steps, self.config.finalist_seeds
        keys = [self.key(plan, number, steps) for plan in plans.values() for number in range(seeds)]
        ledger = Ledger.open(self.folder.variants, self.identity("variants"))
        outcomes = run_listed(keys, ledger, executor, known=self.ledger)
        found = []
        for place, name in enumerate(plans):
            records = [one for one in outcomes[place * seeds : (place + 1) * seeds] if one.scores is not None]
            if records:
                found.append(tried(name, records))
        return found

    def finish(self, variants: Sequence[Tried]) -> SearchResults:
        """Writes the results, the winner's plan, the front and the report."""
        records = self.ledger.records
        trials = [tried(f"trial {one.number + 1}", [one]) for one in records if one.scores is not None]
        front = pareto_front(trials)
        results = SearchResults(
            protocol=self.data.protocol,
            prior=self.preparation.allocator.method,
            items=tuple(str(decision.item) for decision in self.prior.decisions),
            bits=tuple(precision.bits for precision in self.prior.decisions[0].choices),
            budget=self.prior.budget,
            trials=tuple(trials),
            failed={one.number + 1: one.why for one in records if one.why is not None},
            variants=tuple(ranked(variants)),
            front=tuple(one.name for one in front),
            proposers=tuple(proposers(self.ledger)),
        )
        base = read_plan(self.folder.base)
        self.folder.plans.mkdir(exist_ok=True)
        for one in front:
            self.plan(base, one).write(self.folder.plans / f"{one.name.replace(' ', '-')}.json")
        write_json(
            self.folder.pareto,
            [
                {"name": one.name, "plan": f"{self.folder.plans.name}/{one.name.replace(' ', '-')}.json",
                 "bytes": one.num_bytes, "average_bits": one.average_bits, "loss": one.loss}
                for one in front
            ],
        )  # fmt: skip
        self.plan(base, results.winner).write(self.folder.plan)
        write_search_report(self.folder, results)
        if isinstance(self.trainer.logger, TensorBoardLogger):
            show_search(self.trainer.logger, results)
        results.write(self.folder.results)  # last: with it the search is finished
        return results

    def plan(self, base: CompressionPlan, one: Tried) -> CompressionPlan:
        plan = base.with_precision(
            [dict(layer.precision) for layer in base.layers], **self.preparation.quantization.tables
        )
        precisions = self.prior.decisions[0].choices
        items = [decision.item for decision in self.prior.decisions]
        return with_choices(plan, items, [precisions[choice] for choice in one.choices])
