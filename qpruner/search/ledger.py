"""The ledger of a search: every trial is on disk before the next one is proposed.

The file holds one JSON record per line, rather than an SQLite database: it is only ever appended to, by one writer, so
a truncated record can only be the last one, and is dropped; a person can compare two ledgers side by side; and there is
no second format that needs a schema and migrations.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.files import reading, write_text

KIND, VERSION = "qpruner search ledger", 1
PACKAGES = ("qpruner", "torch", "nevergrad")

logger = logging.getLogger(__name__)

Key = dict[str, Any]
"""Plain data that fully determines what a trial evaluates, such as its choices, steps and seed."""

Scores = dict[str, Any]
"""Plain data that a trial measured: loss, perplexity, bytes, seconds."""


@dataclass(frozen=True)
class OptimizerRecord:
    """Which optimizer proposed the trials from a given one on, up to the next record of this kind.

    Args:
        name: name of the optimizer.
        first: number of the first trial that it proposed or will propose; it was told of all trials before.
        trials: number of trials of the whole search when the optimizer began; many optimizers plan for it.
        workers: number of trials proposed at a time when the optimizer began.
    """

    name: str
    first: int
    trials: int
    workers: int


@dataclass(frozen=True)
class TrialRecord:
    """What the ledger knows about one trial.

    Args:
        number: number of the trial, from 0, in the order in which trials were proposed.
        key: plain data that determines what the trial evaluates.
        told: number of trials whose scores the optimizer had been told when it proposed this one.
        point: point that the optimizer proposed, as plain data; None for a trial that no optimizer proposed.
        attempts: number of times that the trial was started.
        scores: what the trial measured; None while it runs and if it failed.
        why: reason why the trial failed; None while it runs and if it succeeded.
        repeats: number of the trial with the same key whose outcome this one took over; None if it ran itself.
    """

    number: int
    key: Key
    told: int
    point: Any = None
    attempts: int = 1
    scores: Scores | None = None
    why: str | None = None
    repeats: int | None = None

    @property
    def done(self) -> bool:
        return self.scores is not None or self.why is not None


class Ledger:
    """The trials of one search, in memory and on disk; `Ledger.open` creates or reads it.

    Only one process at a time may write it, which the lock of its folder ensures. Each record is a single write that
    has reached the disk when the method returns. Keys and scores are plain data: what JSON can hold, without NaN.

    Raises:
        UserError: see `open`; or a record cannot be written, for example because the disk is full.
        ValueError: a key or scores with NaN or an infinite number, or a record that cannot follow the others, such as a
            second outcome of a trial.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._trials: list[TrialRecord] = []
        self._optimizers: list[OptimizerRecord] = []
        self._outcomes: dict[str, int] = {}

    @classmethod
    def open(cls, path: Path, search: Mapping[str, Any]) -> "Ledger":
        """Creates a ledger, or reads the existing one.

        If the last record is truncated, it is removed from the file, with a warning in the log.

        Args:
            path: path of the file.
            search: plain data that identifies the search: its options.

        Raises:
            UserError: the file is not a ledger, has another version, belongs to another search, or is damaged before
                its last record.
        """
        ledger = cls(path)
        if not path.exists():
            header = {"kind": KIND, "version": VERSION, "search": search, "versions": _versions()}
            write_text(path, _line(header).decode())
            return ledger
        remedy = "Restore the file, or start a new search."
        with reading(path, remedy):
            *lines, torn = path.read_bytes().split(b"\n")
        ledger._check_header(lines[0] if lines else torn, plain(dict(search)))
        if not torn and len(lines) > 1 and _parse(lines[-1]) is None:
            torn = lines.pop()
        for number, line in enumerate(lines[1:], 2):
            entry = _parse(line)
            if entry is None:
                raise UserError(f"Line {number} of {str(path)!r} is damaged. {remedy}")
            try:
                ledger._apply(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"Line {number} of {str(path)!r} does not follow from those above it. {remedy}"
                ) from error
        if torn:
            logger.warning("The last record of %s was cut off, and is dropped.", path)
            os.truncate(path, sum(len(line) + 1 for line in lines))
        return ledger

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        return tuple(self._trials)

    @property
    def optimizers(self) -> tuple[OptimizerRecord, ...]:
        """The optimizers that proposed trials, in order; empty in a ledger of trials that no optimizer proposed."""
        return tuple(self._optimizers)

    def attempts(self, number: int) -> int:
        """Number of times that a trial was started; 0 for a trial that is not in the ledger."""
        return self._trials[number].attempts if number < len(self._trials) else 0

    def outcome_of(self, key: Key) -> TrialRecord | None:
        """The trial that evaluated this key, whether it succeeded or failed."""
        number = self._outcomes.get(identity(key))
        return None if number is None else self._trials[number]

    def begin(self, optimizer: OptimizerRecord) -> None:
        """Records which optimizer proposes the trials that are not there yet."""
        self._append({"record": "optimizer", **asdict(optimizer)})

    def start(self, number: int, key: Key, told: int, point: Any = None) -> None:
        """Records that a trial is about to run, for the first time or again."""
        self._append({"record": "started", "trial": number, "key": key, "told": told, "point": point})

    def finish(self, number: int, scores: Scores, repeats: int | None = None) -> None:
        self._append({"record": "finished", "trial": number, "scores": scores, "repeats": repeats})

    def fail(self, number: int, why: str, repeats: int | None = None) -> None:
        self._append({"record": "failed", "trial": number, "why": why, "repeats": repeats})

    def _append(self, entry: dict[str, Any]) -> None:
        line = _line(entry | {"time": datetime.now(UTC).isoformat(timespec="seconds")})
        self._apply(json.loads(line))
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError("it took only a part of a record; is the disk full?")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)  # so that no partial record is left for the next session to drop
                    raise
        except OSError as error:
            raise UserError(
                f"{str(self.path)!r} cannot be written ({error}). What it holds is safe: make room, and go on with the "
                f"same command."
            ) from error

    def _apply(self, entry: dict[str, Any]) -> None:
        kind = entry["record"]
        if kind == "optimizer":
            optimizer = OptimizerRecord(**{field.name: entry[field.name] for field in fields(OptimizerRecord)})
            _expect(isinstance(optimizer.name, str) and optimizer.first == len(self._trials))
            _expect(optimizer.trials > optimizer.first and optimizer.workers > 0)
            self._optimizers.append(optimizer)
            return
        number = entry["trial"]
        if kind == "started" and number == len(self._trials):
            _expect(isinstance(entry["key"], dict) and 0 <= entry["told"] <= number)
            self._trials.append(TrialRecord(number, entry["key"], entry["told"], entry["point"]))
            return
        _expect(0 <= number < len(self._trials))
        trial = self._trials[number]
        _expect(not trial.done)
        if kind == "started":
            _expect(entry["key"] == trial.key)
            trial = replace(trial, attempts=trial.attempts + 1)
        elif kind == "finished":
            _expect(isinstance(entry["scores"], dict))
            trial = replace(trial, scores=entry["scores"], repeats=entry["repeats"])
        else:
            _expect(kind == "failed")
            trial = replace(trial, why=str(entry["why"]), repeats=entry["repeats"])
        self._trials[number] = trial
        if trial.done:
            self._outcomes.setdefault(identity(trial.key), number)

    def _check_header(self, line: bytes, search: dict[str, Any]) -> None:
        header = _parse(line)
        if header is None or header.get("kind") != KIND or not isinstance(header.get("search"), dict):
            raise UserError(f"{str(self.path)!r} is no ledger of a search: its first line does not say so.")
        if header.get("version") != VERSION:
            raise UserError(
                f"{str(self.path)!r} has version {header.get('version')!r}; this qpruner reads version {VERSION}."
            )
        before, now = flat(header["search"]), flat(search)
        if before != now:
            listed = "\n".join(
                f"  {name}: was {before.get(name)!r}, is now {now.get(name)!r}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name) or (name in before) != (name in now)
            )
            raise UserError(
                f"{str(self.path)!r} belongs to a search with other options:\n{listed}\nContinue it with its own "
                f"options, or start a new search in another place."
            )
        if header.get("versions") != _versions():
            logger.warning("%s was begun with %s; here are %s.", self.path, header.get("versions"), _versions())


def _expect(true: bool) -> None:
    if not true:
        raise ValueError("This record does not follow from those before it.")


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """Plain data as it comes back from a file: tuples as lists, keys as text.

    Raises:
        TypeError: the data contain something that JSON cannot hold.
    """
    return json.loads(json.dumps(value))


def identity(key: Key) -> str:
    """Text that is the same for equal keys, regardless of the order of their entries."""
    return json.dumps(key, sort_keys=True)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested plain data, by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return leaves


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}
