"""Files that are either whole or not there, and the hashes that tell them apart."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpruner.errors import UserError, cut

MALFORMED = (OSError, ValueError, RecursionError)
"""What opening, decoding and parsing a file that is not as it should be may raise."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to; what was written takes the place of ``path`` at the end.

    A process killed inside leaves ``path`` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives the path of a folder to make beside ``folder``, which takes the place of ``folder`` at the end.

    The folder above is made if it is not there. A process killed inside leaves ``folder`` as it was; killed in the
    moment of the change, ``folder`` may be gone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def reading(path: Path, remedy: str, errors: tuple[type[Exception], ...] = MALFORMED) -> Iterator[None]:
    """Makes of whatever is wrong with a file that is read inside a mistake that names the file and its remedy.

    Args:
        path: path of the file, or of the folder where the mistake may lie in several.
        remedy: what to do about a file that is wrong, as a sentence.
        errors: classes of errors that mean that something is wrong with the file.

    Raises:
        UserError: one of these, or a mistake in what was read.
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
