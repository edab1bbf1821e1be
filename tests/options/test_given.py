"""Files of options: whatever is wrong with one is told before its options are."""

from pathlib import Path

import pytest

from qpruner.errors import UserError
from qpruner.options.given import GivenOption, config_files, read_arguments, read_file, shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty. It must hold options"),
        (b"# nothing\n", "is empty."),
        (b"- a\n- b\n", "holds a list. It must hold options by their names"),
        (b"hello\n", "holds only 'hello'."),
        (b"model:\n", "gives no value to any of its options (model)."),
        (b"model:\n\tbase: x\n", "is not YAML: line 2 is indented with a tab. Use spaces."),
        (b"model: [1, 2\n", "is not YAML: line 2, column 1: expected"),
        (b"model:\n  base: x\nmodel:\n  dtype: y\n", "names 'model' a second time in line 3"),
        (b"trainer:\n  callbacks:\n  - {a: 1, a: 2}\n", "names 'a' a second time in line 3"),
        (bytes(range(128, 256)), "is not text in UTF-8 (byte 1 is 0x80)."),
        (b"\0\1", "is not YAML: it holds characters that YAML forbids."),
    ],
)
def test_files_that_hold_no_options(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_file(str(file))
    assert str(caught.value).startswith(repr(str(file))) and said in str(caught.value)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=r"is a folder, and --config takes a file. Did you mean '.*config.yaml'\?"):
        read_file(str(tmp_path))
    with pytest.raises(UserError, match=r"no file '.*confg.yaml' for --config. Did you mean '.*config.yaml'\?"):
        read_file(str(tmp_path / "confg.yaml"))


def test_options_come_in_their_order_with_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {base: x}\n")
    arguments = ["--a.b=1=2", "--restart", "-c", str(file), "--c+", "-3", f"--config={file}"]
    of_file = GivenOption("model", {"base": "x"}, str(file))
    assert [*read_arguments(arguments, {"restart"})] == [
        GivenOption("a.b", "1=2"), of_file, GivenOption("c+", "-3"), of_file
    ]  # fmt: skip
    assert [*config_files(arguments)] == [str(file)] * 2


def test_long_values_are_cut() -> None:
    assert shown(None) == "null" and shown("x") == "'x'"
    assert len(shown("x" * 500)) == 60
