"""Plain text: files or a hub data set, packed into blocks or with one document per row."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.cache import Prepared
from qpruner.datamodules.documents import NOT_UNICODE, Skipped, is_unicode
from qpruner.datamodules.rows import Row, TokenRows
from qpruner.datamodules.sources import Source
from qpruner.datamodules.splits import SPLITS, Split, SplitError, at_fault, hold_out, make_disjoint
from qpruner.datamodules.tokens import tokenize
from qpruner.errors import UserError, nearest

Layout = Literal["packed", "per_document"]


class TextDataModule(TokenDataModule):
    """Documents as language-model rows.

    Each split is a local file (text, JSON Lines, JSON, CSV, Parquet or Arrow; see `Source`), or a local folder or a hub
    data set given as ``NAME``, ``NAME@SPLIT`` or ``NAME:CONFIG@SPLIT``. If the files of a folder are named after
    splits, only the requested one is read. A split that is not given is taken from the folder that ``train`` names, if
    this has a usable one, and is otherwise held out of the training documents by their content. Documents that occur in
    two splits are removed from the earlier of the two, in the order of train, validation and test.

    Args:
        train: documents for fitting and calibration; needed by ``fit`` only.
        validation: documents for making choices.
        test: documents for reported results.
        layout: ``packed`` joins the documents with the tokenizer's end-of-text token and cuts them into rows of
            exactly ``max_length`` tokens (the rest is dropped); ``per_document`` gives each a row, truncated to
            ``max_length`` tokens.
        separator: text between two documents in a text file, such as ``<|endoftext|>``, or in the text of a record;
            without it a text file is one document, and so is a record. White space around a separated document is
            dropped.
        end_token: whether a ``per_document`` row that is not truncated ends with the end-of-text token, as a target;
            packed rows have it between documents.
        text_column: name of the field that holds the text of a record.
        held_out: share of the training documents for each split that is not given, in [0, 0.5); at 0 there is no such
            split.
        **kwargs: options of every data module; see `TokenDataModule`.

    Raises:
        UserError: no split given, or a split without a usable document.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        layout: Layout = "packed",
        separator: str | None = None,
        end_token: bool = False,
        text_column: str = "text",
        held_out: float = 0.05,
        **kwargs: Any,
    ) -> None:
        sources = named_sources(train=train, validation=validation, test=test, held_out=held_out)
        super().__init__(**kwargs)  # loads the tokenizer
        self.sources = sources
        self.layout = layout
        self.separator = separator
        self.end_token = end_token
        self.text_column = text_column
        self.held_out = held_out

    @property
    def protocol(self) -> str:
        return layout_protocol(self.layout, self.max_length)

    def options(self) -> dict[str, Any]:
        return {
            "sources": {split: source.fingerprint() for split, source in self.sources.items()},
            "named": [split for split, source in self.sources.items() if source.is_named],
            "layout": self.layout,
            "separator": self.separator,
            "end_token": self.end_token,
            "text_column": self.text_column,
            "held_out": self.held_out,
        }

    def build(self) -> Prepared:
        return without_useless_splits(type(self).__name__, self.sources, self._build)

    def _build(self, sources: Mapping[Split, Source]) -> Prepared:
        skipped = {split: Skipped() for split in sources}
        documents: dict[Split, list[str]] = {}
        for split in sources:
            with at_fault(split):
                documents[split] = list(self._documents(split, skipped[split]))
                if not documents[split]:
                    _, record = next(sources[split].records(Skipped()))
                    raise UserError(
                        f"{sources[split]} holds no usable text: {skipped[split]}. The text of a record is "
                        f"taken from the field that --data.init_args.text_column names."
                        + ("" if self.text_column in record else nearest(self.text_column, record))
                    )
        disjoint, repeated = make_disjoint(documents, str)
        texts = hold_out(disjoint, str, self.held_out)
        rows: dict[Split, TokenRows] = {}
        for split in texts:
            with at_fault(split):
                rows[split] = rows_of_text(
                    self.tokenizer,
                    texts[split],
                    layout=self.layout,
                    end_token=self.end_token,
                    max_length=self.max_length,
                    skipped=skipped.setdefault(split, Skipped()),
                )
        said = notes(type(self).__name__, skipped, repeated, rows, sources)
        return Prepared(rows, said + missing_end(self.tokenizer, unended_rows(self.layout, self.end_token)))

    def _documents(self, split: Split, skipped: Skipped) -> Iterator[str]:
        for where, record in self.sources[split].records(skipped):
            text = record.get(self.text_column)
            if not isinstance(text, str):
                fields = ", ".join(map(repr, record)) or "no field"
                instead = f"where it is {text!r:.40}" if self.text_column in record else f"with {fields}"
                skipped.add(f"without text in the field {self.text_column!r}", f"{where}, {instead}")
                continue
            if not is_unicode(text):
                skipped.add(NOT_UNICODE, where)
                continue
            pieces = [piece.strip() for piece in text.split(self.separator)] if self.separator else [text]
            kept = [piece for piece in pieces if piece.strip()]
            if not kept:
                skipped.add("empty", where)
            yield from kept


