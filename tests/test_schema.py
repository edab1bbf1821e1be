"""Plain data as typed values, by hand; what does not fit is named."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from qpruner.errors import UserError
from qpruner.schema import Record, conform, read_as


@dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int, ...]
    share: float = 0.5

    def __post_init__(self) -> None:
        if not self.sizes:
            raise UserError("A part has sizes.")


@dataclass(frozen=True)
class Whole:
    kind: Literal["a", "b"]
    parts: list[Part]
    by_number: dict[int, bool]
    note: str | None


@dataclass(frozen=True)
class Kept(Record):
    remedy = "Make it again."

    parts: tuple[Part, ...]
    losses: dict[str, float]
    note: str | None = None


class Open(TypedDict):
    count: int
    names: NotRequired[Sequence[str]]


CONTENT: dict[str, Any] = {
    "kind": "a",
    "parts": [{"name": "x", "sizes": [1, 2], "share": 1}, {"name": "y", "sizes": [3]}],
    "by_number": {"7": True},
    "note": None,
}


def test_plain_data_become_what_the_type_says() -> None:
    assert conform(CONTENT, Whole) == Whole("a", [Part("x", (1, 2), 1.0), Part("y", (3,))], {7: True}, None)
    assert type(conform(3, float)) is float
    assert conform({"count": 1, "names": ["a"], "more": [2]}, Open) == {"count": 1, "names": ("a",), "more": [2]}
    assert conform({"x": [None]}, dict[str, Any]) == {"x": [None]}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    kept = Kept((Part("x", (1, 2)), Part("y", (3,))), {"a": 1.5, "b": math.inf, "c": -math.inf})
    kept.write(path)
    assert Kept.read(path) == kept
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["losses"] == {"a": 1.5, "b": "inf", "c": "-inf"}
    for damaged, said in (
        ({"parts": []}, "losses missing. Make it again."),
        ({"parts": [], "losses": {}, "remedy": "none"}, "remedy unknown. Make it again."),
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=re.escape(said)):
            Kept.read(path)
    path.unlink()
    with pytest.raises(UserError, match="kept.json.*Make it again"):
        Kept.read(path)


def test_numbers_that_json_does_not_have_are_text() -> None:
    assert conform("inf", float) == math.inf and conform("-inf", float) == -math.inf
    assert math.isnan(conform("nan", float))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("kind",), "c", "kind must be a or b, not 'c'."),
        (("kind",), [], "kind must be a or b, not []."),
        (("note",), 3, "note must be text, not 3."),
        (("parts",), {"x": 1}, "parts must be a list, not {'x': 1}."),
        (("parts", 1), "y", "parts[1] must be an object, not 'y'."),
        (("parts", 0, "sizes", 1), True, "parts[0].sizes[1] must be a whole number, not True."),
        (("parts", 0, "sizes", 1), 2.0, "parts[0].sizes[1] must be a whole number, not 2.0."),
        (("parts", 0, "sizes", 1), 2**63, "parts[0].sizes[1] must be a whole number, not 9223372036854775808."),
        (("parts", 0, "sizes"), [], "parts[0]: A part has sizes."),
        (("parts", 0, "share"), "1", "parts[0].share must be a number, not '1'."),
        (("parts", 0, "share"), False, "parts[0].share must be a number, not False."),
        (("parts", 0, "colour"), 1, "parts[0] is not as it should be: colour unknown."),
        (("by_number",), {"x": True}, "by_number must be a number, not 'x'."),
        (("by_number", "7"), 1, "by_number.7 must be true or false, not 1."),
    ],
)
def test_what_does_not_fit_is_named(place: tuple[Any, ...], value: Any, said: str) -> None:
    content = json.loads(json.dumps(CONTENT))
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        conform(content, Whole)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="^It is not as it should be: by_number, note missing.$"):
        conform({"kind": "a", "parts": []}, Whole)
    with pytest.raises(UserError, match="count missing"):
        conform({"names": []}, Open)


def test_a_long_value_is_told_in_short() -> None:
    with pytest.raises(UserError) as error:
        conform({"count": ["x" * 10_000] * 10_000}, Open)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b"[]", b'{"count": "1"}', b"\xef\xbb\xbf{}", None]
)
def test_a_file_that_holds_something_else_is_named_with_its_remedy(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "open.json"
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{re.escape(repr(str(path)))}: .* Make it anew\.$") as error:
        read_as(path, Open, remedy="Make it anew.")
    assert len(str(error.value)) < 500
