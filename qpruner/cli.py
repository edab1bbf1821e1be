"""The command line as a LightningCLI: options are the signatures of the classes, explained by their docstrings."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from qpruner.callbacks import (
    Compression,
    LogInterval,
    LoRAGuidedPruning,
    MeasuredEnd,
    MeasuredStage,
    MixedPrecisionQuantization,
    PlannedPruning,
    PredictionsWriter,
    RunCheckpoint,
    RunReport,
    Throughput,
)
from qpruner.callbacks.compression import CompressionInSetup, Rehearsal
from qpruner.checkpoint import (
    build_skeleton,
    has_trained_adapters,
    read_plan,
    rehearse_saving,
)
from qpruner.commands import COMMANDS
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError, user_error
from qpruner.folder_manifest import is_compressed
from qpruner.memory import num_parameters, peak_meaning, read_peak, reset_peak, tensor_bytes
from qpruner.options.classes import Options
from qpruner.options.given import config_files, read_arguments, read_file
from qpruner.options.mistakes import Mistakes, holds_empty_section
from qpruner.options.parsed import check_parsed
from qpruner.options.parser import CommandParser
from qpruner.phases import Phase, PhaseConfig, phases_of
from qpruner.plan import CompressionPlan
from qpruner.pretrained import held_in, is_reachable
from qpruner.report_command import show_summary
from qpruner.runs.folder import RunConfig, RunFolder
from qpruner.runs.log import log_to
from qpruner.runs.report import Stage, Summary
from qpruner.runs.search import SearchResults, proposed_by, variants_table
from qpruner.search.config import SearchConfig
from qpruner.search.trainer import SearchTrainer
from qpruner.training.checkpoint_file import read_checkpoint
from qpruner.training.module import LoRAFinetuner
from qpruner.training.preflight import (
    check_callbacks,
    check_checkpoint,
    check_kept,
    check_trainer,
    class_refused,
    options_told,
    refusals_told,
)

WRITING = ("fit", "search")
"""Commands that make a run, whose options the run folder is bound to."""
EVALUATING = ("validate", "test", "predict")
OURS = {"model", "datamodule", "weights_only"}
SKIPPED = {
    "fit": OURS | {"train_dataloaders", "val_dataloaders"},
    "validate": OURS | {"dataloaders", "verbose"},
    "test": OURS | {"dataloaders", "verbose"},
    "predict": OURS | {"dataloaders", "return_predictions"},
    "search": {"model", "datamodule"},
}
"""Arguments of the Trainer's method that are no options, for each command that it runs."""
TRAINER_DEFAULTS = {"use_distributed_sampler": False}  # the loaders share the rows among the ranks themselves


class QPrunerCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict`` and ``search`` over a run folder."""

    def __init__(self, args: list[str] | None = None) -> None:
        self.command = (sys.argv[1:] if args is None else args)[0]
        super().__init__(
            LoRAFinetuner,
            TokenDataModule,
            trainer_class=SearchTrainer,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=None,  # the run folder keeps the configuration
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the module keeps its own options as plain data
            parser_class=CommandParser,
            parser_kwargs={"prog": "qpruner", self.command: {"description": COMMANDS[self.command].summary}},
            args=args,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the options.

        Raises:
            UserError: an option or a file is wrong.
        """
        arguments, options = (sys.argv[1:] if args is None else args)[1:], self._parser(self.command)
        for path in config_files(arguments):
            read_file(path)
        flags = {action.dest for action in options._actions if action.nargs == 0}
        mistakes = Mistakes(options, elsewhere(self.command))
        try:
            super().parse_arguments(parser, args)
            check_parsed(Options.of_parser(options), self.config[self.command])
        except UserError as error:
            mistakes.check(read_arguments(arguments, flags))
            raise error from None  # of a kind that is not known here: as the parser told it
        if any(holds_empty_section(option.value) for option in read_arguments(arguments, flags)):
            mistakes.check(read_arguments(arguments, flags))
        given = self.config[self.command]
        if not 0 <= given.seed_everything < 2**32:
            raise UserError(f"seed_everything is {given.seed_everything}; it must be from 0 to {2**32 - 1}.")
        if not isinstance(given.restart, bool):  # in a file it may be anything, and text would mean yes
            raise UserError(f"restart is {given.restart!r}; it must be true or false.")

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of the adapters, the order of the data and dropout."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=RunConfig, default=RunConfig(), help="Where the run is kept.")
        parser.add_argument(
            "--plan",
            type=str | None,
            default=None,
            help="A plan to carry out instead of making one (fit only); see `qpruner plan`.",
        )
        parser.add_argument(
            "--phases",
            type=list[PhaseConfig],
            default=[],
            help="Further fits, each of which begins with what the one before left (fit only).",
        )
        parser.add_argument(
            "--restart",
            action="store_true",
            help="Throw away what the run folder holds and begin anew (fit and search).",
        )
        parser.link_arguments("model.base", "data.init_args.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.init_args.trust_remote_code")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _parse_ckpt_path(self) -> None:
        """Leaves the options alone: a checkpoint that does not fit them is an error, never a silent change of them."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse buries the texts of our errors in its own
            raise user_error(error) or class_refused(error) or error from None

    def before_instantiate_classes(self) -> None:
        """Lets a run whose base is kept go on when the dense model is gone: the tokenizer is kept, too."""
        options = self.config[self.subcommand]
        self.folder = RunFolder.of(RunConfig(**vars(options.run)))
        kept = None if options.restart else next(filter(is_compressed, self.folder.bases), None)
        self.kept = kept is not None
        if kept is not None and not is_reachable(options.model.base):
            options.data.init_args.tokenizer = str(kept)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Claims the run folder, now that every option is known to be good and before any work is done."""
        options = self.config_init[self.subcommand]
        given = options.trainer.callbacks or []
        callbacks: list[Callback] = [given] if isinstance(given, Callback) else list(given)
        self.rehearses = self.subcommand == "fit" and bool(options.trainer.fast_dev_run)
        notes: list[str] = []
        further: list[PhaseConfig] = options.phases if self.subcommand != "search" else []
        if self.subcommand in WRITING:
            self._check_command(options, callbacks)
            if options.plan is not None:
                callbacks, notes = self._carrying_out(callbacks, options.plan)
        self.phases = phases_of(self.folder, callbacks, further)
        if self.subcommand in WRITING and not self.kept:
            self._rehearse()
        run = self.folder
        with ExitStack() as claim:
            self._lock_folder(run, claim)
            self.first = self.model
            over = 0 if self.rehearses or options.restart else min(run.finished_phases, len(self.phases) - 1)
            trainer = self._enter(self.phases[over], kwargs)
            self._claim_folder(run)
            self._claim = claim.pop_all()  # held until the command is over
        for note in notes:
            rank_zero_info(note)
        return trainer

    def _enter(self, phase: Phase, kwargs: dict[str, Any] | None = None) -> Trainer:
        """Makes the module and the Trainer of a phase.

        Raises:
            UserError: the Trainer's options cannot be had.
        """
        if phase.number > 1:  # loggers, strategies and the like belong to one Trainer
            self.config_init = self.parser.instantiate_classes(self.config)
        options = self.config_init[self.subcommand]
        self.phase, self.folder = phase, phase.folder
        self.model = phase.module(self.first)
        kwargs = {**(kwargs or {}), **(phase.config.length if phase.config else {})}
        if options.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                self.folder.own, name=self.folder.tensorboard.name, version="", default_hp_metric=False
            )
        kwargs["default_root_dir"] = str(self.folder.path)
        callbacks = phase.callbacks
        if not self.rehearses:
            for callback in phase.compressing:
                callback.folder = self.folder
        if self.subcommand == "predict":
            callbacks = [*callbacks, PredictionsWriter(self.folder.predictions)]
        if self.subcommand == "fit" and not self.rehearses:
            self.model.kept_in = phase.kept_in
            later = [callback for other in self.phases[phase.number :] for callback in other.compressing]
            report = RunReport(self.folder, phase.number, later)
            checkpoint = RunCheckpoint(self.folder.checkpoint, options.run.checkpoint_every_n_steps)
            callbacks = [report, *_measured(callbacks, report), MeasuredEnd(report), Throughput(), checkpoint]
            if options.trainer.log_every_n_steps is None:
                callbacks = [LogInterval(), *callbacks]
        elif self.subcommand in EVALUATING:
            self.model.follows = next(filter(is_compressed, self.folder.bases), None)
        check_kept(options.trainer, keeps_checkpoint=self.subcommand == "fit" and not self.rehearses)
        with options_told():
            trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        if self.subcommand in WRITING:
            check_trainer(trainer)
            for other in self.phases[phase.number :]:
                check_callbacks(trainer, other.callbacks)
        return trainer

    def _check_command(self, options: Any, callbacks: Sequence[Callback]) -> None:
        """Finds options that do not go together.

        Raises:
            UserError: some do not.
        """
        if options.plan is not None and self.subcommand == "search":
            raise UserError("A search makes plans; --plan is for `qpruner fit`, which carries one out.")
        if self.subcommand == "search" and any(isinstance(one, LoRAGuidedPruning) for one in callbacks):
            raise UserError(
                "LoRAGuidedPruning prunes in the course of a fit, and a search prunes before its trials. Search with "
                "StructuredPruning, or `qpruner merge` a run that pruned in training and search on its result."
            )
        if options.phases and self.subcommand == "search":
            raise UserError("A search has no phases; they are for `qpruner fit`. Leave --phases out.")
        if options.phases and options.plan is not None:
            raise UserError(
                "--plan carries out a plan in one fit, and the run has phases. Leave --phases out to recover the plan."
            )

    def _carrying_out(self, callbacks: list[Callback], path: str) -> tuple[list[Callback], list[str]]:
        """The callbacks, with those that decide on a compression replaced by those that carry out a given plan.

        Returns:
            The callbacks, and what the log shall say of it.
        """
        # Once its base is kept, a run needs the file no more.
        plan = (
            read_plan(self.folder.model)
            if self.kept and is_compressed(self.folder.model)
            else CompressionPlan.read(Path(path).expanduser())
        )
        replaced = [callback for callback in callbacks if isinstance(callback, Compression)]
        return _planned(callbacks, plan), [
            f"The plan {path} replaces {callback}; nothing is scored." for callback in replaced
        ]

    def _rehearse(self) -> None:
        """Finds what is wrong with the base, what of it cannot be saved, and what callbacks ask for and it cannot give.

        Raises:
            UserError: something.
        """
        compressing = [callback for phase in self.phases for callback in phase.compressing]
        config = self.model.check_base()
        self.datamodule.check_vocabulary(config.get_text_config().vocab_size)
        if compressing:
            skeleton = build_skeleton(config)
            rehearsal = Rehearsal(skeleton.to(held_in(config, self.model.dtype_of_base)), self.model.lora)
            for callback in compressing:
                callback.check(rehearsal)
            trusted = self.model.trust_remote_code
            rehearse_saving(self.model.base, config, self.datamodule.tokenizer, trust_remote_code=trusted)

    def _lock_folder(self, run: RunFolder, claim: ExitStack) -> None:
        """Keeps others out of the folder of the run and begins its log, on rank zero."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            claim.callback(run.lock().release)
            claim.callback(log_to(run.log))

    def _claim_folder(self, run: RunFolder) -> None:
        """On rank zero; the other ranks follow what it finds there."""
        options = self.config[self.subcommand]
        self.continues = False
        if options.restart and Path(options.model.base).absolute().is_relative_to(run.path.absolute()):
            raise UserError(
                f"--restart would throw away the base {options.model.base!r}, which lies in the folder of this run. "
                f"Give the run another --run.name."
            )
        if self.subcommand in WRITING:
            if getattr(rank_zero_only, "rank", 0) != 0:
                self.continues = not options.restart
            elif not options.trainer.fast_dev_run:
                dumped = self._parser(self.subcommand).dump(options, skip_none=False)
                self.continues = run.claim(yaml.safe_load(dumped), restart=options.restart)

    def _run_subcommand(self, subcommand: str) -> None:
        with self._claim:
            super()._run_subcommand(subcommand)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on an instance
        """The command that runs, with the arguments of the Trainer's method that are no options here.

        Not all commands: Lightning builds the parser of each that it is told of.
        """
        return {self.command: SKIPPED[self.command]}

    # LightningCLI calls these in place of the Trainer's methods.

    def fit(self, model: LoRAFinetuner, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        if self.continues and self.folder.finished:
            rank_zero_info(f"The run {self.folder.path} is finished.")
            if self.trainer.is_global_zero:
                self.phase.end()  # in case that it was cut off before it could
                show_summary(Summary.read(self.folder.summary), "test")
            return
        if self.phase.number > 1:
            ckpt_path = None  # the first phase began with it
        if self.trainer.is_global_zero and not self.rehearses:
            for over in self.phases[: self.phase.number - 1]:  # cut off, perhaps, before they could
                over.folder.drop_training_state()
        while True:
            if len(self.phases) > 1:
                rank_zero_info(f"Phase {self.phase.number} of {len(self.phases)}.")
            if self.continues and self.folder.checkpoint.exists():
                read_checkpoint(self.folder.checkpoint)  # so that damage is told
                ckpt_path = str(self.folder.checkpoint)
                rank_zero_info(f"Going on from {ckpt_path}.")
            elif ckpt_path is not None:
                check_checkpoint(self.model, ckpt_path)
            self.trainer.fit(self.model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
            if self.rehearses:
                break
            if self.trainer.is_global_zero:
                self.phase.end()
            if self.phase.number == len(self.phases):
                break
            ckpt_path = None
            self.model.model = None  # the next phase loads what this one left
            self.trainer = self._enter(self.phases[self.phase.number])

    def search(self, model: LoRAFinetuner, datamodule: TokenDataModule, search: SearchConfig) -> None:
        done = self.continues and self.folder.results.exists()
        results = SearchResults.read(self.folder.results) if done else None
        if results is not None and len(results.trials) + len(results.failed) >= search.trials:
            if search.optimizer not in {proposer.optimizer for proposer in results.proposers}:
                raise UserError(
                    f"The search {str(self.folder.path)!r} is finished, and {search.optimizer} proposed none of it. "
                    f"{proposed_by(results)} Give more --search.trials, start it anew with --restart, or give this "
                    f"search another --run.name."
                )
            rank_zero_info(f"The search {self.folder.path} is finished. {proposed_by(results)}")
        else:
            assert isinstance(self.trainer, SearchTrainer)
            results = self.trainer.search(model, datamodule, search)
        print(f"\n{variants_table(results)}\n\nReport: {self.folder.report}\nPlan: {self.folder.plan}")

    def validate(self, model: LoRAFinetuner, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        self._evaluate("validate", "validation", model, datamodule, ckpt_path)

    def test(self, model: LoRAFinetuner, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        self._evaluate("test", "test", model, datamodule, ckpt_path)

    def predict(self, model: LoRAFinetuner, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        self.trainer.predict(
            model,
            datamodule=datamodule,
            ckpt_path=self._trained(ckpt_path),
            return_predictions=False,
            weights_only=True,
        )
        rank_zero_info(f"Predictions: {self.folder.predictions}")

    def _trained(self, ckpt_path: str | None) -> str | None:
        """The checkpoint to evaluate: the one given, or the run's unless its model has all that is needed."""
        if ckpt_path is not None:
            check_checkpoint(self.model, ckpt_path)
        if ckpt_path is not None or self._is_trained:
            return ckpt_path
        if not self.folder.checkpoint.exists():
            return None
        read_checkpoint(self.folder.checkpoint)
        return str(self.folder.checkpoint)

    @property
    def _is_trained(self) -> bool:
        """Whether the model that is evaluated has trained adapters beside it."""
        return self.model.follows is not None and has_trained_adapters(self.model.follows)

    def _evaluate(
        self, verb: str, split: str, model: LoRAFinetuner, datamodule: TokenDataModule, ckpt_path: str | None
    ) -> None:
        """Measures the dense model and, where a fit has left them, the compressed and the recovered one."""
        device = self.trainer.strategy.root_device
        stages: list[Stage] = []

        def measure(name: str, *, adapted: bool = False, checkpoint: str | None = None) -> None:
            if not adapted:
                size = num_parameters(model.model), tensor_bytes(model.model)
            model.configure_model()
            reset_peak(device)
            since = time.perf_counter()
            with nullcontext() if adapted else model.adapters_disabled():
                (results, *_) = getattr(self.trainer, verb)(
                    model, datamodule=datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True
                )
            if adapted:
                size = num_parameters(model.model), tensor_bytes(model.model)
            results = {key.partition("/")[2]: value for key, value in results.items()}
            seconds = time.perf_counter() - since
            stages.append(Stage(name, *size, model.average_bits, results, seconds, None, read_peak(device)))

        checkpoint = self._trained(ckpt_path)
        model.load_dense_base()
        measure("dense")
        if model.follows is not None:
            model.load_kept_base(model.follows)
            measure("quantized" if model.plan and model.plan.quantized else "pruned")
        if checkpoint or self._is_trained:
            measure("recovered", adapted=True, checkpoint=checkpoint)
        summary = Summary(True, datamodule.protocol, peak_meaning(device), tuple(stages))
        if self.trainer.is_global_zero:
            summary.write(self.folder.path / f"{verb}.json")
            show_summary(summary, split)


