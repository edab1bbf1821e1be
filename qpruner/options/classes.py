"""Classes that options name, and the options of a parser or of a class."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from inspect import isabstract
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import Strategy

from qpruner import callbacks, datamodules
from qpruner.datamodules.base import TokenDataModule
from qpruner.options.words import in_words, is_class, item_type, listed, members

OURS = {name: getattr(package, name) for package in (callbacks, datamodules) for name in package.__all__}
"""Classes that the package offers for ``data`` and ``trainer.callbacks``."""
FOR_PEOPLE = (callbacks.Compression, TokenDataModule)
"""Base classes of what users choose from; the other callbacks are added by the commands."""
NAMES: dict[type, Sequence[str]] = {
    Accelerator: ("auto", "cpu", "gpu", "cuda"),
    Strategy: ("auto", "ddp", "fsdp2"),
}
"""Words that stand for objects of Lightning, as far as a fit supports them."""


@dataclass(frozen=True)
class Options:
    """The options of a parser or of a class.

    Args:
        types: type of each option, by its dotted name.
        required: names of the options that must be given.
        linked: names of the options that get their values from other options, so that a user need not give them.
        unset: names of the options whose default is null, so that null means unset for them, whatever their type.
    """

    types: Mapping[str, Any]
    required: frozenset[str]
    linked: frozenset[str]
    unset: frozenset[str]

    @classmethod
    def of_parser(cls, parser: ArgumentParser) -> "Options":
        # Without links, whose "option" is an arrow, without `--data.help` and the like, and without groups, which have
        # no type.
        actions = [
            action
            for action in parser._actions
            if all(option.startswith("-") for option in action.option_strings) and not action.dest.endswith("help")
        ]
        types = {action.dest: _type_of(action) for action in actions}
        # jsonargparse keeps required options that argparse does not know of, such as `data`, separately.
        required = {action.dest for action in actions if action.required} | getattr(
            parser, "_extra_required_keys", set()
        )
        links = getattr(getattr(parser, "_links_group", None), "_group_actions", ())
        return cls(
            {name: kind for name, kind in types.items() if kind is not None},
            frozenset(required),
            frozenset(link.dest.replace(".init_args.", ".") for link in links),
            frozenset(action.dest for action in actions if action.default is None and not action.required),
        )

    @classmethod
    def of_class(cls, of: type) -> "Options":
        parser: Any = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(of)
        return cls.of_parser(parser)

    @property
    def groups(self) -> list[str]:
        """Prefixes under which options are grouped: ``model``, ``model.lora``."""
        parts = [name.split(".") for name in self.types]
        return list(dict.fromkeys(".".join(part[:depth]) for part in parts for depth in range(1, len(part))))

    def owner_of(self, name: str) -> str | None:
        """The option whose class has the option of this name: ``data`` for ``data.num_train``."""
        *above, _ = name.split(".")
        owners = (".".join(above[:depth]) for depth in range(len(above), 0, -1))
        return next((owner for owner in owners if class_in(self.types.get(owner)) is not None), None)


def class_in(option_type: Any) -> type | None:
    """The class whose instances a type asks for, alone or in a list."""
    for member in members(option_type):
        if is_class(member):
            return member
        if (item := item_type(member)) is not None and (inside := class_in(item)):
            return inside
    return None


def class_named(base: type, name: str) -> type | None:
    """The class with a name or an import path, whether or not it is a ``base``; None where there is none."""
    if "." not in name:
        return {known.__name__: known for known in [*_with_subclasses(base), *OURS.values()]}.get(name)
    module, _, attribute = name.rpartition(".")
    try:
        known = resolve_name(f"{module}:{attribute}")
    except (ImportError, AttributeError, ValueError):
        return None
    return known if isinstance(known, type) else None


def offered_classes(base: type) -> list[type]:
    """The classes to list where a ``base`` is asked for: those of the package or, if it has none, any."""
    ours = [known for known in OURS.values() if issubclass(known, base) and _can_be_named(known)]
    return ours or [known for known in _with_subclasses(base) if not is_abstract(known)]


def suggested_classes(base: type) -> list[type]:
    """The classes that a misspelt name may mean: those that are offered, and others from libraries."""
    others = (known for known in _with_subclasses(base) if not (known.__name__ in OURS or is_abstract(known)))
    return [*offered_classes(base), *others]


def is_abstract(known: type) -> bool:
    """Whether a class leaves methods to subclasses, as far as it says so; not all that do are of `abc.ABCMeta`."""
    methods = (getattr(known, name, None) for name in dir(known))
    return isabstract(known) or any(getattr(method, "__isabstractmethod__", False) for method in methods)


def allowed(option_type: Any) -> str:
    """The values that an option allows, in words; classes by their names."""
    base = class_in(option_type)
    if base is None or is_dataclass(base):
        return in_words(option_type)
    if base in NAMES and str in members(option_type):
        return f"one of {listed(NAMES[base])}"
    return f"one of {listed(known.__name__ for known in offered_classes(base))}"


def _can_be_named(known: type) -> bool:
    """Whether a class is meant for users: not a part of the commands, nor a base class, nor built by a program."""
    if not issubclass(known, FOR_PEOPLE) or is_abstract(known):
        return False
    return not any("." in name for name in Options.of_class(known).required)  # parts of an object


def _with_subclasses(base: type) -> Iterator[type]:
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from _with_subclasses(child)


def _type_of(action: Any) -> Any:
    """The type of an option; None for a group."""
    return bool if action.nargs == 0 else getattr(action, "_typehint", action.type)