def named_sources(*, held_out: float, **specs: str | None) -> dict[Split, Source]:
    """The splits that the user named, and those that lie next to train in the folder that it names.

    Raises:
        UserError: none was named, a local one does not exist, or the share to hold out is not in [0, 0.5).
    """
    sources = {split: Source(spec, split) for split in SPLITS if (spec := specs[split]) is not None}
    if not sources:
        raise UserError("No data: give at least one of --data.init_args.train, .validation and .test.")
    if not 0 <= held_out < 0.5:
        raise UserError(f"held_out is {held_out}; it must be at least 0 and less than 0.5.")
    for source in sources.values():
        _ = source.files  # a path that does not exist is reported before anything is loaded
    beside = {split: sources["train"].sibling(split) for split in SPLITS if split not in sources and "train" in sources}
    return sources | {split: source for split, source in beside.items() if source is not None}


def without_useless_splits(
    name: str, sources: Mapping[Split, Source], build: Callable[[Mapping[Split, Source]], Prepared]
) -> Prepared:
    """Builds from the sources, without those that the user did not name if something is wrong with them.

    Raises:
        UserError: something is wrong with the others.
    """
    left_alone: list[str] = []
    while True:
        try:
            prepared = build(sources)
        except SplitError as error:
            at_fault = [split for split in error.splits if split in sources and not sources[split].is_named]
            if not at_fault:
                raise
            sources = {split: source for split, source in sources.items() if split not in at_fault}
            left_alone += [f"{name}: {split}: left alone what the folder has of it. {error}" for split in at_fault]
        else:
            return replace(prepared, notes=(*left_alone, *prepared.notes))


def rows_of_text(
    tokenizer: Any, texts: list[str], *, layout: Layout, end_token: bool, max_length: int, skipped: Skipped
) -> TokenRows:
    """The documents as rows; one that is alone in a row and has fewer than two tokens predicts nothing and is skipped.

    Raises:
        UserError: in the packed layout, too few tokens to fill a row; in the other, no document of two tokens.
    """
    documents = tokenize(tokenizer, texts, special_tokens=True)
    if layout == "per_document":
        rows: list[Row] = []
        for text, row in zip(texts, documents, strict=True):
            if len(row.tokens) > 1:
                rows.append((ended(row, tokenizer.eos_token_id) if end_token else row)[:max_length])
            else:
                skipped.add("with fewer than 2 tokens", repr(text[:40]))
        if not rows:
            raise UserError(f"None of {len(texts)} document(s) has the 2 tokens that a row needs. Give more text.")
        return TokenRows.of(rows)
    stream = _join_documents(documents, tokenizer.eos_token_id)
    num_rows = len(stream.tokens) // max_length
    if num_rows == 0:
        raise UserError(
            f"{len(texts)} document(s) with {len(stream.tokens)} tokens in all do not fill one row of {max_length}. "
            f"Give more text, a smaller --data.init_args.max_length, or --data.init_args.layout per_document."
        )
    return TokenRows.of(stream[start : start + max_length] for start in range(0, num_rows * max_length, max_length))


def ended(row: Row, end_token: int | None) -> Row:
    """The row with the end-of-text token as a last target, which teaches the model to stop."""
    if end_token is None:
        return row
    body = row[:-1] if row.ends_with(end_token) else row  # a tokenizer may add the token itself, but not as a target
    return Row(
        np.append(body.tokens, np.int32(end_token)),
        np.append(body.scored, True),
        np.append(body.num_bytes, np.int32(0)),
    )


def layout_protocol(layout: Layout, max_length: int) -> str:
    if layout == "packed":
        return f"packed rows of {max_length} tokens, stride {max_length}, first token of a row not scored"
    return f"one document a row, cut at {max_length} tokens, first token of a row not scored"


def notes(
    name: str,
    skipped: dict[Split, Skipped],
    repeated: dict[Split, int],
    rows: dict[Split, TokenRows],
    sources: Mapping[Split, Source],
) -> tuple[str, ...]:
    """What the user should know about how the splits were made."""
    lines = [f"{name}: {split}: {source.selection}" for split, source in sources.items() if source.selection]
    lines += [
        f"{name}: {split}: {len(rows[split]):,} rows, {len(rows[split].tokens):,} tokens"
        for split in SPLITS
        if split in rows
    ]
    lines += [f"{name}: {split}: skipped {left_out}" for split, left_out in skipped.items() if left_out.counts]
    lines += [
        f"{name}: {split}: left out {count:,} that also stand in a later split"
        for split, count in repeated.items()
        if count
    ]
    return tuple(lines)


def unended_rows(layout: Layout, end_token: bool) -> str | None:
    """What lacks an end if the tokenizer has no end-of-text token; None if no such token was asked for."""
    if layout == "packed":
        return "documents follow each other in a row with nothing between them"
    return "no row ends with one" if end_token else None


def missing_end(tokenizer: Any, unended: str | None) -> tuple[str, ...]:
    """What the user should know if rows are to be ended but the tokenizer has no token for that."""
    if unended is None or tokenizer.eos_token_id is not None:
        return ()
    return (
        f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token: {unended}, and the model is not taught "
        f"where a text ends.",
    )


def _join_documents(documents: Iterator[Row], end_token: int | None) -> Row:
    parts: list[Row] = []
    for row in documents:
        if parts and end_token is not None and not parts[-1].ends_with(end_token):  # a tokenizer may add it itself
            parts.append(Row(np.array([end_token], np.int32), np.array([True]), np.array([0], np.int32)))
        parts.append(row)
    return Row.join(parts)
