"""The command line as a LightningCLI: options are the signatures of the classes, explained by their docstrings."""

import sys
from inspect import signature
from typing import Any

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qpruner.commands import COMMANDS
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError, user_error
from qpruner.joint.config import JointConfig
from qpruner.options.classes import Options
from qpruner.options.given import config_files, read_arguments, read_file
from qpruner.options.mistakes import Mistakes, holds_empty_section
from qpruner.options.parsed import check_parsed
from qpruner.options.parser import CommandParser
from qpruner.pretrained import is_reachable
from qpruner.records.folder import RunConfig, RunFolder
from qpruner.runs.phases import PhaseConfig
from qpruner.runs.run import Run
from qpruner.runs.trainers import TRAINER_DEFAULTS
from qpruner.search.trainer import SearchTrainer
from qpruner.training.module import LoRAFinetuner
from qpruner.training.preflight import class_refused, refusals_told

OURS = {"model", "datamodule", "weights_only"}
SKIPPED = {
    "fit": OURS | {"train_dataloaders", "val_dataloaders"},
    "validate": OURS | {"dataloaders", "verbose"},
    "test": OURS | {"dataloaders", "verbose"},
    "predict": OURS | {"dataloaders", "return_predictions"},
    "search": {"model", "datamodule"},
}
"""Arguments of the Trainer's method that are not exposed as options, for each command that it runs."""


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
            raise error from None  # of an unknown kind: as the parser reported it
        if any(holds_empty_section(option.value) for option in read_arguments(arguments, flags)):
            mistakes.check(read_arguments(arguments, flags))
        given = self.config[self.command]
        if not 0 <= given.seed_everything < 2**32:
            raise UserError(f"seed_everything is {given.seed_everything}; it must be from 0 to {2**32 - 1}.")
        if not isinstance(given.restart, bool):  # in a file it may be anything, and any text would count as true
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
            "--joint",
            type=JointConfig | None,
            default=None,
            help="Learn structure and precision together, before a fit that carries them out (fit only).",
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
        """Does nothing: a checkpoint that does not fit the options is an error, and never silently changes them."""

    def before_instantiate_classes(self) -> None:
        """Lets a run whose base is kept go on when the dense model is gone: the tokenizer is kept, too."""
        options = self.config[self.subcommand]
        self.folder = RunFolder.of(RunConfig(**vars(options.run)))
        kept = None if options.restart else self.folder.kept_base
        if kept is not None and not is_reachable(options.model.base):
            options.data.init_args.tokenizer = str(kept)

    def instantiate_classes(self) -> None:
        """Creates the run, without a Trainer: the run creates one for each of its phases."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:  # jsonargparse buries the texts of our errors in its own
            raise user_error(error) or class_refused(error) or error from None
        options = self.config_init[self.subcommand]
        callbacks = options.trainer.callbacks or []
        self.model, self.datamodule = options.model, options.data
        self.unused_trainer: Any = options.trainer
        self.run = Run(
            self.folder.path,
            options.model,
            options.data,
            [callbacks] if isinstance(callbacks, Callback) else callbacks,
            self.trainer_options,
            phases=options.phases,
            plan=options.plan,
            joint=options.joint,
            checkpoint_every_n_steps=options.run.checkpoint_every_n_steps,
            options=yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False)),
        )

    def trainer_options(self) -> dict[str, Any]:
        """The options of the Trainer; their objects are created anew on every call but the first."""
        options, self.unused_trainer = self.unused_trainer, None
        if options is None:
            options = self.parser.instantiate_classes(self.config)[self.subcommand].trainer
        return {name: value for name, value in vars(options).items() if name != "callbacks"}

    def _run_subcommand(self, subcommand: str) -> None:
        options = self.config_init[subcommand]
        match subcommand:
            case "fit":
                self.run.fit(options.ckpt_path, restart=options.restart)
            case "search":
                self.run.search(options.search, restart=options.restart)
            case "predict":
                self.run.predict(options.ckpt_path)
            case _:
                self.run.evaluate("test" if subcommand == "test" else "validation", options.ckpt_path)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on an instance
        """The command that runs, with the arguments of the Trainer's method that are no options here.

        Only this one is given, since Lightning builds a parser for every command that it knows of.
        """
        return {self.command: SKIPPED[self.command]}


def elsewhere(command: str) -> dict[str, str]:
    """The options that only other commands have, each with a command that has it."""
    options = {other: {*signature(getattr(SearchTrainer, other)).parameters} - SKIPPED[other] for other in SKIPPED}
    return {name: other for other in SKIPPED for name in options[other] - options[command] if name != "self"}


def run_trainer(arguments: list[str]) -> None:
    """Runs a command that needs a Trainer.

    Args:
        arguments: words of the command line, the command first.

    Raises:
        UserError: the command cannot be carried out as given.
    """
    # Lightning starts the other ranks with the command line of this process, so it must parse that itself.
    with refusals_told():
        QPrunerCLI(None if arguments == sys.argv[1:] else arguments)
