"""Reads records from local files or from a hub data set, and counts what it had to leave out."""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.files import hash_file, hash_json

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
NOT_UNICODE = "with half a surrogate pair, which is no Unicode text"
PARQUET_ROWS = 1000  # rows turned into Python objects at once
Record = dict[str, Any]


@dataclass
class Skipped:
    """Records left out, by reason, with where each reason first applied."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def __str__(self) -> str:
        parts = (f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in self.counts.items())
        return "; ".join(parts)


@dataclass(frozen=True)
class Source:
    """A place that records come from.

    Args:
        spec: a local file or folder (``.txt``, ``.jsonl``, ``.json``, each also as ``.gz``, and ``.parquet``), or a hub
            data set as ``NAME``, ``NAME@SPLIT`` or ``NAME:CONFIG@SPLIT``.
        split: the split of a hub data set when the spec names none.
    """

    spec: str
    split: str

    @property
    def files(self) -> list[Path]:
        """The local files, or an empty list for a hub data set."""
        path = Path(self.spec).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in SUFFIXES)
            if not found:
                raise UserError(f"The folder {self.spec!r} holds no {', '.join(SUFFIXES)} file.")
            return found
        if path.is_file():
            if _kind(path) not in SUFFIXES:
                raise UserError(f"Cannot read {self.spec!r}: give a {', '.join(SUFFIXES)} file (.gz too) or a folder.")
            return [path]
        looks_local = path.is_absolute() or self.spec.startswith((".", "~")) or _kind(path) in SUFFIXES
        if looks_local:
            raise UserError(f"There is no file or folder {self.spec!r}.")
        return []

    def fingerprint(self) -> str:
        """Changes when the content does; of the name of a local file only what it says of the format counts."""
        if files := self.files:
            return hash_json([[_kind(file), hash_file(file)] for file in files])
        return str(self._hub()._fingerprint)

    def records(self, skipped: Skipped) -> Iterator[tuple[str, Record]]:
        """Every record with the place it stands at; a text file is one record with the field ``text``.

        Raises:
            UserError: no such file or data set, or nothing in it.
        """
        files = self.files
        found = False
        for file in files:
            empty = True
            for where, record in _read(file, skipped):
                found, empty = True, False
                yield where, record
            if empty:
                skipped.add("file(s) without a record", file.name)
        if not files:
            for number, record in enumerate(self._hub()):
                found = True
                yield f"{self.spec} row {number}", record
        if not found:
            raise UserError(f"{self.spec!r} holds no records{f': {skipped}' if skipped.counts else ''}.")

    def _hub(self) -> Any:
        import datasets

        name, _, split = self.spec.partition("@")
        name, _, config = name.partition(":")
        try:
            return datasets.load_dataset(name, config or None, split=split or self.split)
        except Exception as error:  # the hub client raises many kinds, all of which mean the same to the user
            raise UserError(
                f"{self.spec!r} is no local file or folder, and the hub gave no such data set "
                f"({type(error).__name__}: {error}). Hub names are written NAME, NAME@SPLIT or NAME:CONFIG@SPLIT."
            ) from error


def _kind(path: Path) -> str:
    """The suffix that says what is inside, without ``.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> io.TextIOBase:
    # As Windows writes text, it may begin with a byte order mark and end its lines in two characters.
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="strict", newline=None)


def _read(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    try:
        match _kind(path):
            case ".txt":
                with _open(path) as file:
                    if text := file.read():
                        yield path.name, {"text": text}
            case ".jsonl":
                with _open(path) as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield from _parsed(line, f"{path.name} line {number}", skipped)
            case ".json":
                with _open(path) as file:
                    content = json.loads(file.read() or "[]")
                if not isinstance(content, list):
                    raise ValueError(f"it must hold a list of records, not a {type(content).__name__}")
                for number, record in enumerate(content):
                    yield from _checked(record, f"{path.name} record {number}", skipped)
            case ".parquet":
                import pyarrow.parquet

                with pyarrow.parquet.ParquetFile(path) as file:
                    records = (record for batch in file.iter_batches(PARQUET_ROWS) for record in batch.to_pylist())
                    for number, record in enumerate(records):
                        yield f"{path.name} row {number}", record
    except (ValueError, EOFError, OSError, zlib.error) as error:  # wrong UTF-8, JSON and parquet are ValueErrors
        raise UserError(
            f"Cannot read {str(path)!r}: {error}. It is damaged or not what its name says: .txt is UTF-8 text, .jsonl "
            f"has one record a line, .json is one list of records."
        ) from error


def _parsed(line: str, where: str, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        skipped.add("not JSON", where)
    else:
        yield from _checked(record, where, skipped)


def _checked(record: Any, where: str, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    if isinstance(record, dict):
        yield where, record
    else:
        skipped.add("not a record with named fields", where)


def is_unicode(text: str) -> bool:
    """Whether the text is whole characters; JSON may spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
