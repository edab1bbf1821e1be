"""Converts text to rows of tokens, with the number of bytes of text that each token stands for."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qpruner.datamodules.rows import Row
from qpruner.errors import UserError
from qpruner.files import hash_json

# A tokenizer needs about 200 bytes for each character passed in one call, and uses a single thread per text.
BATCH = 1_000_000  # characters passed to the tokenizer at once
WINDOW = 100_000  # characters after which a text is continued in another piece
OVERLAP = 5_000  # characters that a piece shares with the next one
AGREEMENT = 32  # tokens on either side of a seam that must be the same in both pieces


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    special_tokens: bool,
    scored_from: Sequence[Sequence[tuple[int, int]] | None] = (),
) -> Iterator[Row]:
    """A row for each text.

    Long texts are tokenized in overlapping pieces that are joined where they agree; the tokens are those of the whole
    text.

    Args:
        tokenizer: tokenizer of transformers; with a slow one (no offsets) the bytes are unknown.
        texts: texts to tokenize, each into one row.
        special_tokens: whether the tokenizer adds its special tokens to a text, such as ``<s>`` at its start.
        scored_from: for each text the character spans that are targets, None for all of the text; empty if all of every
            text is a target.

    Raises:
        UserError: spans are given and the tokenizer provides no offsets.
    """
    fast = bool(tokenizer.is_fast)
    if not fast and any(spans is not None for spans in scored_from):
        raise UserError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand, and only a part of the text is "
            f"to be scored. Use a fast tokenizer (one with a tokenizer.json), or --data.init_args.response_only false."
        )
    starts = [range(0, max(len(text) - OVERLAP, 1), WINDOW) if fast else range(1) for text in texts]
    stretches = (
        text if len(begin) == 1 else text[start : start + WINDOW + OVERLAP]
        for text, begin in zip(texts, starts, strict=True)
        for start in begin
    )
    encoded = _encode(tokenizer, stretches, special_tokens)
    for number, (text, begin) in enumerate(zip(texts, starts, strict=True)):
        spans = scored_from[number] if scored_from else None
        pieces = [_row(*next(encoded), start, spans) for start in begin]
        yield _join(pieces, begin) or _row(*next(_encode(tokenizer, [text], special_tokens)), 0, spans)[0]


def bytes_per_token(text: str, offsets: np.ndarray) -> np.ndarray:
    """Number of UTF-8 bytes of ``text`` that each token adds to those covered by the tokens before it.

    Summing what is *added* counts every byte of the text once, although tokenizers may leave a space outside all
    tokens, or give the same offsets to several tokens of one character.

    Args:
        text: text that was tokenized.
        offsets: [T, 2] character spans of its tokens; empty spans for special tokens.
    """  # [T] int32
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    bytes_before = np.concatenate([[0], widths.cumsum()])
    return np.diff(bytes_before[_covered(offsets)], prepend=0).astype(np.int32)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash that changes when the tokenizer would give different tokens or lay out chats differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    if backend is not None:
        # Truncation and padding are mere state, which every call to the tokenizer sets.
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return hash_json([content, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])


def _encode(
    tokenizer: Any, texts: Iterable[str], special_tokens: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Each text with its token ids [T] int32 and, from a fast tokenizer, their character spans [T, 2] int64."""
    fast = bool(tokenizer.is_fast)
    for batch in in_batches(texts):
        encoded = tokenizer(
            batch, add_special_tokens=special_tokens, return_offsets_mapping=fast, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        for number, text in enumerate(batch):
            offsets = np.array(encoded["offset_mapping"][number], dtype=np.int64).reshape(-1, 2) if fast else None
            yield text, np.array(encoded["input_ids"][number], dtype=np.int32), offsets


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in order, in batches as large as a tokenizer should be given at once."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 100  # even an empty text takes memory
        if size > BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row(
    text: str, tokens: np.ndarray, offsets: np.ndarray | None, start: int, spans: Sequence[tuple[int, int]] | None
) -> tuple[Row, np.ndarray]:
    """The row of the piece ``text`` that begins at character ``start``, and where its tokens end, see `_covered`."""
    scored = np.ones(len(tokens), dtype=np.bool_)
    if offsets is None:
        return Row(tokens, scored, np.zeros(len(tokens), dtype=np.int32)), np.zeros(len(tokens), dtype=np.int64)
    if spans is not None:
        scored = _inside(offsets, start, spans)
    return Row(tokens, scored, bytes_per_token(text, offsets)), start + _covered(offsets)


def _join(pieces: Sequence[tuple[Row, np.ndarray]], starts: Sequence[int]) -> Row | None:
    """The pieces of a text, beginning at these characters, as one row; None if two do not agree at their seam.

    The seam lies in the middle of the overlap of two pieces, far from where either was cut off, and thus from anything
    that a tokenizer does differently at the start or the end of a text.
    """
    parts: list[Row] = []
    first = 0
    for (row, ends), (next_row, next_ends), start in zip(pieces, pieces[1:], starts[1:], strict=False):
        seam, next_seam = (int(np.searchsorted(e, start + OVERLAP // 2, side="right")) for e in (ends, next_ends))
        around = slice(seam - AGREEMENT, seam + AGREEMENT)
        next_around = slice(next_seam - AGREEMENT, next_seam + AGREEMENT)
        if (
            min(seam, next_seam) < AGREEMENT
            or not np.array_equal(row.tokens[around], next_row.tokens[next_around])
            or not np.array_equal(ends[around], next_ends[next_around])
        ):
            return None
        parts.append(row[first:seam])
        first = next_seam
    return Row.join([*parts, pieces[-1][0][first:]])


def _covered(offsets: np.ndarray) -> np.ndarray:
    """The furthest character at which a token or one before it ends; special tokens end at 0."""  # [T] int64
    return np.maximum.accumulate(offsets[:, 1]) if len(offsets) else np.empty(0, dtype=np.int64)


def _inside(offsets: np.ndarray, start: int, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens end in one of the spans; a token that straddles the start of a response thus belongs to it.

    The start of a token is not reliable: some tokenizers trim spaces off the offsets, which leaves nothing of a token
    of spaces. The end of a special token that the tokenizer added is 0.
    """
    ends = offsets[:, 1] + start
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        inside |= (ends > first) & (ends <= last)
    return inside & (offsets[:, 1] > 0)
