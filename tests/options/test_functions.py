"""Commands that are functions, by a function that writes down what it was called with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from qpruner.errors import UserError
from qpruner.options.functions import run_function, run_one_of

Call = Callable[..., dict[str, Any]]


@pytest.fixture
def call() -> Call:
    """What a function is called with for a command line."""

    def called(*arguments: str) -> dict[str, Any]:
        got: list[dict[str, Any]] = []

        def work(
            source: Path,
            *,
            base: str,
            trusted: bool = False,
            how: Literal["fast", "well"] = "well",
            round_to: int | None = None,
            leave_alone: list[int] | None = None,
        ) -> None:
            """Does a work.

            All of it.

            Args:
                source: file to read.
                base: model.
                trusted: whether code may run.
                how: to do it.
                round_to: multiple of widths.
                leave_alone: layers.
            """
            got.append(
                {"source": source, "base": base, "trusted": trusted, "how": how, "round_to": round_to}
                | {"leave_alone": leave_alone}
            )

        run_function("qpruner work", work, arguments)
        return got[0]

    return called


DEFAULTS = {"trusted": False, "how": "well", "round_to": None, "leave_alone": None}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--trusted"], {"trusted": True}),
        (["--trusted", "false"], {"trusted": False}),
        (["--trusted=true", "--how", "fast"], {"trusted": True, "how": "fast"}),
        (["--round-to", "16"], {"round_to": 16}),
        (["--round_to=-1"], {"round_to": -1}),
        (["--round_to", "-1", "--trusted"], {"round_to": -1, "trusted": True}),
        (["--leave-alone", "0", "3", "--how=fast"], {"leave_alone": [0, 3], "how": "fast"}),
        (["--leave_alone", "[0, 3]"], {"leave_alone": [0, 3]}),
        (["--leave_alone"], {"leave_alone": []}),
    ],
)
def test_options_as_they_may_be_given(call: Call, arguments: list[str], given: dict[str, Any]) -> None:
    expected = {"source": Path("a.json"), "base": "7", **DEFAULTS, **given}
    assert call("a.json", "--base", "7", *arguments) == expected
    assert call("--base=7", "a.json", *arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: source, base. `qpruner work --help` explains all."),
        (["a"], "required: base. "),
        (["a", "b", "--base", "7"], "unrecognized arguments: b. "),
        (["a", "--bse", "7"], "There is no option '--bse'. Did you mean '--base'?"),
        (["a", "--base"], "--base needs a value: text."),
        (["a", "--base=7", "--how", "fst"], "--how is 'fst'; it must be one of fast, well. Did you mean 'fast'?"),
        (["a", "--base=7", "--round-to", "x"], "--round_to is 'x'; it must be a whole number or null."),
        (["a", "--base=7", "--leave-alone", "1", "x"], "--leave_alone is '[1, x]'; it must be a list of whole numbers"),
        (["a", "--base=7", "--trusted=perhaps"], "--trusted is 'perhaps'; it must be true or false."),
    ],
)
def test_mistakes_are_told_in_a_line(call: Call, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_help_is_the_docstring(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call("--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Does a work." in said and "All of it." in said and "Args:" not in said
    assert "multiple of widths." in said and "--how {fast,well}" in said


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["a"], (["a"], None, 1)),
        (["a b", "c: d,e", "--number", "2", "[f]", "7"], (["a b", "c: d,e", "[f]", "7"], None, 2)),
        (["--number=2", "a", "--names", "1", "x, y", "QPruner^3 é"], (["a"], ["1", "x, y", "QPruner^3 é"], 2)),
    ],
)
def test_a_list_takes_all_words(arguments: list[str], given: tuple[list[str], list[str] | None, int]) -> None:
    got: list[Any] = []

    def work(sources: list[Path], *, names: list[str] | None = None, number: int = 1) -> None:
        got.append((sources, names, number))

    run_function("qpruner work", work, arguments)
    assert got == [([*map(Path, given[0])], given[1], given[2])]
    with pytest.raises(UserError, match="required: sources"):
        run_function("qpruner work", work, ["--number", "3"])


def test_a_list_of_words_is_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    def work(sources: list[Path]) -> None:
        """Does a work.

        Args:
            sources: files to read.
        """

    with pytest.raises(SystemExit):
        run_function("qpruner work", work, ["--help"])
    said = capsys.readouterr().out
    assert "SOURCES..." in said and "files to read." in said and "LIST_OF_PATHS" not in said


def test_the_first_word_names_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    def first(number: int) -> None:
        """Says a number."""
        print("first", number)

    def second() -> None:
        """Says nothing.

        Or nearly.
        """
        print("second")

    functions = {"first": first, "second": second}
    run_one_of("qpruner both", functions, "Two of them.", ["first", "3"])
    run_one_of("qpruner both", functions, "Two of them.", ["second"])
    assert capsys.readouterr().out == "first 3\nsecond\n"
    with pytest.raises(SystemExit):
        run_one_of("qpruner both", functions, "Two of them.", ["--help"])
    said = capsys.readouterr().out
    assert "Two of them." in said and "Says nothing." in said and "Or nearly" not in said
    for arguments, told in (
        (["secnd"], "no command 'secnd' of qpruner both. Did you mean 'second'? It is one of first, second; "),
        ([], "qpruner both needs a command. It is one of first, second; `qpruner both --help` explains them."),
    ):
        with pytest.raises(UserError) as caught:
            run_one_of("qpruner both", functions, "Two of them.", arguments)
        assert told in str(caught.value)
