"""A run: the same object behind the command line and in notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from qpruner.adapter_files import has_trained_adapters
from qpruner.callbacks import PredictionsWriter
from qpruner.callbacks.bits_under_budget import drop_scaffolding
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.files import writing
from qpruner.folder_manifest import is_compressed
from qpruner.joint.config import JointConfig
from qpruner.model_folder import read_plan
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunFolder
from qpruner.records.log import log_to
from qpruner.records.report import Summary, show_summary
from qpruner.records.search import SearchResults, proposed_by, variants_table
from qpruner.runs.bound import plain
from qpruner.runs.checks import check_fit, check_search, rehearse
from qpruner.runs.claim import claim_folder, lock_folder
from qpruner.runs.evaluation import Measured, measure_stages
from qpruner.runs.fitting import PhasedFit
from qpruner.runs.learning import Learning
from qpruner.runs.phases import Phase, PhaseConfig, carrying_out, decides, phases_of, renewed
from qpruner.runs.trainers import TrainerOptions, make_trainer, options_of_trainer
from qpruner.search.config import SearchConfig
from qpruner.training.checkpoint_file import read_checkpoint
from qpruner.training.module import LoRAFinetuner
from qpruner.training.preflight import check_checkpoint, check_trainer


class Run:
    """Compresses a model, trains adapters that recover what was lost, and measures, all in one folder.

    The folder is bound to the options of its first fit or search: the same run resumes where it was interrupted, and
    does nothing when it is finished; with other options it is refused. Everything is checked before any work is done.

    ::

        run = Run(
            "runs/narrow",
            LoRAFinetuner(base="HuggingFaceTB/SmolLM2-135M"),
            TextDataModule(train="train.txt", test="test.txt", tokenizer="HuggingFaceTB/SmolLM2-135M"),
            callbacks=[StructuredPruning(0.2)],
            trainer={"max_steps": 200},
            phases=[PhaseConfig(max_steps=100, callbacks=[MixedPrecisionQuantization(bits=4)])],
        )
        run.fit()
        run.evaluate("validation")
        run.summary.stages[-1].results["perplexity"]

    Args:
        folder: folder of the run; it may exist already.
        model: module of the first phase, whose options later phases share.
        data: data module of all phases.
        callbacks: callbacks of the first phase; those that do not compress act in later phases, too, as copies.
        trainer: options of a Lightning ``Trainer`` without callbacks, or a function that returns them: each phase has
            its own Trainer, to which loggers and strategies belong, so options that are given directly are copied.
        phases: further fits, each of which begins with what the previous fit left.
        plan: file of a plan to carry out instead of the callbacks that compress.
        joint: how to learn a plan from what the callbacks ask for, which is then carried out in their place; None
            to let them decide.
        checkpoint_every_n_steps: number of optimizer steps between two checkpoints, at least 1.
        options: plain data that the folder is bound to; by default all arguments given here.

    Raises:
        UserError: data of another kind; in its methods, something that is given is not possible, or is not what the
            folder is bound to.
    """

    def __init__(
        self,
        folder: str | Path,
        model: LoRAFinetuner,
        data: TokenDataModule,
        callbacks: Sequence[Callback] = (),
        trainer: TrainerOptions | None = None,
        *,
        phases: Sequence[PhaseConfig] = (),
        plan: str | Path | None = None,
        joint: JointConfig | None = None,
        checkpoint_every_n_steps: int = 50,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(data, TokenDataModule):
            raise UserError(
                f"The data of a run are a {type(data).__name__}, and must be a TokenDataModule, whose rows are tokens. "
                f"Use one of qpruner.datamodules, or derive a class from it, as docs/reference/python.md shows."
            )
        self.folder = RunFolder(Path(folder).expanduser())
        self.model = model
        self.data = data
        self.callbacks = list(callbacks)
        self.phases = list(phases)
        self.plan = None if plan is None else str(plan)
        self.joint = joint
        self.checkpoint_every_n_steps = checkpoint_every_n_steps
        self.trainer = trainer or {}
        self.options = options

    @cached_property
    def _callbacks_as_given(self) -> list[Any]:
        """The callbacks as plain data, before the first fit changes some, such as the folder of ModelCheckpoint."""
        bound: list[Any] = plain(self.callbacks)
        return bound

    @property
    def summary(self) -> Summary:
        """What the fits have measured.

        Raises:
            UserError: nothing yet.
        """
        return Summary.read(self.folder.summary)

    def fit(self, ckpt_path: str | None = None, *, restart: bool = False) -> None:
        """Carries out all phases, or those that remain.

        Args:
            ckpt_path: checkpoint of another run, whose adapters the first phase begins with.
            restart: whether to discard the contents of the folder and begin anew.
        """
        check_fit(self.phases, self.plan, self.joint)
        trainer_options = options_of_trainer(self.trainer)
        rehearses = bool(trainer_options.get("fast_dev_run"))
        if self.joint is not None and (rehearses or restart or not self.folder.learned_plan.exists()):
            learning = Learning.of(self.folder, self.model, self.data, self.callbacks, self.joint)
            learning.check(trainer_options)
            if not rehearses:
                self._learn(learning, trainer_options, restart)
                restart = False
        callbacks, notes = self._planned(restart)
        phases = phases_of(self.folder, callbacks, self.phases)
        self._check_base(phases, restart)
        fits = PhasedFit(phases, self.model, self.data, self.trainer, self.checkpoint_every_n_steps, rehearses)
        anew = restart or rehearses
        number = 1 if anew else min(self.folder.finished_phases + 1, len(phases))
        with nullcontext() if rehearses else self._locked():
            module, trainer = fits.prepare(number, trainer_options)
            continues = not rehearses and self._claim(restart)
            if continues and self.joint is not None and trainer.is_global_zero:
                drop_scaffolding(RunFolder(self.folder.learning))  # in case learning was interrupted before it could
            for note in notes:
                rank_zero_info(note)
            if continues and self.folder.finished:
                rank_zero_info(f"The run {self.folder.path} is finished.")
                if trainer.is_global_zero:
                    phases[-1].end()  # in case the run was interrupted before it could do so
                    show_summary(self.summary)
            else:
                if trainer.is_global_zero and not rehearses:
                    self._forget_measurements()
                fits.run(number, module, trainer, continues=continues, ckpt_path=ckpt_path)

    def evaluate(self, split: Measured = "test", ckpt_path: str | None = None) -> Summary:
        """Measures the dense model and, if a fit has produced them, the compressed and the recovered one.

        Args:
            split: part of the data to measure on.
            ckpt_path: checkpoint whose adapters are measured, without being recorded in the run's folder; by default
                those that the run trained.
        """
        with self._locked():
            module, trainer = self._prepare_evaluation([])
            checkpoint = self._checkpoint(module, ckpt_path)
            summary = measure_stages(
                trainer, module, self.data, split, checkpoint=checkpoint, trained=is_trained(module),
                finished=self.folder.finished,
            )  # fmt: skip
            if trainer.is_global_zero:
                if ckpt_path is None:  # another checkpoint's results are not those of the run
                    summary.write(self.folder.test_summary if split == "test" else self.folder.validation_summary)
                show_summary(summary, split)
        return summary

    def predict(self, ckpt_path: str | None = None) -> None:
        """Writes the loss of each row of the test split, and which option is chosen for each question.

        Args:
            ckpt_path: checkpoint whose adapters predict; by default those that the run trained.
        """
        with self._locked():
            module, trainer = self._prepare_evaluation([PredictionsWriter(self.folder.predictions)])
            trainer.predict(
                module,
                datamodule=self.data,
                ckpt_path=self._checkpoint(module, ckpt_path),
                return_predictions=False,
                weights_only=True,
            )
            rank_zero_info(f"Predictions: {self.folder.predictions}")

    def search(self, config: SearchConfig, *, restart: bool = False) -> SearchResults:
        """Finds the bits of each layer by many short fits under a budget, or resumes doing so.

        Args:
            config: options of the search.
            restart: whether to discard the contents of the folder and begin anew.
        """
        check_search(self.callbacks, self.phases, self.plan, self.joint)
        phases = phases_of(self.folder, self.callbacks, [])
        self._check_base(phases, restart, decides_on_widths=config.structure is not None, ranks=config.ranks)
        with self._locked():
            for callback in phases[0].compressing:
                callback.folder = self.folder
            trainer_options = options_of_trainer(self.trainer)
            trainer = make_trainer(trainer_options, self.folder, self.callbacks)
            check_trainer(trainer)
            continues = not trainer_options.get("fast_dev_run") and self._claim(restart, search=config)
            results = SearchResults.read(self.folder.results) if continues and self.folder.results.exists() else None
            if results is not None and len(results.trials) + len(results.failed) >= config.trials:
                if config.optimizer not in {proposer.optimizer for proposer in results.proposers}:
                    raise UserError(
                        f"The search {str(self.folder.path)!r} is finished, and {config.optimizer} proposed none of "
                        f"it. {proposed_by(results)} Give more --search.trials, start it anew with --restart, or give "
                        f"this search another --run.name."
                    )
                if results.comparison == config.comparison:
                    rank_zero_info(f"The search {self.folder.path} is finished. {proposed_by(results)}")
                else:
                    rank_zero_info(
                        f"The trials of the search {self.folder.path} are finished. {proposed_by(results)} Its best "
                        f"plans are compared anew, by {config.comparison}; fits that it has made are used again."
                    )
                    results = None
            else:
                results = None
            if results is None:
                self.model.release()
                results = trainer.search(self.model, self.data, config)
            print(f"\n{variants_table(results)}\n\nReport: {self.folder.report}\nPlan: {self.folder.plan}")
        return results

    def bound_options(self, **sections: Any) -> dict[str, Any]:
        """The arguments given here as plain data, under their names on the command line.

        Args:
            sections: options that a method is given in addition to those of the run, by section.
        """
        return {
            "run": {"checkpoint_every_n_steps": self.checkpoint_every_n_steps},
            "model": plain(self.model.hparams),
            "data": plain(self.data),
            "trainer": {**plain(options_of_trainer(self.trainer)), "callbacks": self._callbacks_as_given},
            "plan": self.plan,
            "joint": self.joint and plain(asdict(self.joint)),
            "phases": [plain(vars(phase)) for phase in self.phases],
            **plain(sections),
        }

    def _learn(self, learning: Learning, trainer_options: Mapping[str, Any], restart: bool) -> None:
        """Learns the plan that the phases carry out, or resumes learning it."""
        self._check_restart(restart)
        with self._locked():
            self._claim(restart)
            learning.run(trainer_options, self.checkpoint_every_n_steps)
        assert self.folder.learned_plan.exists()  # otherwise the callbacks would decide as they do without joint

    def _planned(self, restart: bool) -> tuple[list[Callback], list[str]]:
        """The callbacks of the first phase, some of them replaced where a plan is carried out, and notes about that."""
        if self.plan is not None:
            path = Path(self.plan).expanduser()
        elif self.joint is not None and self.folder.learned_plan.exists():
            path = self.folder.learned_plan
        else:
            return self.callbacks, []
        kept = not restart and is_compressed(self.folder.model)  # then the run no longer needs the file
        plan = read_plan(self.folder.model) if kept else CompressionPlan.read(path)
        replaced = [callback for callback in self.callbacks if decides(callback)]
        notes = [f"The plan {path} replaces {callback}; nothing is scored." for callback in replaced]
        return carrying_out(self.callbacks, plan), notes

    def _check_base(
        self,
        phases: Sequence[Phase],
        restart: bool,
        *,
        decides_on_widths: bool = False,
        ranks: Sequence[int] = (),
    ) -> None:
        """Checks the base, unless the run keeps what it has made of it."""
        self._check_restart(restart)
        if restart or self.folder.kept_base is None:
            rehearse(self.model, self.data, phases, decides_on_widths=decides_on_widths, ranks=ranks)

    def _check_restart(self, restart: bool) -> None:
        """Checks that a run that begins anew does not delete its own base."""
        if restart and Path(self.model.base).absolute().is_relative_to(self.folder.path.absolute()):
            raise UserError(
                f"--restart would throw away the base {self.model.base!r}, which lies in the folder of this run. "
                f"Give the run another --run.name."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps others out of the folder and logs messages there; on rank zero."""
        with writing(self.folder.path), ExitStack() as stack:  # covers what Lightning and TensorBoard write, too
            if is_rank_zero():
                stack.callback(lock_folder(self.folder).release)
                stack.callback(log_to(self.folder.log))
            yield

    def _claim(self, restart: bool, **sections: Any) -> bool:
        """Binds the folder to the options of the run, and returns whether it resumes; rank zero decides for all."""
        if not is_rank_zero():
            return not restart
        return claim_folder(self.folder, self.options or self.bound_options(**sections), restart=restart)

    def _forget_measurements(self) -> None:
        """Removes what was measured of a model that a fit is about to change."""
        for file in (self.folder.test_summary, self.folder.validation_summary, self.folder.predictions):
            file.unlink(missing_ok=True)

    def _prepare_evaluation(self, callbacks: Sequence[Callback]) -> tuple[LoRAFinetuner, Trainer]:
        """A module that continues from what the run has made of its base, and a Trainer that measures it."""
        self.model.release()  # what a fit left in its memory is in the folder, too
        module = renewed(self.model)
        module.continues_from = self.folder.kept_base
        options = options_of_trainer(self.trainer)
        return module, make_trainer(options, self.folder, [*self.callbacks, *callbacks])

    def _checkpoint(self, module: LoRAFinetuner, ckpt_path: str | None) -> str | None:
        """The checkpoint to evaluate: the given one, or the run's unless its model has everything that is needed."""
        if ckpt_path is not None:
            check_checkpoint(module, ckpt_path, is_first=is_rank_zero())
        number = self.folder.finished_phases + 1
        phase = self.folder if number > len(self.phases) else RunFolder(self.folder.path, number)
        if ckpt_path is not None or is_trained(module) or not phase.checkpoint.exists():
            return ckpt_path
        read_checkpoint(phase.checkpoint)
        return str(phase.checkpoint)


def is_trained(module: LoRAFinetuner) -> bool:
    """Whether the base that a module continues from has trained adapters beside it."""
    return module.continues_from is not None and has_trained_adapters(module.continues_from)


def is_rank_zero() -> bool:
    """Whether this process is the first of those that share a run, as far as that is known before a Trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0
