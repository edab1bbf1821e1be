"""A teacher's outputs for training rows, stored in files that are memory-mapped.

The rows of a split are divided into parts, one file each, named by a hash of everything that the content depends on: a
pass that was killed resumes after its last complete file, and a second fit finds the files of the first.

Shapes: N scored tokens of a part or a batch, k tokens kept of each distribution, H hidden size.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpruner.datamodules.loader import ResumableLoader, fill_batches
from qpruner.datamodules.rows import Batch, TextExamples
from qpruner.errors import UserError
from qpruner.files import MALFORMED, hash_json, reading, replacing
from qpruner.likelihood import Head, Scored
from qpruner.training.distillation import Lesson, likeliest, truncated_kl

FORMAT = 1  # incremented when the same content would be written differently
PART_BYTES = 2**26
"""Approximate size of a part, in bytes: the most that a killed pass loses, and what recording holds in memory."""
TOKENS_AT_ONCE = 4096
"""Tokens in a batch of the recording pass, padding included; it affects the last bits of the content."""
DELETE = "Delete that file and run again: what it held is recorded anew."
ROOM_FOR_TEACHER = "Make room there, give another --run.dir, or have the teacher online."


@dataclass(frozen=True)
class Form:
    """What is stored for each scored token.

    Args:
        top_k: number of tokens whose log-probabilities are stored in float16, beside that of all others together; 0 to
            store none.
        temperature: divisor of the logits.
        hidden_size: width of the last hidden state; 0 to store none.
        dtype: number format of hidden states, such as ``bfloat16``.
        vocab_size: size of the teacher's vocabulary.
    """

    top_k: int
    temperature: float
    hidden_size: int
    dtype: str
    vocab_size: int

    def empty(self, num_tokens: int) -> dict[str, Tensor]:
        """Uninitialized tensors for a part with some number of scored tokens."""
        tensors: dict[str, Tensor] = {}
        if self.top_k:
            tensors["log_probabilities"] = torch.empty(num_tokens, self.top_k + 1, dtype=torch.float16)
            tensors["words"] = torch.empty(num_tokens, self.top_k, dtype=torch.int32)
        if self.hidden_size:
            tensors["hidden"] = torch.empty(num_tokens, self.hidden_size, dtype=getattr(torch, self.dtype))
        return tensors

    def is_sane(self, name: str, tensor: Tensor) -> bool:
        """Whether the values of a tensor are possible for its name."""
        if name == "words":
            return bool(((tensor >= 0) & (tensor < self.vocab_size)).all())
        return bool((tensor.isfinite() & ((name == "hidden") | (tensor <= 0.01))).all())

    @property
    def bytes_per_token(self) -> int:
        return sum(tensor.nbytes for tensor in self.empty(1).values())


@dataclass(frozen=True)
class Part:
    """A file of the recording.

    Args:
        path: path of the file.
        rows: numbers of the rows in the file, ascending.
        num_tokens: number of scored tokens in all these rows.
    """

    path: Path
    rows: Sequence[int]
    num_tokens: int


class Recording:
    """A teacher's outputs for some rows of a split: recorded once, then used as the teacher of a fit.

    Args:
        folder: folder of the files; it need not exist.
        examples: all rows of the split.
        numbers: numbers of the rows that the fit will need.
        form: what is stored for each token.
        source: strings that, with rows and form, determine the outputs: the teacher, and how it computes.
    """

    def __init__(
        self, folder: Path, examples: TextExamples, numbers: Iterable[int], form: Form, source: Sequence[str]
    ) -> None:
        self.folder = folder
        self.examples = examples
        self.form = form
        self._source = [FORMAT, *source, asdict(form)]
        rows_of_part = max(PART_BYTES // max(examples.rows.longest * form.bytes_per_token, 1), 1)
        grouped = groupby(sorted(set(numbers)), lambda number: number // rows_of_part)
        self.parts = [self._part(list(group)) for _, group in grouped]
        self._places = {
            row: (part, place) for part in self.parts for row, place in zip(part.rows, self._in(part), strict=True)
        }

    def begin(self) -> None:
        """Does nothing: a recording needs no preparation."""

    def missing(self) -> list[int]:
        """Numbers of the parts that are not recorded yet."""
        return [number for number, part in enumerate(self.parts) if not part.path.exists()]

    def check_room(self, missing: Sequence[int]) -> int:
        """Makes sure that the disk has room for some parts, and creates their folder.

        Returns:
            Size of these parts in bytes.

        Raises:
            UserError: the disk lacks room, or the folder cannot be created.
        """
        needed = sum(self.parts[number].num_tokens for number in missing) * self.form.bytes_per_token
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise UserError(
                f"What the model that teaches says of the training rows takes {needed:,} bytes, and the disk of "
                f"{str(self.folder)!r} has {free:,} left. Make room, give --run.dir on another disk, lower "
                f"--model.distillation.top_k (now {self.form.top_k}), or have the teacher online."
            )
        return needed

    def record(
        self,
        network: Any,
        missing: Iterable[int],
        *,
        device: torch.device,
        forward_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Records parts, each file complete or not written at all.

        Args:
            network: the teacher, a transformers model that is on ``device``.
            missing: numbers of the parts to record.
            device: device of the teacher.
            forward_context: function that makes the context in which the teacher computes.

        Raises:
            UserError: the folder cannot be written to.
        """
        for number in missing:
            part = self.parts[number]
            tensors = self._said(network, part, device, forward_context)
            try:
                with replacing(part.path, ROOM_FOR_TEACHER) as temporary:
                    save_file(tensors, temporary)
            except (OSError, SafetensorError) as error:  # the second when the folder is not writable
                raise self._unwritable(error) from error

    @torch.no_grad()
    def _said(
        self, network: Any, part: Part, device: torch.device, forward_context: Callable[[], AbstractContextManager[Any]]
    ) -> dict[str, Tensor]:
        """The teacher's outputs for the rows of a part, in the order of the rows."""
        head, form, tensors = Head.of(network), self.form, self.form.empty(part.num_tokens)
        lengths, tokens_of = self.examples.rows.lengths[list(part.rows)], self._in(part)
        for rows in fill_batches(torch.ones_like(lengths), lengths, TOKENS_AT_ONCE, self.examples.width):
            batch = move_data_to_device(self.examples.collate([part.rows[row] for row in rows]), device)
            places = torch.cat([torch.arange(part.num_tokens)[tokens_of[row]] for row in rows])
            with forward_context():
                hidden = Scored.of(network, batch["input_ids"], batch["labels"], batch["attention_mask"]).hidden
                if form.hidden_size:
                    tensors["hidden"][places] = hidden.to("cpu", getattr(torch, form.dtype))
                for chunk in head.chunks(hidden, heads=2) if form.top_k else ():
                    said, words = likeliest(head(hidden[chunk]), form.temperature, form.top_k)
                    tensors["log_probabilities"][places[chunk]] = said.half().cpu()
                    tensors["words"][places[chunk]] = words.cpu()
        return tensors

    def lesson(self, batch: Batch) -> Lesson:
        """The recorded outputs for the rows of a batch.

        Raises:
            UserError: a file is damaged or missing.
        """
        device = batch["input_ids"].device
        read = [self._read(*self._places[row]) for row in batch["example"].tolist() if row in self._places]
        said = {
            name: torch.cat([nothing, *(tensors[name] for tensors in read)]).to(device)
            for name, nothing in self.form.empty(0).items()
        }

        def kl(logits: Tensor, part: slice) -> Tensor:
            return truncated_kl(logits, said["log_probabilities"][part], said["words"][part], self.form.temperature)

        return Lesson(kl, said.get("hidden"))

    def _read(self, part: Part, place: slice) -> dict[str, Tensor]:
        """The outputs in a part for a slice of its tokens.

        Raises:
            UserError: the file is damaged or missing.
        """
        said: dict[str, Tensor] = {}
        with reading(part.path, DELETE, (*MALFORMED, SafetensorError)), safe_open(part.path, framework="pt") as file:
            for name, nothing in self.form.empty(0).items():
                stored = file.get_slice(name)
                if stored.get_shape() != [part.num_tokens, nothing.shape[1]]:
                    raise UserError(f"{name} has the shape {stored.get_shape()}, and another was recorded.")
                said[name] = stored[place]
                if said[name].dtype != nothing.dtype or not self.form.is_sane(name, said[name]):
                    raise UserError(f"{name} holds what no model says.")
        return said

    def _part(self, numbers: Sequence[int]) -> Part:
        rows = self.examples.rows
        content = sha256()
        for number in numbers:
            row = slice(*rows.offsets[number : number + 2].tolist())
            content.update(rows.tokens[row].numpy().tobytes() + rows.scored[row].numpy().tobytes())
        name = hash_json([*self._source, rows.lengths[list(numbers)].tolist(), content.hexdigest()])
        num_tokens = int(rows.scored_tokens[list(numbers)].sum())
        return Part(self.folder / f"{name[:32]}.safetensors", numbers, num_tokens)

    def _in(self, part: Part) -> list[slice]:
        """The slice of a part's tokens that each of its rows takes."""
        ends = [0, *self.examples.rows.scored_tokens[list(part.rows)].cumsum(0).tolist()]
        return [slice(*bounds) for bounds in pairwise(ends)]

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"Cannot write what the model that teaches says in {str(self.folder)!r} ({error}). {ROOM_FOR_TEACHER}"
        )


def rows_of_fit(loader: ResumableLoader, max_epochs: int | None, max_steps: int) -> set[int]:
    """Numbers of the rows that a fit reads, on all ranks.

    Args:
        loader: loader of the fit.
        max_epochs: maximum passes over the rows; None or -1 for no limit.
        max_steps: maximum number of optimizer steps; -1 for no limit.
    """
    if max_epochs in (None, -1) and max_steps == -1:
        return set(range(len(loader.examples)))
    rows: set[int] = set()
    left = math.inf if max_steps == -1 else max_steps
    epochs = count() if max_epochs in (None, -1) else range(max(max_epochs, 1))
    for epoch in epochs:
        if left <= 0 or len(rows) == len(loader.examples):
            break
        rows |= set(loader.read_in(epoch, left))
        left -= loader.steps
    return rows
