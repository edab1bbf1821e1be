"""A source of records: a local file, one split of a local folder, or one of a hub data set."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qpruner.datamodules.documents import READABLE, Record, Skipped, kind, read_file, without_padding
from qpruner.datamodules.layout import Layout, read_layout
from qpruner.datamodules.splits import Split
from qpruner.errors import UserError
from qpruner.files import hash_file, hash_json

SPLIT_AND_SLICE = re.compile(r"(?P<split>[^\[\]]*)(?P<slice>\[.*\])?")


@dataclass(frozen=True)
class Place:
    """Where a spec points to on this machine.

    Args:
        path: file or folder that holds the records.
        config: data set in the folder, if the spec names one.
        split: split of the data set, if the spec names one.
        slice: part of the split, such as ``[:10%]``; empty for all of it.
    """

    path: Path
    config: str | None = None
    split: str | None = None
    slice: str = ""


@dataclass(frozen=True)
class Source:
    """A place that records come from.

    Args:
        spec: spec of a local file (``.txt``, ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, each also as
            ``.gz``, ``.bz2``, ``.xz`` or ``.zst``, ``.parquet``, ``.arrow``, ``.feather``), or of a local folder or a
            hub data set as ``NAME``, ``NAME@SPLIT`` or ``NAME:CONFIG@SPLIT``.
        split: split to read if the spec names none.
        is_named: whether the user asked for this split; otherwise it only lies next to one that the user asked for.
    """

    spec: str
    split: Split
    is_named: bool = field(default=True, compare=False)

    @cached_property
    def place(self) -> Place | None:
        """Where the spec points to on this machine; None for a hub data set."""
        return find_place(self.spec)

    @cached_property
    def layout(self) -> Layout | None:
        """The files of a local folder; None for anything else, and if the ``datasets`` library must read the folder."""
        if self.place is None or not self.place.path.is_dir():
            return None
        return read_layout(self.place.path, self.place.config)

    @cached_property
    def files(self) -> list[Path] | None:
        """The local files; None if the ``datasets`` library loads the data.

        Raises:
            UserError: the files do not exist, are not readable or lack the split, or there are several data sets and
                none is named.
        """
        if self.layout is not None:
            return self.layout.files(self._split_of(self.layout))
        if self.place is None or self.place.path.is_dir():
            return None
        if self.place.split is not None:
            raise UserError(f"{str(self.place.path)!r} is a file, which has no splits. Give it without @.")
        if not kind(self.place.path):
            raise UserError(f"Cannot read {self.spec!r}: give a {READABLE}, or a folder. Unpack archives first.")
        return [self.place.path]

    def sibling(self, split: Split) -> "Source | None":
        """Another split of the same local folder, if the folder has it and the spec names no split."""
        if self.layout is None or self.place is None or self.place.split is not None or not self.layout.split(split):
            return None
        return Source(self.spec, split, is_named=False)

    @property
    def selection(self) -> str | None:
        """What is read of a local folder with splits, in readable form; None if all of the folder is read."""
        if self.layout is None or not self.layout.splits:
            return None
        return self.layout.describe(self._split_of(self.layout))

    def __str__(self) -> str:
        layout = self.layout
        return f"The split {self._split_of(layout)!r} of {self.spec!r}" if layout and layout.splits else repr(self.spec)

    def fingerprint(self) -> str:
        """A hash that changes with the content; of a local file's name only the parts for format and split count."""
        if self.place is None:
            with self._explained():
                return str(self._dataset()._fingerprint)
        files, chosen = self.files, [self.selection, self.place.slice]
        if files is None:  # the library decides which of them are read
            files = sorted(file for file in self.place.path.rglob("*") if file.is_file())
            chosen = [self.place.config, self.place.split or self.split, self.place.slice]
        content = [[kind(file), hash_file(file)] for file in files]
        return hash_json([*chosen, content] if any(chosen) else content)

    def records(self, skipped: Skipped) -> Iterator[tuple[str, Record]]:
        """Every record with its place in the source; a text file is one record with the field ``text``.

        Raises:
            UserError: there is no such file or data set, or it is empty.
        """
        records = self._library_records() if self.files is None else _read_files(self.files, skipped)
        if self.place is not None and self.place.slice:
            records = iter(take(self.place.slice, list(records)))
        is_empty = True
        for record in records:
            is_empty = False
            yield record
        if is_empty:
            raise UserError(f"{self} holds no records{f': {skipped}' if skipped.counts else ''}.")

    def _split_of(self, layout: Layout) -> str:
        """The folder's name for the split that is read; the empty name stands for files named after no split."""
        named = self.place and self.place.split
        if not layout.splits and not named:
            return ""  # all of the folder
        split = layout.split(named or self.split)
        if split is None:
            has = f"has {', '.join(layout.splits)}" if layout.splits else "holds only files that are named for none"
            raise UserError(
                f"{self.spec!r} has no split {named or self.split!r}: the folder {has}. Name one that it has as in "
                f"FOLDER@SPLIT, or give a file."
            )
        return split

    def _library_records(self) -> Iterator[tuple[str, Record]]:
        with self._explained():
            for number, record in enumerate(self._dataset()):
                yield f"{self.spec} row {number}", without_padding(record)

    def _dataset(self) -> Any:
        import datasets

        if self.place is not None:
            # Streamed, because the library's cache does not see that a local file has changed.
            name, config, split = str(self.place.path.absolute()), self.place.config, self.place.split or self.split
            return datasets.load_dataset(name, config, split=split, streaming=True)
        name, _, split = self.spec.partition("@")
        name, _, config = name.partition(":")
        return datasets.load_dataset(name, config or None, split=split or self.split)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the ``datasets`` library into a `UserError`."""
        try:
            yield
        except Exception as error:  # many kinds, all of which mean the same to the user
            on_hub = "is no local file or folder, and the hub gave no such data set"
            raise UserError(
                f"{self.spec!r} {'cannot be read as its README.md says' if self.place else on_hub} "
                f"({type(error).__name__}: {error.__cause__ or error}). Names of data sets are written NAME, "
                f"NAME@SPLIT or NAME:CONFIG@SPLIT."
            ) from error


def find_place(spec: str) -> Place | None:
    """Where a spec points to on this machine; None if it may be a hub data set.

    A path that exists is taken as it is, whatever characters it contains.

    Raises:
        UserError: the spec looks like a path, but nothing is there.
    """
    if (path := Path(spec).expanduser()).exists():
        return Place(path)
    name, at, asked = spec.rpartition("@")
    match = SPLIT_AND_SLICE.fullmatch(asked) if at else None
    name = name if match else spec
    split, part = (match["split"] or None, match["slice"] or "") if match else (None, "")
    if (path := Path(name).expanduser()).exists():
        return Place(path, None, split, part)
    folder, colon, config = name.rpartition(":")
    if colon and (path := Path(folder).expanduser()).is_dir():
        return Place(path, config, split, part)
    if path.is_absolute() or spec.startswith((".", "~")) or kind(Path(spec)) or kind(Path(name)):
        raise UserError(f"There is no file or folder {spec!r}.")
    return None


def take(part: str, records: list[tuple[str, Record]]) -> list[tuple[str, Record]]:
    """A slice of records, written as in the ``datasets`` library: ``[:10%]``, ``[100:200]``, ``[-5:]``.

    Raises:
        UserError: the slice is malformed, or beyond the records.
    """
    import datasets

    try:
        (place,) = datasets.ReadInstruction.from_spec(f"split{part}").to_absolute({"split": len(records)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{part!r} is no part of {len(records):,} record(s) ({error}). Write it as in FOLDER@train[:10%] or "
            f"FOLDER@train[100:200]."
        ) from error
    return records[place.from_ : place.to]


def _read_files(files: list[Path], skipped: Skipped) -> Iterator[tuple[str, Record]]:
    for file in files:
        is_empty = True
        for record in read_file(file, skipped):
            is_empty = False
            yield record
        if is_empty:
            skipped.add("file(s) without a record", file.name)
