"""What the user gave: the options of a command line and of the YAML files that it names, in order."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qpruner.errors import UserError, nearest

CONFIG = ("-c", "--config")
PRINT = "print_config"
"""Takes a value after ``=``, or none."""
NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")
"""What argparse considers a number; it considers any other word that begins with ``-`` an option."""


@dataclass(frozen=True)
class GivenOption:
    """One option and its value.

    Args:
        name: dotted name as it was given, such as ``model.lora.r``, or the name at the top level of a file. With ``+``
            appended to the name, the value is appended.
        value: text from the command line, or the parsed value from a YAML file.
        file: file that contains the option; None for the command line.
    """

    name: str
    value: Any
    file: str | None = None


def read_arguments(arguments: Sequence[str], flags: Collection[str]) -> Iterator[GivenOption]:
    """The options of a command line, one after the other, with those of its files at the place where a file is named.

    Args:
        arguments: words after the command.
        flags: names of the options that need no value.

    Raises:
        UserError: a word that is not an option, an option without its value, or a file as in `read_file`.
    """
    words = iter(enumerate(arguments, start=1))
    for following, word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if option == "--" or not (option.startswith("--") or option in CONFIG):
            raise UserError(
                f"{shown(word)} is neither an option nor the value of one. Options begin with --, a list is written as "
                f"'[1, 2]', and text with spaces stands in quotes."
            )
        if name in flags:
            if equals:
                raise UserError(f"{option} takes no value. Give {option} alone, or leave it out.")
            continue
        if name == PRINT:
            continue
        if not equals:
            value = arguments[following] if following < len(arguments) else "--"
            if value.startswith("-") and not NEGATIVE.fullmatch(value):
                raise UserError(f"{option} needs a value. One that begins with '-' is given as {option}=VALUE.")
            next(words)
        if option in CONFIG and not Path(value).is_fifo():  # the contents of a pipe were read by the parser
            yield from (GivenOption(str(key), content, value) for key, content in read_file(value).items())
        elif option not in CONFIG:
            yield GivenOption(name, value)


def config_files(arguments: Sequence[str]) -> Iterator[str]:
    """The files that a command line names, without pipes, which can be read only once."""
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in CONFIG and (equals or number + 1 < len(arguments)):
            path = value if equals else arguments[number + 1]
            if not Path(path).is_fifo():
                yield path


def read_file(path: str) -> dict[str, Any]:
    """The options of a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, holds anything but options, or holds an option twice.
    """
    text = _text(Path(path).expanduser(), path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path!r} is not YAML: {_yaml_problem(error, text)}") from error
    except (RecursionError, ValueError) as error:  # from numbers with thousands of digits, or invalid dates
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"Cannot read {path!r}: {said}. It must hold options, as the files in configs do.") from error
    if content is None:
        raise UserError(f"{path!r} is empty. It must hold options, such as those in the folder configs.")
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else f"only {shown(content)}"
        raise UserError(f"{path!r} holds {kind}. It must hold options by their names, as `model:` on its first line.")
    if content and all(value is None for value in content.values()):
        raise UserError(f"{path!r} gives no value to any of its options ({', '.join(map(str, content))}).")
    for twice in _repeated_keys(root):
        raise UserError(
            f"{path!r} names {twice.value!r} a second time in line {twice.start_mark.line + 1}, which would replace "
            f"the first. Put both together, or take one out."
        )
    return content


def shown(value: Any) -> str:
    """A value as shown in an error message, no longer than a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(file: Path, path: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except IsADirectoryError as error:
        inside = file / "config.yaml"
        hint = f" Did you mean {str(inside)!r}?" if inside.is_file() else ""
        raise UserError(f"{path or '.'!r} is a folder, and --config takes a file.{hint}") from error
    except FileNotFoundError as error:
        beside = [str(other) for other in file.parent.glob("*.y*ml")]
        raise UserError(f"There is no file {path!r} for --config.{nearest(str(file), beside)}") from error
    except OSError as error:
        raise UserError(f"Cannot read {path!r}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path!r} is not text in UTF-8 (byte {error.start + 1} is 0x{error.object[error.start]:02x}). --config "
            f"takes a YAML file; save it in UTF-8."
        ) from error


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return "it holds characters that YAML forbids."
    line = text.splitlines()[mark.line : mark.line + 1]
    if line and "\t" in line[0][: mark.column + 1]:
        return f"line {mark.line + 1} is indented with a tab. Use spaces."
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or error}."


def _repeated_keys(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Keys that occur a second time in their mapping, anywhere below a node."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    yield key
                seen.add(key.value)
            yield from _repeated_keys(value)
