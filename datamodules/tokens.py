"""Text to rows of tokens, with the bytes of text that each token stands for."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qpruner.datamodules.rows import Row
from qpruner.files import hash_json

CHUNK = 1000  # texts handed to the tokenizer at once, so that a large file needs no second copy of itself


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, special_tokens: bool, scored_from: Sequence[Sequence[tuple[int, int]]] = ()
) -> Iterator[Row]:
    """A row for each text.

    Args:
        tokenizer: a tokenizer of transformers; with a slow one (no offsets) the bytes are unknown.
        texts: what to tokenize.
        special_tokens: whether the tokenizer adds what it adds to a text, such as ``<s>`` at its start.
        scored_from: for each text the character spans that are targets; empty: all of every text.

    Raises:
        TypeError: spans are given and the tokenizer has no offsets.
    """
    fast = bool(tokenizer.is_fast)
    if scored_from and not fast:
        raise TypeError(f"{type(tokenizer).__name__} gives no character offsets, which scoring a part of a text needs")
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        encoded = tokenizer(
            chunk, add_special_tokens=special_tokens, return_offsets_mapping=fast, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        for number, (text, ids) in enumerate(zip(chunk, encoded["input_ids"], strict=True)):
            tokens = np.asarray(ids, dtype=np.int32)
            scored = np.ones(len(tokens), dtype=np.bool_)
            num_bytes = np.zeros(len(tokens), dtype=np.int32)
            if fast:
                offsets = np.asarray(encoded["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
                num_bytes = bytes_per_token(text, offsets)
                if scored_from:
                    scored = _inside(offsets, scored_from[start + number])
            yield Row(tokens, scored, num_bytes)


def bytes_per_token(text: str, offsets: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of ``text`` that each token adds to what the tokens before it cover.

    Summing what is *added* counts every byte of the text once, although tokenizers may leave a space outside every
    token, or give the several tokens of one character the same offsets.

    Args:
        text: the text that was tokenized.
        offsets: [T, 2] character spans of its tokens; empty spans for special tokens.
    """  # [T] int32
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    bytes_before = np.concatenate([[0], widths.cumsum()])
    covered = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else np.empty(0, dtype=np.int64)
    return np.diff(bytes_before[covered], prepend=0).astype(np.int32)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes when the tokenizer would give other tokens or another chat."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return hash_json([content, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])


def _inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens reach into one of the spans; a token that straddles a border belongs to the span it ends in."""
    ends = offsets[:, 1]
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        inside |= (ends > first) & (ends <= last) & (offsets[:, 0] < ends)
    return inside
