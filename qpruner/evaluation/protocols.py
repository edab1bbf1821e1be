"""Perplexity of a whole text by the named protocols of papers, so that numbers can be compared."""

import hashlib
import time
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor

from qpruner.datamodules.documents import NOT_UNICODE, Record, Skipped, is_unicode
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.rows import Row, TextExamples, TokenRows
from qpruner.datamodules.sources import Source
from qpruner.datamodules.tokens import tokenize
from qpruner.errors import UserError
from qpruner.processes import Processes
from qpruner.records.evaluation import TextScore
from qpruner.training.evaluation import evaluate

FIELDS = ("text", "sentence")
"""Fields that hold the text of a record: WikiText-2 and C4 have the first, the Penn Treebank of the hub the second."""


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows, and which of their tokens are scored.

    Disjoint windows follow each other; the first token of each is not scored, since nothing in its window predicts it,
    and tokens at the end of the text that do not fill a window are dropped. LLM-Pruner and the first version of
    LoRAPrune use such windows of 128 tokens; GPTQ, SparseGPT, Wanda and papers that compare with them use 2,048, or the
    maximum length of the model, such as 4,096.

    With a stride, each window begins that many tokens after the previous one, and scores only tokens that no earlier
    window has scored, so that each has at least ``length - stride`` tokens before it; the last window is shorter, and
    only the very first token of the text is not scored. Hugging Face's guide to perplexity uses this protocol. With the
    stride equal to the length the windows are disjoint, and the rest at the end is scored as well.

    Args:
        length: tokens in a window, at least 2.
        stride: tokens between the beginnings of two windows, in 1..length; None for disjoint windows.

    Raises:
        UserError: the length or the stride is out of range.
    """

    length: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"A window of {self.length} tokens has nothing to predict. Give a length of at least 2.")
        if self.stride is not None and not 1 <= self.stride <= self.length:
            raise UserError(
                f"The stride {self.stride:,} is not in 1..{self.length:,}: windows of {self.length:,} tokens would "
                f"{'leave tokens out' if self.stride > 0 else 'not move on'}. Give one in that range, or none for "
                f"disjoint windows."
            )

    @property
    def name(self) -> str:
        return f"{self.length:,} tokens, {'disjoint' if self.stride is None else f'stride {self.stride:,}'}"


@dataclass(frozen=True)
class WholeText:
    """A text before it is tokenized.

    Args:
        text: the text.
        source: human-readable origin of the text, with the SHA-256 of its UTF-8 bytes.
    """

    text: str
    source: str


@dataclass(frozen=True)
class Windows:
    """A text that was cut into windows by a protocol.

    Args:
        protocol: protocol that the text was cut by.
        rows: one row for each window.
        dropped: number of tokens at the end of the text that do not fill a window.
    """

    protocol: Protocol
    rows: TokenRows
    dropped: int

    @classmethod
    def of(cls, text: Row, protocol: Protocol) -> Self:
        """Cuts a text; with a stride the rows together hold ``length / stride`` times as many tokens as the text.

        Args:
            text: tokens of the whole text.
            protocol: protocol to cut the text by.

        Raises:
            UserError: the text is too short to fill a disjoint window, or to have a token to score.
        """
        total, length, stride = len(text.tokens), protocol.length, protocol.stride
        if total < (2 if stride else length):
            raise UserError(
                f"The text has {total:,} token(s), which do not fill a window of {2 if stride else length:,}. Give "
                f"more text{'' if stride else ', or a smaller length'}."
            )
        if stride is None:
            starts = range(0, total - length + 1, length)
            return cls(protocol, TokenRows.of(text[start : start + length] for start in starts), total % length)
        starts = range(0, max(total - length, 0) + stride, stride)
        rows = [_scored_from(text[start : start + length], length - stride if start else 0) for start in starts]
        return cls(protocol, TokenRows.of(rows), 0)


def read_text(spec: str, separator: str = "\n\n") -> WholeText:
    r"""Reads a text as papers do: the file as it is, or all records of a split joined, the empty ones included.

    LLM-Pruner joins the test split of WikiText-2 and the validation split of the Penn Treebank by ``\n\n``. SparseGPT
    does the same with WikiText-2, but joins the test split of the Penn Treebank and C4 by a space; of C4 it takes the
    first 1,100 documents of the first validation file, and of these the first 256 windows.

    Args:
        spec: local file or folder or hub data set, in the syntax of all data modules, such as
            ``wikitext:wikitext-2-raw-v1@test``; the split is ``test`` where none is named.
        separator: text between two records.

    Raises:
        UserError: there is no such source, a record has no text, or a record cannot be read; a text with gaps would
            give a number that is comparable with no other.
    """
    skipped = Skipped()
    texts = [_text_of(spec, where, record) for where, record in Source(spec, "test").records(skipped)]
    if skipped.counts:
        raise UserError(f"{spec!r} has records that cannot be read: {skipped}. Mend the file, or take them out.")
    text = separator.join(texts)
    joined = f", {len(texts):,} records joined by {separator!r}" if len(texts) > 1 else ""
    return WholeText(text, f"{spec}{joined}, SHA-256 of the text {hashlib.sha256(text.encode()).hexdigest()}")


def tokens_of(tokenizer: Any, text: str) -> Row:
    """The tokens of a whole text, tokenized at once, so that special tokens such as ``<s>`` are added only once.

    All papers named here do so; the special token is in the first window only.

    Args:
        tokenizer: transformers tokenizer.
        text: the text.
    """
    (row,) = tokenize(tokenizer, [text], special_tokens=True)
    return row


def score_text(
    model: Any,
    windows: Windows,
    *,
    name: str,
    source: str,
    pad_token: int,
    tokens_per_batch: int,
    device: torch.device,
    precision: Precision,
    processes: Processes | None = None,
    progress: bool = False,
) -> TextScore:
    """Perplexity of a text by a protocol; exact for any batch size and any number of processes.

    Args:
        model: causal language model, perhaps with adapters; it is moved to ``device`` and left there, in its original
            mode.
        windows: windows of the text.
        name: name of the text, such as ``wikitext2``.
        source: where the text comes from.
        pad_token: token id to pad the last window with.
        tokens_per_batch: maximum tokens in a batch; a longer window forms a batch of its own.
        device: device to compute on.
        precision: precision of the computation.
        processes: processes that share the windows; None for this one alone.
        progress: whether to show a progress bar.

    Raises:
        UserError: tokens or positions exceed what the model supports, or its weights do not fit on the device.
    """
    check_fits(model, windows)
    rank, world_size = (processes.rank, processes.world_size) if processes else (0, 1)
    examples = TextExamples(windows.rows, pad_token)
    loader = EvaluationLoader(examples, tokens=tokens_per_batch, rank=rank, world_size=world_size)
    since = time.perf_counter()
    results = evaluate(
        model,
        [loader],
        limit=len(loader),
        device=device,
        precision=precision,
        title=f"{name}, {windows.protocol.name}",
        progress=progress,
    )
    return TextScore(
        name=name,
        protocol=windows.protocol.name,
        tokens=int(results["tokens"]),
        perplexity=results["perplexity"],
        bits_per_byte=results.get("bits_per_byte"),
        source=source,
        seconds=time.perf_counter() - since,
        dropped=windows.dropped,
    )


def check_fits(model: Any, windows: Windows) -> None:
    """Makes sure that a model supports all tokens of a text, and their positions in the windows.

    Raises:
        UserError: a token or a position is out of its range.
    """
    config = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and windows.rows.longest > known:
        raise UserError(
            f"Windows of {windows.rows.longest:,} tokens are longer than the {known:,} positions that the model knows. "
            f"Give a length of at most {known:,}."
        )
    check_vocabulary(model, windows.rows.tokens, "The text has")


def check_vocabulary(model: Any, tokens: Tensor, who_has: str) -> None:
    """Makes sure that tokens are in the vocabulary of a model.

    Args:
        model: causal language model.
        tokens: token ids of any shape, at least one.
        who_has: beginning of the error message, which names what contains an unknown token.

    Raises:
        UserError: a token is outside the vocabulary.
    """
    size = model.config.get_text_config().vocab_size
    if (highest := int(tokens.max())) >= size:
        raise UserError(
            f"{who_has} the token {highest}, and the embedding of the model has {size:,} rows. Give the tokenizer that "
            f"the model was trained with."
        )


def _scored_from(window: Row, first: int) -> Row:
    return Row(window.tokens, np.arange(len(window.tokens)) >= first, window.num_bytes)


def _text_of(spec: str, where: str, record: Record) -> str:
    text = next((record[name] for name in FIELDS if isinstance(record.get(name), str)), None)
    if text is None:
        raise UserError(
            f"{spec!r}: {where} has no text in a field {' or '.join(map(repr, FIELDS))}, but "
            f"{', '.join(map(repr, record)) or 'no field'}. Rename the field that holds it, or give a text file."
        )
    if not is_unicode(text):
        raise UserError(f"{spec!r}: {where} is a record {NOT_UNICODE}. Mend it, or take it out.")
    return text
