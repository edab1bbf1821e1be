"""The options of a class, and which classes a name or a type means."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import Strategy

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import Compression, KeepModel, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import TokenDataModule
from qpruner.options.classes import (
    Options,
    allowed,
    class_in,
    class_named,
    is_abstract,
    offered_classes,
    suggested_classes,
)  # fmt: skip


@dataclass
class Inner:
    """Inner.

    Args:
        depth: number.
    """

    depth: int = 3


class Shape:
    """Shape.

    Args:
        name: text.
        inner: group.
        sides: numbers.
        note: text or null.
    """

    def __init__(self, name: str, inner: Inner = Inner(), sides: Sequence[int] = (), note: str = None) -> None:  # type: ignore[assignment]  # noqa: B008
        pass


class Unfinished(ABC):
    @abstractmethod
    def area(self) -> float: ...


class AlsoUnfinished:
    """Leaves a method to others without saying so by its metaclass."""

    @abstractmethod
    def area(self) -> float: ...


class Square(Unfinished):
    def area(self) -> float:
        return 1.0


def test_options_of_a_class_and_what_of_them_must_be_given() -> None:
    options = Options.of_class(Shape)
    assert list(options.types) == ["name", "inner.depth", "sides", "note"]
    assert (options.types["name"], options.types["inner.depth"], options.types["sides"]) == (str, int, Sequence[int])
    assert options.required == {"name"}
    assert options.unset == {"note"}  # null is its default, whatever its type
    assert options.groups == ["inner"]


def test_options_of_a_parser_are_those_that_a_person_gives() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--restart", action="store_true")
    parser.add_class_arguments(Shape, "first")
    parser.add_class_arguments(Shape, "second")
    parser.add_argument("--thing", type=Square)
    parser.link_arguments("first.name", "second.name")
    options = Options.of_parser(parser)
    assert not [name for name in options.types if "help" in name or "-->" in name]
    assert options.types["restart"] is bool and options.types["first.inner.depth"] is int
    assert "first" not in options.types and options.groups == ["first", "first.inner", "second", "second.inner"]
    assert options.linked == {"second.name"}
    assert {"first.name"} <= options.required


def test_the_owner_of_an_option_is_the_class_above_it() -> None:
    options = Options({"data": TokenDataModule, "trainer.callbacks": list[Callback] | None, "seed": int},
                      frozenset(), frozenset(), frozenset())  # fmt: skip
    assert options.owner_of("data.num_train") == options.owner_of("data.loader.batch_size") == "data"
    assert options.owner_of("trainer.callbacks.ratio") == "trainer.callbacks"
    assert options.owner_of("seed.x") is options.owner_of("trainer.max_steps") is options.owner_of("seed") is None


@pytest.mark.parametrize(
    ("option_type", "inside"),
    [
        (Callback, Callback),
        (list[Callback] | None, Callback),
        (str | Sequence[Sequence[Square]], Square),
        (LoRAConfig, LoRAConfig),
        (int | list[str], None),
        (dict[str, int], None),
    ],
)
def test_the_class_in_a_type(option_type: Any, inside: type | None) -> None:
    assert class_in(option_type) is inside


def test_classes_by_their_names() -> None:
    assert class_named(Callback, "StructuredPruning") is StructuredPruning
    assert class_named(Callback, "EarlyStopping") is EarlyStopping
    assert class_named(Callback, "lightning.pytorch.callbacks.EarlyStopping") is EarlyStopping
    assert class_named(Unfinished, "Square") is Square
    # Also one that is no `base`, so that the mistake can be told; but only of those that people know.
    assert class_named(Callback, "StoriesDataModule") is StoriesDataModule
    assert class_named(Callback, "lightning.pytorch.Trainer") is Trainer
    assert class_named(Callback, "Trainer") is class_named(Callback, "Nothing") is None
    for path in ("nowhere.Trainer", "lightning.pytorch.Nothing", "lightning.pytorch.seed_everything", "a b.c", "."):
        assert class_named(Callback, path) is None


def test_people_are_offered_what_they_can_choose() -> None:
    names = {known.__name__ for known in offered_classes(Callback)}
    assert names == {"GridPolishing", "LoRAGuidedPruning", "MixedPrecisionQuantization", "StructuredPruning"}
    assert KeepModel not in offered_classes(Callback) and Compression not in offered_classes(Callback)
    assert {known.__name__ for known in offered_classes(TokenDataModule)} == {
        "InstructionDataModule", "StoriesDataModule", "TextDataModule"
    }  # fmt: skip
    assert offered_classes(Unfinished) == [Square]  # ours has none: any that can be made
    # What a word may mean is more: libraries have others, none of which is unfinished.
    suggested = suggested_classes(Callback)
    assert suggested[:4] == offered_classes(Callback) and EarlyStopping in suggested
    assert Compression not in suggested and len(set(suggested)) == len(suggested)


def test_a_class_is_abstract_where_a_method_is() -> None:
    assert is_abstract(Unfinished) and is_abstract(AlsoUnfinished) and is_abstract(Compression)
    assert not is_abstract(Square) and not is_abstract(StructuredPruning)


@pytest.mark.parametrize(
    ("option_type", "words"),
    [
        (int | None, "a whole number or null"),
        (LoRAConfig, "a mapping with r, alpha, dropout, target_modules, pooled"),
        (str | Accelerator, "one of auto, cpu, gpu, cuda"),
        (str | Strategy, "one of auto, ddp, fsdp2"),
        (TokenDataModule, "one of InstructionDataModule, StoriesDataModule, TextDataModule"),
        (list[Unfinished] | None, "one of Square"),
    ],
)
def test_what_is_allowed_in_words(option_type: Any, words: str) -> None:
    assert allowed(option_type) == words