def _planned(callbacks: Sequence[Callback], plan: CompressionPlan) -> list[Callback]:
    """The callbacks, with those that decide on a compression replaced by those that carry out the plan."""
    configured = next((callback for callback in callbacks if isinstance(callback, MixedPrecisionQuantization)), None)
    quantization = [MixedPrecisionQuantization.of_plan(plan, configured)] if plan.quantized else []
    others = [callback for callback in callbacks if not isinstance(callback, Compression)]
    return [PlannedPruning(plan), *quantization, *others]


def _measured(callbacks: Sequence[Callback], report: RunReport) -> Iterator[Callback]:
    """The callbacks, with a measurement behind each that compresses the base before the fit."""
    for callback in callbacks:
        yield callback
        if isinstance(callback, CompressionInSetup):
            yield MeasuredStage(report, callback.leaves)


def elsewhere(command: str) -> dict[str, str]:
    """The options that only other commands have, each with such a command."""
    options = {other: {*signature(getattr(SearchTrainer, other)).parameters} - SKIPPED[other] for other in SKIPPED}
    return {name: other for other in SKIPPED for name in options[other] - options[command] if name != "self"}


def run_trainer(arguments: list[str]) -> None:
    """Runs a command that needs a Trainer.

    Args:
        arguments: of the command line, the command first.

    Raises:
        UserError: the command cannot be carried out as given.
    """
    # Lightning starts the other ranks with the command of this process, so it must be left to read that itself.
    with refusals_told():
        QPrunerCLI(None if arguments == sys.argv[1:] else arguments)
