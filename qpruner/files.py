"""Writes files that are either complete or absent, even on a full disk, and computes hashes."""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpruner.errors import UserError, cut

MALFORMED = (OSError, ValueError, RecursionError)
"""Errors that opening, decoding or parsing a malformed file may raise."""


MAKE_ROOM = "Make room there, and go on with the same command."
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota that is used up, and a file that is larger than one may be."""


@contextmanager
def writing(place: Path, remedy: str = MAKE_ROOM) -> Iterator[None]:
    """Turns the error of a full disk into a `UserError` that names what was written and the remedy.

    Args:
        place: path of the file or folder that is written inside.
        remedy: what to do about a disk without room, as a sentence.

    Raises:
        UserError: there was no room; any other error stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (why := _lack_of_room(error)) is None:
            raise
        raise UserError(f"Cannot write {str(place)!r}: {why}. What is there is whole. {remedy}") from error


def _lack_of_room(error: BaseException | None) -> str | None:
    """The message on lack of disk space that caused an error; None for any other error.

    Libraries in Rust, such as safetensors and tokenizers, have the number of the system's error in their text alone,
    NumPy says how many of the items it has written, and Lightning's logger says something else, with its cause.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return os.strerror(error.errno)
        if (number := re.search(r"\(os error (\d+)\)", str(error))) and int(number[1]) in NO_ROOM:
            return os.strerror(int(number[1]))
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def check_place(folder: Path) -> None:
    """Makes sure, before the work for it, that a folder can be written, without making anything.

    Raises:
        UserError: the folder, or the nearest one above it that is there, is no folder or may not be written.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        why = "may not be written" if there.is_dir() else "is no folder"
    except OSError as error:  # such as too long a name
        raise UserError(f"Cannot write into {str(folder)!r} ({error}). Name another folder to write.") from error
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write into {str(folder)!r}: {str(there)!r} {why}. Name another folder to write.")


def _is_there(path: Path) -> bool:
    """Whether there is something at a path, be it a link to nothing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def replacing(path: Path, remedy: str = MAKE_ROOM) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to; what was written takes the place of ``path`` at the end.

    A process killed inside leaves ``path`` as it was, and a temporary file, which the next one that writes ``path``
    on this machine removes.

    Args:
        path: path of the file.
        remedy: what to do about a disk without room, as a sentence.

    Raises:
        UserError: the disk has no room; ``path`` is left as it was.
    """
    beginning = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(beginning)}*.tmp"):
        if not _runs(left.name.removeprefix(beginning).removesuffix(".tmp")):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{beginning}{os.getpid()}.tmp")
    try:
        with writing(path, remedy):
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether there may be a process of a number, on this machine; what is no number is another machine's affair."""
    if os.name == "nt" or not process.isdecimal():  # Windows has no signal that asks and does nothing else
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # of somebody else
        pass
    return True


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives the path of a folder to make beside ``folder``, which takes the place of ``folder`` at the end.

    The folder above is made if it is not there. A process killed inside leaves ``folder`` as it was; killed in the
    moment of the change, ``folder`` may be gone, but is never there in part.

    Raises:
        UserError: the disk has no room; ``folder`` is left as it was.
    """
    temporary, former = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("r+b") as file:
                        os.fsync(file.fileno())
            shutil.rmtree(former, ignore_errors=True)
            if folder.exists():
                os.replace(folder, former)  # at once, where removing its files takes a while
            try:
                os.replace(temporary, folder)
            except OSError:
                if former.exists():
                    os.replace(former, folder)
                raise
    finally:
        for remains in (temporary, former):
            shutil.rmtree(remains, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def reading(path: Path, remedy: str, errors: tuple[type[Exception], ...] = MALFORMED) -> Iterator[None]:
    """Turns any error in reading a file within the context into a `UserError` that names the file and the remedy.

    Args:
        path: path of the file, or of the folder where the mistake may lie in several.
        remedy: what to do about a file that is wrong, as a sentence.
        errors: classes of errors that mean that something is wrong with the file.

    Raises:
        UserError: one of these errors, or a `UserError`, was raised in reading.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{str(path)!r}: {cut(error, 500)} {remedy}") from error
    except errors as error:
        said = cut(error) if isinstance(error, MALFORMED) else f"{type(error).__name__}: {cut(error)}"
        raise UserError(f"Cannot read {str(path)!r}: {said.rstrip('.')}. {remedy}") from error


def read_json(path: Path, *, remedy: str = "Restore the file.") -> Any:
    """What a JSON file holds.

    Raises:
        UserError: there is no such file, or it is no JSON.
    """
    with reading(path, remedy):
        return json.loads(path.read_text(encoding="utf-8"))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of plain data, in hexadecimal; equal data have equal hashes, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
