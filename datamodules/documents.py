"""Reads the records of one file, whatever its format, and counts those that had to be left out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from qpruner.errors import UserError

TEXTUAL = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # each after one of the textual suffixes
READABLE = f"{', '.join((*TEXTUAL, *TABLES))} file (the textual ones also {', '.join(COMPRESSED)})"
MEANING = {
    ".txt": "is text in UTF-8",
    ".jsonl": "has one record in JSON a line, in UTF-8",
    ".ndjson": "has one record in JSON a line, in UTF-8",
    ".json": "is one list of records, or has one a line, in UTF-8",
    ".csv": "begins with the names of its fields and quotes fields with line ends and delimiters in them, in UTF-8",
    ".tsv": "begins with the names of its fields and quotes fields with line ends and tabs in them, in UTF-8",
    ".parquet": "is a table of Apache Parquet",
    ".arrow": "is a table of Apache Arrow",
    ".feather": "is a table of Apache Arrow",
}
UNREADABLE = (  # invalid UTF-8, JSON and tables are ValueErrors; pyarrow does not implement all features of tables
    ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, RecursionError, NotImplementedError,
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
DELIMITERS = ",;\t|"
NOT_UNICODE = "with half a surrogate pair, which is no Unicode text"
ROWS = 1000  # rows of a table that are turned into Python objects at once
Record = dict[str, Any]


@dataclass
class Skipped:
    """Records left out, by reason, with the place where each reason first applied."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def __str__(self) -> str:
        parts = (f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in self.counts.items())
        return "; ".join(parts)


def kind(path: Path) -> str:
    """The suffix that gives the format of a file, without that of a compression; empty if it cannot be read."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in TEXTUAL else ""
    return suffix if suffix in TEXTUAL + TABLES else ""


def read_file(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Every record of a file with its place in the file; a text file is one record with the field ``text``.

    Args:
        path: path of a file whose format `kind` knows.
        skipped: records left out, to which those of this file are added.

    Raises:
        UserError: the file is damaged, is not what its name says, or is only a pointer to the real file.
    """
    try:
        with path.open("rb") as start:
            if start.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{str(path)!r} is only a pointer to a file in Git LFS. Fetch it with `git lfs pull` there, or "
                    f"download the data set again."
                )
        yield from READERS[kind(path)](path, skipped)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"Cannot read {str(path)!r}: {str(error).rstrip('.')}. It is damaged or not what its name says: a "
            f"{kind(path)} file {MEANING[kind(path)]}."
        ) from error


def _open(path: Path) -> IO[str]:
    # Text written on Windows may begin with a byte order mark and end its lines in two characters.
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", errors="strict", newline=None)


def _open_bytes(path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow

            return pyarrow.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _read_text(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    with _open(path) as file:
        if text := file.read():
            yield path.name, {"text": text}


def _read_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    with _open(path) as file:
        yield from _parse_lines(file, path.name, skipped)


def _parse_lines(lines: Iterable[str], name: str, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                skipped.add("not JSON", where)
            else:
                yield from _checked(record, where, skipped)


def _read_json(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    with _open(path) as file:
        text = file.read()
    try:
        content = json.loads(text if text.strip() else "[]")
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):
            raise
        yield from _parse_lines(text.split("\n"), path.name, skipped)  # many JSON Lines files have this suffix
        return
    records = _records_of(content) if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f"it must hold a list of records, not a {type(records).__name__}")
    for number, record in enumerate(records):
        yield from _checked(record, f"{path.name} record {number}", skipped)


def _records_of(content: Record) -> list[Any]:
    """The records of a JSON object: a table by columns, as pandas and others write it, or else one record.

    Raises:
        ValueError: its records are nested more deeply.
    """
    columns = list(content.values())
    if any(map(_is_chat, columns)):
        return [content]
    for name, column in content.items():
        if isinstance(column, list) and any(isinstance(entry, dict) for entry in column):
            raise ValueError(
                f"it must hold a list of records, not a dict; if they are the list {name!r} in it, write that alone"
            )
    if columns and all(isinstance(column, dict) for column in columns):
        if all(name.isdigit() for name in content):  # records by number
            return columns
        if not all(name.isdigit() for column in columns for name in column):
            raise ValueError("it must hold a list of records, not a dict of them")
        columns = [list(column.values()) for column in columns]
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    return [content]


def _is_chat(column: Any) -> bool:
    return isinstance(column, list) and any(
        isinstance(entry, dict) and ("role" in entry or "from" in entry) for entry in column
    )


def _checked(record: Any, where: str, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    if isinstance(record, dict):
        yield where, record
    else:
        skipped.add("not a record with named fields", where)


def _read_csv(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """Records whose fields are all text; the delimiter is the likeliest one, judging by the line of field names."""
    csv.field_size_limit(sys.maxsize)  # a field may be a book
    with _open(path) as file:
        header = next(filter(str.strip, file), "")
        delimiter = "\t" if kind(path) == ".tsv" else _delimiter(header)
        # Strict, because otherwise a quote that is never closed would swallow the rest of the file.
        rows = csv.reader(chain([header], file), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(rows, [])]
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise ValueError(f"it has several fields of the name {twice[0]!r}")
        for number, row in enumerate(rows):
            where = f"{path.name} row {number}"
            if len(row) == len(names):
                yield where, dict(zip(names, row, strict=True))
            elif row:  # no blank line
                skipped.add("with another number of fields than names of fields", where)


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=unquoted.count)  # the first of them if the line has none


def _read_parquet(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _rows(file.iter_batches(ROWS), path.name)


def _read_arrow(path: Path, skipped: Skipped) -> Iterator[tuple[str, Record]]:
    """A stream, as ``datasets`` writes it, or a file with an index at its end, as Feather is."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as memory:
        if memory.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(memory)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            memory.seek(0)
            batches = iter(pyarrow.ipc.open_stream(memory))
        yield from _rows((part for batch in batches for part in _parts(batch)), path.name)


def _parts(batch: Any) -> Iterator[Any]:
    batch.validate(full=True)  # the format has no checksums, and a wrong offset would end the process
    return (batch.slice(start, ROWS) for start in range(0, len(batch), ROWS))


def _rows(batches: Iterable[Any], name: str) -> Iterator[tuple[str, Record]]:
    records = (record for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(records):
        yield f"{name} row {number}", without_padding(record)


def without_padding(record: Record) -> Record:
    """A record of a table without the null fields of its structs: each struct of a column has the fields of all."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(entry) for key, entry in value.items() if entry is not None}
        return [without(entry) for entry in value] if isinstance(value, list) else value

    return {name: without(value) for name, value in record.items()}


READERS: dict[str, Callable[[Path, Skipped], Iterator[tuple[str, Record]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}


def is_unicode(text: str) -> bool:
    """Whether the text is whole characters; JSON may hold half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
