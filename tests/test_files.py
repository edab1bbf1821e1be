"""Files that are whole or not there, mistakes that name them, and hashes."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qpruner.errors import UserError
from qpruner.files import (
    check_place,
    hash_file,
    hash_json,
    read_json,
    reading,
    replacing,
    replacing_folder,
    write_json,
    writing,
)


def cut_off(place: AbstractContextManager[Path], begin: Callable[[Path], object]) -> None:
    """After half of the work."""
    with place as temporary:
        begin(temporary)
        raise InterruptedError


def test_a_file_takes_the_place_of_another_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(InterruptedError):
        cut_off(replacing(path), lambda temporary: temporary.write_text("ne"))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_folder_takes_the_place_of_another_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "old.txt").write_text("old")
    with pytest.raises(InterruptedError):
        cut_off(replacing_folder(folder), Path.mkdir)
    assert (folder / "deep" / "old.txt").read_text() == "old"
    (tmp_path / ".model.tmp").mkdir()  # as a process that was killed leaves it
    (tmp_path / ".model.tmp" / "half.txt").write_text("ha")
    with replacing_folder(folder) as temporary:
        temporary.mkdir()
        (temporary / "new.txt").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["new.txt"] and [*tmp_path.iterdir()] == [folder]


def test_a_folder_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are removed elsewhere, and it comes back where the new one cannot take its place."""
    folder, removed, replace = tmp_path / "model", list[Path](), os.replace
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, **options: removed.append(Path(path)))
        with replacing_folder(folder) as temporary:
            temporary.mkdir()
    assert folder not in removed and not [*folder.iterdir()]
    assert (tmp_path / ".model.old" / "old.txt").exists() and tmp_path / ".model.old" in removed

    def fail_for_new(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise PermissionError("in use")
        replace(source, target)

    (folder / "kept.txt").write_text("kept")
    monkeypatch.setattr(os, "replace", fail_for_new)
    with pytest.raises(PermissionError), replacing_folder(folder) as temporary:
        temporary.mkdir()
    assert (folder / "kept.txt").read_text() == "kept" and [*tmp_path.iterdir()] == [folder]


def test_a_folder_may_lie_in_one_that_is_not_there(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "models" / "x") as temporary:
        assert temporary.parent.is_dir()  # whose disk can be asked for its room
        temporary.mkdir()
    assert (tmp_path / "models" / "x").is_dir() and len([*(tmp_path / "models").iterdir()]) == 1


def test_json_comes_back_and_its_mistakes_name_file_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, None]})
    assert read_json(path) == {"ä": [1, None]} and "ä" in path.read_text(encoding="utf-8")
    path.write_text("{")
    with pytest.raises(UserError, match=r"^Cannot read '.*a.json': .*Make it again\.$"):
        read_json(path, remedy="Make it again.")
    with pytest.raises(UserError, match=r"Cannot read '.*b.json': .*Restore the file\.$"):
        read_json(tmp_path / "b.json")


def test_what_is_wrong_with_what_was_read_is_told_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^'.*a': bits must be a number\. Mend it\.$"),
        reading(tmp_path / "a", "Mend it."),
    ):
        raise UserError("bits must be a number.")
    with pytest.raises(UserError, match="KeyError: 'bits'"), reading(tmp_path, "Mend it.", errors=(KeyError,)):
        raise KeyError("bits")
    with pytest.raises(KeyError), reading(tmp_path, "Mend it."):  # ours, not the file's
        raise KeyError("bits")


def test_hashes_are_of_bytes_and_of_data_whatever_its_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_json({"b": 1, "a": [2]}) == hash_json({"a": [2], "b": 1}) != hash_json({"a": [2], "b": 2})
    assert hash_json({"a": 1}) == hashlib.sha256(json.dumps({"a": 1}).encode()).hexdigest()


def test_what_a_killed_process_was_writing_goes_with_the_next_write(tmp_path: Path) -> None:
    """Of this machine, and of processes that are gone."""
    path, machine = tmp_path / "a[1].txt", os.uname().nodename
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, running, elsewhere, other = (
        tmp_path / f".{name}.{machine_of}.{process}.tmp"
        for name, machine_of, process in (
            ("a[1].txt", machine, gone.pid),
            ("a[1].txt", machine, os.getppid()),
            ("a[1].txt", f"not-{machine}", gone.pid),
            ("a1.txt", machine, gone.pid),
        )
    )
    for temporary in (left, running, elsewhere, other):
        temporary.write_text("ha")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert {*tmp_path.iterdir()} == {path, running, elsewhere, other} and path.read_text() == "whole"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (RuntimeError("I/O error: x (os error 27)"), "File too large"),  # as libraries in Rust say it
        (OSError("4352 requested and 1744 written"), "No space left on device"),  # as NumPy says it
    ],
)
def test_a_lack_of_room_is_told_with_the_place_and_the_remedy(error: Exception, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^Cannot write '{tmp_path}': {told}\..* Take another\.$"):
        fail_in(writing(tmp_path, "Take another."), error)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "not yours"), RuntimeError("(os error 13)"), UserError("Something else (os error 28)")],
)
def test_other_errors_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught:
        fail_in(writing(tmp_path), error)
    assert caught.value is error


def fail_in(place: AbstractContextManager[None], error: Exception) -> None:
    with place:
        raise error


def test_places_are_checked_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = {*tmp_path.rglob("*")}
    for place, said in (
        ("file", "file' is no folder. Name another folder to write"),
        ("file/deep/out", "file' is no folder"),
        ("dangling", "dangling' is no folder"),
        ("dangling/out", "dangling' is no folder"),
        (300 * "x", "too long.* Name another folder to write"),
    ):
        with pytest.raises(UserError, match=rf"Cannot write into '{tmp_path / place}'.*{said}"):
            check_place(tmp_path / place)
    check_place(tmp_path)
    check_place(tmp_path / "new" / "deep")
    monkeypatch.chdir(tmp_path)
    check_place(Path("new"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for place in (tmp_path, Path("new/deep")):
        with pytest.raises(UserError, match=f"'{tmp_path}' may not be written"):
            check_place(place)
    assert {*tmp_path.rglob("*")} == before
