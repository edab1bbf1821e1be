"""The parser of the commands: errors of ours, no abbreviations, and options that YAML can hold."""

from enum import Enum, StrEnum

import pytest
import yaml
from jsonargparse import ArgumentError, Namespace

from qpruner.errors import UserError
from qpruner.options.parser import LONGEST, CommandParser, plain


class Colour(StrEnum):
    RED = "red"


class Number(Enum):
    ONE = 1


def worker(speed: int = 3) -> None:
    """Works.

    Args:
        speed: number.
    """


class Work:
    """Has a method with options."""

    def search(self, trials: int = 3) -> None:
        """Searches.

        Args:
            trials: number.
        """


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser(prog="work")
    parser.add_function_arguments(worker)
    return parser


def test_what_would_end_the_program_is_an_error_of_the_user(parser: CommandParser) -> None:
    assert parser.parse_args(["--speed", "4"]).speed == 4
    with pytest.raises(UserError, match="speed") as caught:
        parser.parse_args(["--speed", "fast"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST
    with pytest.raises(UserError) as caught:
        parser.error("too long " * 200)
    assert len(str(caught.value)) <= LONGEST and str(caught.value).startswith("too long too long")


def test_a_mistake_that_a_class_named_itself_is_told_alone(parser: CommandParser) -> None:
    error = ValueError("all around it")
    error.__cause__ = UserError("The ratio is 2.")
    with pytest.raises(UserError, match=r"^The ratio is 2\.$"):
        parser.error("Problem with given class_path and so on", error)


def test_an_inner_parser_leaves_its_caller_to_try_something_else() -> None:
    inner = CommandParser(exit_on_error=False)
    inner.add_argument("--speed", type=int)
    with pytest.raises(ArgumentError):
        inner.parse_args(["--speed", "fast"])


def test_an_abbreviation_is_no_option(parser: CommandParser) -> None:
    with pytest.raises(UserError, match="--spee"):
        parser.parse_args(["--spee", "4"])


def test_options_of_a_method_have_no_group_of_its_name(parser: CommandParser) -> None:
    parser.add_argument("--search.depth", type=int)
    parser.add_method_arguments(Work, "search", None)
    given = parser.parse_args(["--trials", "5", "--search.depth", "2"])
    assert (given.trials, given.search.depth) == (5, 2)
    assert "search" not in parser.groups


def test_a_dump_is_yaml_that_can_be_read_again(parser: CommandParser) -> None:
    parser.add_argument("--rest")
    given = parser.get_defaults()
    given.rest = Namespace(colours=[Colour.RED, Namespace(colour=Colour.RED)])  # as of a class that has such options
    again = yaml.safe_load(parser.dump(given, skip_validation=True))
    assert again == {"speed": 3, "rest": {"colours": ["red", {"colour": "red"}]}}


def test_plain_is_a_copy() -> None:
    given = Namespace(colour=Colour.RED, number=Number.ONE, inner=Namespace(colours=[Colour.RED, 3]))
    copy = plain(given)
    assert type(copy.colour) is str and copy.number is Number.ONE
    assert [type(value) for value in copy.inner.colours] == [str, int] and copy.inner.colours == ["red", 3]
    assert given.colour is Colour.RED and type(given.inner.colours[0]) is Colour
