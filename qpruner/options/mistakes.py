"""Finds the option that the parser failed on, and explains what is wrong with it.

jsonargparse reports a mistake as text: whole unions of types and the objects tried with them, worded differently in
each version. The options are therefore checked again here, one by one, against the types of the parser and of the named
classes; jsonargparse is only asked whether a type accepts a value.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from os.path import isfile
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from qpruner.errors import UserError, nearest
from qpruner.options.classes import (
    Options,
    allowed,
    class_in,
    class_named,
    is_abstract,
    offered_classes,
    suggested_classes,
)
from qpruner.options.given import GivenOption, read_file, shown
from qpruner.options.words import is_class, item_type, literal_choices, members, takes_null

OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a mapping that names a class."""
REPLACED = {
    "eval_batch_size": "Batches of evaluation are filled by tokens and not by rows: give eval_tokens_per_batch "
    "instead, or leave it out."
}
"""What to say about options that no longer exist."""


@dataclass
class Chosen:
    """A class that was named for an option, and the names of the options that were given for it."""

    of: type
    given: set[str] = field(default_factory=set)


class Mistakes:
    """Checks options one after the other, in the same way as the parser.

    Args:
        parser: parser of the command.
        elsewhere: for each option that only another command has, that command.
    """

    def __init__(self, parser: ArgumentParser, elsewhere: Mapping[str, str]) -> None:
        self.help = f"`{parser.prog.replace(' [options]', '')} --help` explains all."
        self.options = Options.of_parser(parser)
        self.elsewhere = elsewhere
        self.chosen: dict[str, list[Chosen]] = {}

    def check(self, given: Iterable[GivenOption]) -> None:
        """Checks all options that were given, and that none is missing.

        Raises:
            UserError: an option is wrong or missing.
        """
        names: set[str] = set()
        for option in given:
            (names.discard if option.value in (None, "null") else names.add)(option.name)
            try:
                self._check_option(self.options, option.name, option.value)
            except UserError as error:
                raise UserError(f"In {option.file}: {error}" if option.file else str(error)) from None
        for name in sorted(self.options.required - names):
            if not any(other.startswith(f"{name}.") for other in names):
                raise UserError(f"{name} was not given. It must be {allowed(self.options.types[name])}.")
        for owner, classes in self.chosen.items():
            for chosen in classes:
                options = Options.of_class(chosen.of)
                for name in sorted(options.required - chosen.given):
                    if f"{owner}.{name}" not in self.options.linked:
                        raise UserError(
                            f"{chosen.of.__name__} needs {owner}.{name}, and it was not given. It must be "
                            f"{allowed(options.types[name])}."
                        )

    def _check_option(self, options: Options, name: str, value: Any, owner: str = "") -> None:
        """Checks an option of the parser, or of the class that was last named for ``owner``."""
        appends, name = name.endswith("+"), name.removesuffix("+")
        prefix = f"{owner}." if owner else ""
        if name in options.types and not (value is None and name in options.unset):
            self._check_value(options.types[name], value, prefix + name, appends=appends)
        elif name in options.types:
            return
        elif name in options.groups:
            for key, content in _options_in(value, prefix + name).items():
                self._check_option(options, f"{name}.{key}", content, owner)
        elif inner := options.owner_of(name):
            rest = name.removeprefix(f"{inner}.").removeprefix("init_args.")
            self._check_option_of_class(options.types[inner], prefix + inner, rest, value)
        elif not owner and (command := self.elsewhere.get(name.partition(".")[0])):
            raise UserError(f"{name} is an option of `qpruner {command}`, and not of this command. Leave it out.")
        else:
            of = f" of {self.chosen[owner][-1].of.__name__}" if owner else ""
            offered = [prefix + other for other in (*options.types, *options.groups)]
            raise UserError(f"There is no option {prefix + name!r}{of}.{self._suggestion(prefix + name, offered)}")

    def _suggestion(self, name: str, offered: Sequence[str]) -> str:
        """The option that was probably meant.

        One with a prefix, one of that name further inside the group, a similar name in the group, or any similar name.
        """
        group, _, leaf = name.rpartition(".")
        if leaf in REPLACED:
            return f" {REPLACED[leaf]}"
        beside = {option.rpartition(".")[2]: option for option in offered if option.rpartition(".")[0] == group}
        inside = [option for option in offered if option.startswith(f"{group}.") and option.endswith(f".{leaf}")]
        close = (
            [option for option in offered if option.endswith(f".{name}")]
            or (inside if group else [])
            or [beside[near] for near in get_close_matches(leaf, beside, n=1)]
            or ([] if beside else get_close_matches(name, offered, n=1))
        )
        return f" Did you mean {close[0]!r}?" if close else f" {self.help}"

    def _check_option_of_class(self, option_type: Any, owner: str, name: str, value: Any) -> None:
        base = class_in(option_type)
        assert base is not None
        if name in ("class_path", "init_args"):
            self._check_object(base, {name: value}, owner)
            return
        if owner not in self.chosen:
            if not is_dataclass(base):
                having = [known for known in offered_classes(base) if name in Options.of_class(known).types]
                example = having[0].__name__ if having else "CLASS"
                raise UserError(
                    f"{owner}.{name} is an option of a class, and none is named for {owner} before it. Name the class "
                    f"first: --{owner} {example} --{owner}.{name} VALUE."
                )
            self.chosen[owner] = [Chosen(base)]
        chosen = self.chosen[owner][-1]
        chosen.given |= {name, name.partition(".")[0]}
        self._check_option(Options.of_class(chosen.of), name, value, owner)

    def _check_value(self, option_type: Any, value: Any, name: str, *, appends: bool) -> None:
        base, loaded = class_in(option_type), _loaded(value)
        takes_list = any(map(item_type, members(option_type)))
        if base is not None and not appends:
            # When a class replaces another, the parser keeps those options of the old one that the new one has, too.
            before = self.chosen.pop(name, [])[-1:]
            kept = before[0].given if before else set()
        else:
            kept = set()
        if base is not None and isinstance(loaded, list) and takes_list:
            for item in loaded:
                self._check_object(base, item, name)
        elif base is not None and _is_object(base, loaded):
            if not (appends or any(map(is_class, members(option_type)))):
                raise wrong_value(option_type, value, name)  # one object where several are asked for
            if isinstance(loaded, dict) and "class_path" not in loaded and not (is_dataclass(base) or kept):
                raise UserError(  # neither it nor anything before it names a class
                    f"{name} is {shown(value)}, which names no class. Give one as {name}.class_path, "
                    f"{allowed(base)}, and its options below {name}.init_args."
                )
            self._check_object(base, loaded, name)
            for chosen in self.chosen.get(name, [])[-1:]:
                chosen.given |= kept
        elif (value is None and not takes_null(option_type)) or not _takes(option_type, value):
            if base is not None and not is_dataclass(base) and isinstance(value, str):
                raise no_class(base, value, name)
            raise wrong_value(option_type, value, name)

    def _check_object(self, base: type, value: Any, name: str) -> None:
        """Checks the name of a class, or a mapping with the name of a class and its options."""
        if isinstance(value, str):
            value = {"class_path": value} if not isfile(value) else read_file(value)
        if not isinstance(value, dict):
            raise wrong_value(base, value, name)
        if "class_path" in value:
            known = class_named(base, value["class_path"]) if isinstance(value["class_path"], str) else None
            if known is None or not issubclass(known, base) or is_abstract(known):
                raise no_class(base, value["class_path"], name)
            self.chosen.setdefault(name, []).append(Chosen(known))
        elif is_dataclass(base):
            self.chosen.setdefault(name, []).append(Chosen(base))
        if "class_path" in value or not is_dataclass(base):
            if outside := next((key for key in value if key not in OF_A_CLASS), None):
                raise UserError(
                    f"{name}.{outside} stands beside class_path. The options of a class stand below init_args."
                )
            value = value.get("init_args", {})
        for key, content in _options_in(value, f"{name}.init_args").items():
            self._check_option_of_class(base, name, str(key), content)


