"""What was parsed and nobody can use: nulls and unfinished classes, wherever they lie."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from jsonargparse import Namespace

from qpruner.errors import UserError
from qpruner.options.classes import Options
from qpruner.options.parsed import check_parsed


@dataclass
class Inner:
    """Inner.

    Args:
        depth: number.
        limit: number or null.
    """

    depth: int = 3
    limit: int | None = None


class Shape(ABC):
    """Shape."""

    @abstractmethod
    def area(self) -> float: ...


class Box(Shape):
    """Box.

    Args:
        width: number.
        inner: group.
        parts: shapes.
    """

    def __init__(self, width: float, inner: Inner, parts: Sequence[Shape] = ()) -> None:
        pass

    def area(self) -> float:
        return 1.0


HERE = __name__


def box(depth: int | None = 3, **options: Any) -> Namespace:
    """As it is parsed: with all of its options."""
    inner = Namespace(depth=depth, limit=None)
    return Namespace(
        class_path=f"{HERE}.Box", init_args=Namespace(**{"width": 1.0, "inner": inner, "parts": []} | options)
    )


def options(unset: tuple[str, ...] = (), **types: Any) -> Options:
    return Options(types, frozenset(), frozenset(), frozenset(unset))


@pytest.mark.parametrize(
    ("option_type", "value"),
    [
        (int, 3),
        (int | None, None),
        (Any, None),
        (list[int], []),
        (list[int | None], [1, None]),
        (Shape, box()),
        (list[Shape] | None, [box(), box(parts=[box()])]),
        (Shape, Namespace(class_path="nowhere.Box", init_args=Namespace(width=None))),  # others know what it takes
        (list[Inner], [Namespace(depth=1, limit=None)]),
    ],
)
def test_what_can_be_used_passes(option_type: Any, value: Any) -> None:
    check_parsed(options(x=option_type), Namespace(x=value))


@pytest.mark.parametrize(
    ("option_type", "value", "said"),
    [
        (int, None, "x is null; it must be a whole number."),
        (list[int], [1, None], "x is null; it must be a whole number."),
        (list[list[int]], [[1], [None]], "x is null; it must be a whole number."),
        (list[int] | int, None, "x is null; it must be a list of whole numbers or a whole number."),
        (Inner, Namespace(depth=None), "x.depth is null; it must be a whole number."),
        (list[Inner], [Namespace(depth=2), Namespace(depth=None)], "x.depth is null; it must be a whole number."),
        (Shape, box(width=None), "x.width is null; it must be a number."),
        (list[Shape], [box(), box(depth=None)], "x.inner.depth is null; it must be a whole number."),
        (Shape, box(parts=[box(width=None)]), "x.parts.width is null; it must be a number."),
        (Shape, box(parts=[None]), "x.parts is null; it must be one of Box."),
        (Shape, Namespace(class_path=f"{HERE}.Shape"), "'Shape' is what others are made from, and cannot be"),
        (list[Shape], [box(parts=[Namespace(class_path=f"{HERE}.Shape")])], "itself. x.parts must be one of Box."),
    ],
)  # fmt: skip
def test_what_cannot_is_named_with_its_place(option_type: Any, value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_parsed(options(x=option_type), Namespace(x=value))
    assert said in str(caught.value)


def test_null_may_mean_nothing_else_where_it_is_the_default() -> None:
    check_parsed(options(unset=("x",), x=int), Namespace(x=None))
    with pytest.raises(UserError, match="y is null"):
        check_parsed(options(unset=("x",), x=int, y=int), Namespace(x=None, y=None))


def test_what_comes_before_a_name_is_told() -> None:
    with pytest.raises(UserError, match=r"^above\.x is null"):
        check_parsed(options(x=int), {"x": None}, "above.")
