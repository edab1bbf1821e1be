"""Commands that are functions: the signature gives their options, the docstring the help, as for classes."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser

from qpruner.errors import UserError, nearest, user_error
from qpruner.options.words import in_words, item_type, literal_choices, members

# Nothing here imports Lightning or torch: some of the commands only read and print.

Function = Callable[..., None]


class FunctionParser(ArgumentParser):
    """Raises a `UserError` where its parent class would exit the program."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser, whose caller may try something else
            super().error(message, ex)
        raise user_error(ex) or UserError(f"{' '.join(message.split())}. `{self.prog} --help` explains all.") from ex


def run_function(prog: str, function: Function, arguments: Sequence[str]) -> None:
    """Calls a function with the arguments of a command line.

    Keyword-only parameters are options, and so are those with a default; the others are positional, in their order. A
    list among the positional ones takes all words, and is the only one.

    Args:
        prog: command as the user writes it.
        function: function to be called with keywords; its docstring is the help.
        arguments: words after the command.

    Raises:
        UserError: an unknown option, or a value that an option does not accept.
    """
    parser, types = function_parser(prog, function), option_types(function)
    words = list(_joined(arguments, types))
    if _takes_all_words(function) and (listed := [word for word in words if not word.startswith("-")]):
        words = [json.dumps(listed, ensure_ascii=False), *(word for word in words if word.startswith("-"))]
    try:
        given = parser.parse_args(words)
    except UserError as error:
        raise _mistake(arguments, types) or error from None
    function(**given.as_dict())


def run_one_of(prog: str, functions: Mapping[str, Function], summary: str, arguments: Sequence[str]) -> None:
    """Calls the function that the first word names; see `run_function`.

    Args:
        prog: command as the user writes it.
        functions: functions by name; the first line of each docstring says what the function does.
        summary: what the functions do together, for the help.
        arguments: words after the command.

    Raises:
        UserError: there is no such function, or as in `run_function`.
    """
    match arguments:
        case [name, *rest] if name in functions:
            run_function(f"{prog} {name}", functions[name], rest)
        case ["-h" | "--help"]:
            parser = FunctionParser(prog=prog, description=summary)
            commands = parser.add_subcommands(metavar="COMMAND", title="commands")
            for name, function in functions.items():
                line = (inspect.getdoc(function) or "").partition("\n")[0]
                commands.add_subcommand(name, function_parser(f"{prog} {name}", function), help=line)
            parser.parse_args(["--help"])
        case _:
            said = f"There is no command {arguments[0]!r} of {prog}." if arguments else f"{prog} needs a command."
            hint = nearest(arguments[0], functions) if arguments else ""
            raise UserError(f"{said}{hint} It is one of {', '.join(functions)}; `{prog} --help` explains them.")


def function_parser(prog: str, function: Function) -> FunctionParser:
    """The parser of a function's parameters."""
    parser = FunctionParser(prog=prog, description=(inspect.getdoc(function) or "").partition("\n\nArgs:")[0])
    parameters = _parameters(function)
    named: set[str | int] = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    others: set[str | int] = {each.name for each in parameters if each.name not in named}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=named)
    parser.add_function_arguments(function, as_group=False, skip=others)
    if name := _takes_all_words(function):
        (action,) = (action for action in parser._actions if action.dest == name)
        action.metavar = f"{name.upper()}..."
    return parser


def option_types(function: Function) -> dict[str, Any]:
    """The types of the parameters that are options, by their names."""
    hints = get_type_hints(function)
    return {
        parameter.name: hints[parameter.name]
        for parameter in _parameters(function)
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty
    }


def _takes_all_words(function: Function) -> str | None:
    """Name of the list parameter that takes all words that are not options; None where there is none."""
    hints = get_type_hints(function)
    words = [each.name for each in _parameters(function) if each.name not in option_types(function)]
    return words[0] if len(words) == 1 and item_type(hints[words[0]]) else None


def _parameters(function: Function) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _joined(arguments: Sequence[str], types: Mapping[str, Any]) -> Iterator[str]:
    """The words, with each option in the form ``--name=value``.

    So ``--round-to 16`` becomes ``--round_to=16``, ``--flag`` alone ``--flag=true``, and ``--numbers 1 2`` a list.
    """
    words = list(arguments)
    while words:
        option, equals, value = words.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in types:
            yield f"{option}{equals}{value}"
        elif equals:
            yield f"--{name}={value}"
        elif any(items := [*map(item_type, members(types[name]))]) and not (words and words[0].startswith("[")):
            number = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
            given = map(json.dumps, words[:number]) if str in items else words[:number]  # "1" is a word, too
            yield f"--{name}=[{', '.join(given)}]"
            del words[:number]
        elif types[name] is bool and words[:1] not in (["true"], ["false"]):
            yield f"--{name}=true"
        elif words:
            yield f"--{name}={words.pop(0)}"
        else:
            yield f"--{name}"


def _mistake(arguments: Sequence[str], types: Mapping[str, Any]) -> UserError | None:
    """What is wrong with an option, in one line; None if something else is wrong."""
    for word in _joined(arguments, types):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if not option.startswith("--"):
            continue
        if name not in types:
            return UserError(f"There is no option {option!r}.{nearest(option, (f'--{known}' for known in types))}")
        if not equals:
            return UserError(f"{option} needs a value: {in_words(types[name])}.")
        taken: Any = ArgumentParser(exit_on_error=False)
        taken.add_argument("--value", type=types[name])
        try:
            taken.parse_args([f"--value={value}"])
        except Exception:  # raised by jsonargparse for a value that the type does not accept
            hint = nearest(value, literal_choices(types[name]))
            return UserError(f"{option} is {value!r}; it must be {in_words(types[name])}.{hint}")
    return None