def holds_empty_section(value: Any) -> bool:
    """Whether a value from a file contains an empty mapping, which the parser ignores whatever its name."""
    if isinstance(value, Mapping):
        contents = [content for key, content in value.items() if content or key not in OF_A_CLASS]
        return not value or any(map(holds_empty_section, contents))
    return isinstance(value, list) and any(map(holds_empty_section, value))


def wrong_value(option_type: Any, value: Any, name: str) -> UserError:
    """The error for a value that an option does not accept."""
    hint = nearest(value, literal_choices(option_type)) if isinstance(value, str) else ""
    return UserError(f"{name} is {shown(value)}; it must be {allowed(option_type)}.{hint}")


def no_class(base: type, value: Any, name: str) -> UserError:
    """The error for a class that does not exist, or that an option does not accept."""
    known = class_named(base, value) if isinstance(value, str) else None
    if known is None:
        problem = f"There is no class {shown(value)}."
    elif issubclass(known, base):
        problem = f"{shown(value)} is what others are made from, and cannot be had itself."
    else:
        problem = f"{shown(value)} is no {base.__name__}."
    names = [other.__name__ for other in suggested_classes(base)]
    hint = nearest(value.rpartition(".")[2], names) if isinstance(value, str) and known is None else ""
    return UserError(f"{problem}{hint} {name} must be {allowed(base)}.")


def _options_in(value: Any, name: str) -> dict[Any, Any]:
    """The options that were given for a group as a whole."""
    value = _loaded(value)
    if isinstance(value, str) and isfile(value):
        value = read_file(value)
    if not isinstance(value, dict):
        raise UserError(f"{name} is {shown(value)}, but it is a group of options. Give these by their names.")
    return value


def _is_object(base: type, value: Any) -> bool:
    """Whether a value names a class, gives its options, or is a file that does."""
    return isinstance(value, dict) or (
        isinstance(value, str) and (class_named(base, value) is not None or isfile(value))
    )


def _loaded(value: Any) -> Any:
    """The YAML value of text from the command line that is written as a mapping or a list."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def _takes(option_type: Any, value: Any) -> bool:
    """Whether jsonargparse accepts a value for a type."""
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=option_type)
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True
