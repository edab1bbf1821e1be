"""The commands of qpruner: one table, from which ``qpruner --help`` is printed and a command line is dispatched.

The module of a command is imported only when the command runs, so that nothing heavy is imported before.
"""

from dataclasses import dataclass
from pkgutil import resolve_name

from qpruner import __version__
from qpruner.errors import UserError, nearest

DESCRIPTION = "Narrower layers, each at the bits it deserves, adapters that win back what was lost."


@dataclass(frozen=True)
class Command:
    """A command of qpruner.

    Args:
        summary: one line about what the command does, for the help.
        target: ``module:function`` that runs the command, called with the words after the command's name; None for a
            command that needs a Trainer and is run by the LightningCLI.
    """

    summary: str
    target: str | None = None


COMMANDS = {
    "fit": Command("Compress a model, train adapters that win back what was lost, and keep all in a run folder."),
    "validate": Command("Measure a run on the validation split: dense, compressed and recovered."),
    "test": Command("Measure a run on the test split: dense, compressed and recovered."),
    "predict": Command("Write the loss of each row of the test split, and which option of each question is chosen."),
    "search": Command("Find the bits of each layer by many short fits under a budget."),
    "evaluate": Command(
        "Measure what a model can do: tasks with options, perplexity of texts, and how it writes.",
        "qpruner.evaluate_command:evaluate_command",
    ),
    "generate": Command(
        "Let a model go on with a prompt, with tokens per second and memory.",
        "qpruner.generate_command:generate_command",
    ),
    "report": Command("Write the report of a run again, and print its table.", "qpruner.report_command:report_command"),
    "compare": Command(
        "Show runs and evaluations side by side, and how each differs from the first.",
        "qpruner.compare_command:compare_command",
    ),
    "plan": Command(
        "Show, compare and check plans; list the ratios that a model can be pruned to.",
        "qpruner.plan_command:plan_command",
    ),
    "verify": Command(
        "Hold a compressed model to what it was when it was written: every file, and what it says.",
        "qpruner.verify_command:verify_command",
    ),
    "merge": Command(
        "Write a dense copy of a run's model, with the adapters in its weights.", "qpruner.merge_command:merge_command"
    ),
    "export": Command(
        "Write a run's model in the format of another engine, and say what that changes.",
        "qpruner.export_command:export_command",
    ),
}


def run(arguments: list[str]) -> None:
    """Runs the command of a command line.

    Args:
        arguments: words of the command line, the command first.

    Raises:
        UserError: the command cannot be carried out as given.
    """
    match arguments:
        case ["-h" | "--help"]:
            print(overview())
        case ["--version"]:
            print(f"qpruner {__version__}")
        case [name, *rest] if name in COMMANDS:
            _run_command(COMMANDS[name], arguments, rest)
        case _:
            raise _no_command(arguments)


def _run_command(command: Command, arguments: list[str], rest: list[str]) -> None:
    if command.target is not None:
        resolve_name(command.target)(rest)
    else:
        from qpruner.cli import run_trainer  # Lightning takes seconds to import

        run_trainer(arguments)


def overview() -> str:
    """The text of ``qpruner --help``."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qpruner COMMAND [options]",
            "",
            DESCRIPTION,
            "",
            "commands:",
            *lines,
            "",
            "options:",
            f"  {'--help':{width}}Say this, or with a command, explain its options.",
            f"  {'--version':{width}}Say which qpruner this is.",
        ]
    )


def _no_command(arguments: list[str]) -> UserError:
    allowed = f"The commands are {', '.join(COMMANDS)}; `qpruner --help` explains them."
    if not arguments:
        return UserError(f"No command was given. {allowed}")
    first = arguments[0]
    if first.startswith("-"):
        return UserError(f"The command comes before the options, and {first!r} is none. {allowed}")
    return UserError(f"There is no command {first!r}.{nearest(first, COMMANDS)} {allowed}")
