"""Rows of token ids, the form in which every data module holds its splits, and the batches made of them.

Shapes: N tokens in all, R rows in a split, B rows in a batch, T tokens in the longest of these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NotRequired, TypedDict, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qpruner.likelihood import IGNORED

FILLER = -1  # the number of an example that only keeps the ranks in step
SHORT, STEP = 64, 16  # up to SHORT tokens a batch is as wide as its longest row, beyond that a multiple of STEP wide


@final
class Batch(TypedDict):
    """The input of a LightningModule: B rows of T tokens, right-padded.

    The label at position t is the token *at* t, to be predicted from the positions before it; the first token of a row
    is never scored.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 1 on tokens, 0 on padding
    labels: Tensor  # [B, T] int64, IGNORED where nothing is scored
    num_bytes: Tensor  # [B] int64, bytes of text in the scored tokens; 0 where unknown
    example: Tensor  # [B] int64, number of the row's example in its split; FILLER where the row fills a shard
    step_tokens: NotRequired[Tensor]  # [] training: scored tokens of a micro-batch, mean over its optimizer step


@dataclass(frozen=True)
class Row:
    """One row: its token ids, which of them are targets, and the bytes of text of each token (zeros: unknown)."""

    tokens: np.ndarray  # [T] int32
    scored: np.ndarray  # [T] bool
    num_bytes: np.ndarray  # [T] int32

    def __getitem__(self, part: slice) -> "Row":
        return Row(self.tokens[part], self.scored[part], self.num_bytes[part])

    def ends_with(self, token: int) -> bool:
        return bool(len(self.tokens)) and int(self.tokens[-1]) == token

    @classmethod
    def join(cls, rows: Sequence["Row"]) -> "Row":
        return cls(
            tokens=np.concatenate([row.tokens for row in rows]),
            scored=np.concatenate([row.scored for row in rows]),
            num_bytes=np.concatenate([row.num_bytes for row in rows]),
        )


@dataclass(frozen=True)
class TokenRows:
    """The rows of a split laid end to end, so that they can be stored and memory-mapped as they are.

    Args:
        tokens: [N] int32, token ids.
        scored: [N] bool, whether a token is a target.
        num_bytes: [N] int32, bytes of text that a token stands for; zeros if unknown.
        offsets: [R + 1] int64, where each row begins; the last entry is N.
    """

    tokens: Tensor
    scored: Tensor
    num_bytes: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "TokenRows":
        rows = list(rows)
        lengths = np.array([0, *(len(row.tokens) for row in rows)], dtype=np.int64)
        return cls(
            tokens=_join((row.tokens for row in rows), np.int32),
            scored=_join((row.scored for row in rows), np.bool_),
            num_bytes=_join((row.num_bytes for row in rows), np.int32),
            offsets=torch.from_numpy(lengths.cumsum()),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:  # [R]
        return self.offsets.diff()

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest row; beyond it a model may have no positions."""
        return int(self.lengths.max()) if len(self) else 0

    @cached_property
    def scored_tokens(self) -> Tensor:
        """Number of targets in each row, without its first token, which nothing predicts."""  # [R] int64
        counts = torch.zeros(len(self), dtype=torch.int64)
        filled = self.lengths > 0
        if filled.any():
            firsts = self.offsets[:-1][filled]
            # Row by row, because a running sum over all tokens would take eight times as much memory as these flags.
            sums = np.add.reduceat(self.scored.numpy(), firsts.numpy(), dtype=np.int64)
            counts[filled] = torch.from_numpy(sums) - self.scored[firsts].long()
        return counts

    @property
    def num_scored(self) -> int:
        """Number of targets in all rows."""
        return int(self.scored_tokens.sum())

    def width(self, length: int) -> int:
        """The width of a batch whose longest row has ``length`` tokens.

        Long batches get one of a few widths: oneDNN compiles and keeps separate kernels for each shape of matrices, and
        the heap is fragmented into pieces that fit no other.
        """
        return max(length, min(round_up(length), self.longest))

    def pad(self, indices: Sequence[int], pad_token: int) -> Batch:
        """The rows with these numbers as a batch; a `FILLER` or an empty row becomes one unscored token."""
        bounds = [self.offsets[i : i + 2].tolist() if i != FILLER else (0, 0) for i in indices]
        rows = [slice(first, last) if first < last else slice(0, 0) for first, last in bounds]
        nothing = torch.tensor([pad_token])
        input_ids = [self.tokens[row].long() if row.stop else nothing for row in rows]
        labels = [
            tokens.where(self.scored[row], IGNORED) if row.stop else torch.full((1,), IGNORED)
            for row, tokens in zip(rows, input_ids, strict=True)
        ]
        for label in labels:
            label[0] = IGNORED
        num_bytes = [
            int(self.num_bytes[row][label != IGNORED].sum()) if row.stop else 0
            for row, label in zip(rows, labels, strict=True)
        ]
        longest = max(map(len, input_ids))
        missing = self.width(longest) - longest

        def together(parts: list[Tensor], value: int) -> Tensor:
            return F.pad(pad_sequence(parts, batch_first=True, padding_value=value), (0, missing), value=value)

        return Batch(
            input_ids=together(input_ids, pad_token),
            attention_mask=together([torch.ones_like(ids) for ids in input_ids], 0),
            labels=together(labels, IGNORED),
            num_bytes=torch.tensor(num_bytes),
            example=torch.tensor(list(indices)),
        )


def round_up(length: int) -> int:
    """The width of a batch whose longest row has ``length`` tokens: large widths are multiples of `STEP`."""
    return length if length <= SHORT else -(-length // STEP) * STEP


@dataclass(frozen=True)
class TextExamples:
    """Each row is an example."""

    rows: TokenRows
    pad_token: int

    def __len__(self) -> int:
        return len(self.rows)

    def num_scored(self, indices: Sequence[int]) -> int:
        return int(self.rows.scored_tokens[list(indices)].sum())

    def sizes(self) -> tuple[Tensor, Tensor]:
        return torch.ones(len(self), dtype=torch.int64), self.rows.lengths

    def width(self, length: int) -> int:
        return self.rows.width(length)

    def collate(self, indices: Sequence[int]) -> Batch:
        return self.rows.pad(indices, self.pad_token)


def _join(parts: Iterable[np.ndarray], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False))
