"""Questions as trees of tokens: the common beginning of a question's options is stored once, and computed once.

Shapes: B questions of a batch, T tokens of the longest, S scored tokens of the question with most of these, O options
of the question with most of these, E questions of a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict, final

import numpy as np
import torch
from torch import Tensor

from qpruner.datamodules.choice_tasks import TaskQuestions
from qpruner.datamodules.encoding import encode_pairs, fit_length
from qpruner.datamodules.questions import Measure
from qpruner.datamodules.rows import FILLER, Row, TokenRows, round_up
from qpruner.errors import UserError

NOTHING = -1
"""The branch of padding, and the option of targets that are not scored."""


@final
class ChoiceBatch(TypedDict):
    """One question per row: first the trunk, with which all options begin, then the rest of each option, its branch.

    A token is preceded by the tokens of the trunk and of its own branch. The last token of an option is predicted from
    those before it and predicts nothing itself, so it is only a target.
    """

    task: str
    measure: Measure
    input_ids: Tensor  # [B, T] int64
    positions: Tensor  # [B, T] int64, position of a token in the text of its option
    branch: Tensor  # [B, T] int64, 0 in the trunk, o + 1 in the branch of option o, NOTHING on padding
    targets: Tensor  # [B, S] int64, tokens of the continuations
    sources: Tensor  # [B, S] int64, position in its row of the token before a target
    options: Tensor  # [B, S] int64, the option that a target belongs to, NOTHING on padding
    lengths: Tensor  # [B, O] int64, characters of each option; 0 where a question has no such option
    example: Tensor  # [B] int64, number of the question in its split; FILLER where the row fills a shard
    gold: Tensor  # [B] int64, index of the right option


@dataclass(frozen=True)
class ChoiceExamples:
    """The questions of a task.

    Args:
        task: name of the task.
        measure: measure by which the task is reported.
        rows: context and continuation of every option, those of a question one after the other; continuations are
            scored.
        first_option: row at which each question begins, [E + 1] int64; the last entry is the number of rows.
        gold: index of the right option of each question, [E] int64.
        lengths: number of characters of each option, [rows] int64.
        names: name of each question: its position in the file that it came from, [E] int64.
        pad_token: token id to pad with.
        cut: number of questions with an option that was truncated from the left to fit into the context of the model.
    """

    task: str
    measure: Measure
    rows: TokenRows
    first_option: Tensor
    gold: Tensor
    lengths: Tensor
    names: Tensor
    pad_token: int
    cut: int

    @classmethod
    def of(
        cls,
        task: str,
        measure: Measure,
        given: TaskQuestions,
        tokenizer: Any,
        *,
        max_length: int,
        pad_token: int,
    ) -> "ChoiceExamples":
        """Tokenizes questions.

        Args:
            task: name of the task.
            measure: measure by which the task is reported.
            given: questions of the task.
            tokenizer: tokenizer of the model.
            max_length: number of positions that the model supports; an option may have one token more, which is only
                predicted.
            pad_token: token id to pad with.

        Raises:
            UserError: an option has no tokens of its own, or more than fit into the model.
        """
        questions = given.questions
        pairs = [pair for each in questions for pair in zip(each.contexts, each.continuations, strict=True)]
        try:
            encoded = [fit_length(*pair, max_length) for pair in encode_pairs(tokenizer, pairs)]
        except UserError as error:
            raise UserError(f"The task {task!r} ({given.source}): {error}") from error
        options = torch.tensor([len(question.continuations) for question in questions])
        first_option = torch.cat([options.new_zeros(1), options.cumsum(0)])
        cut = torch.tensor([cut for _, _, cut in encoded]).float()
        return cls(
            task,
            measure,
            TokenRows.of(_row(context, continuation) for context, continuation, _ in encoded),
            first_option,
            torch.tensor([question.gold for question in questions]),
            torch.tensor([length for question in questions for length in question.lengths]),
            torch.tensor(given.names),
            pad_token,
            int((torch.segment_reduce(cut, "max", lengths=options) > 0).sum()),
        )

    def __len__(self) -> int:
        return len(self.gold)

    def num_scored(self, indices: Sequence[int]) -> int:
        return sum(int(self.rows.scored_tokens[list(self._options(index))].sum()) for index in indices)

    def sizes(self) -> tuple[Tensor, Tensor]:
        options = self.first_option.diff()
        inputs = torch.segment_reduce((self.rows.lengths - 1).double(), "sum", lengths=options).long()
        return torch.ones_like(options), inputs - (options - 1) * self.trunks

    def width(self, length: int) -> int:
        return round_up(length)

    @cached_property
    def trunks(self) -> Tensor:
        """Number of tokens that all options of a question begin with and that none is scored on."""  # [E] int64
        tokens, offsets = self.rows.tokens.numpy(), self.rows.offsets
        contexts = self.rows.lengths - self.rows.scored_tokens  # continuations are the ends of rows
        trunks = []
        for index in range(len(self)):
            options = self._options(index)
            shortest = int(contexts[list(options)].min())
            first, *others = (tokens[start : start + shortest] for start in offsets[list(options)].tolist())
            differ = np.zeros(shortest, dtype=np.bool_)
            for other in others:
                differ |= other != first
            trunks.append(int(differ.argmax()) if differ.any() else shortest)
        return torch.tensor(trunks, dtype=torch.int64)

    def collate(self, indices: Sequence[int]) -> ChoiceBatch:
        trees = [self._tree(index) for index in indices]
        longest, scored = (max(len(tree[name]) for tree in trees) for name in ("input_ids", "targets"))
        width = self.width(longest)

        def together(name: str, size: int, fill: int = 0) -> Tensor:
            return torch.stack([_padded(tree[name], size, fill) for tree in trees])

        return ChoiceBatch(
            task=self.task,
            measure=self.measure,
            input_ids=together("input_ids", width, self.pad_token),
            positions=together("positions", width),
            branch=together("branch", width, NOTHING),
            targets=together("targets", scored),
            sources=together("sources", scored),
            options=together("options", scored, NOTHING),
            lengths=together("lengths", max(len(tree["lengths"]) for tree in trees)),
            example=torch.tensor(list(indices)),
            gold=torch.tensor([0 if index == FILLER else int(self.gold[index]) for index in indices]),
        )

    def _options(self, index: int) -> range:
        """The rows of a question."""
        return range(*self.first_option[index : index + 2].tolist())

    def _tree(self, index: int) -> dict[str, Tensor]:
        """A question as a row of a `ChoiceBatch`, without padding."""
        if index == FILLER:
            zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
            return {
                "input_ids": torch.tensor([self.pad_token]), "positions": zero, "branch": zero,
                "targets": nothing, "sources": nothing, "options": nothing, "lengths": zero,
            }  # fmt: skip
        trunk = int(self.trunks[index])
        options = self._options(index)
        start = int(self.rows.offsets[options[0]])
        inputs = [self.rows.tokens[start : start + trunk]]
        positions, branch = [torch.arange(trunk)], [torch.zeros(trunk, dtype=torch.int64)]
        targets, sources, belongs = [], [], []
        size = trunk
        for number, row in enumerate(options):
            start, end = self.rows.offsets[row : row + 2].tolist()
            rest = torch.arange(trunk, end - start - 1)  # positions in the text of the option
            inputs.append(self.rows.tokens[start + trunk : end - 1])
            positions.append(rest)
            branch.append(torch.full_like(rest, number + 1))
            of_option = torch.arange(end - start - int(self.rows.scored_tokens[row]), end - start)
            before = of_option - 1
            targets.append(self.rows.tokens[start + of_option])
            sources.append(before + torch.where(before < trunk, 0, size - trunk))
            belongs.append(torch.full_like(of_option, number))
            size += len(rest)
        return {
            "input_ids": torch.cat(inputs).long(),
            "positions": torch.cat(positions),
            "branch": torch.cat(branch),
            "targets": torch.cat(targets).long(),
            "sources": torch.cat(sources),
            "options": torch.cat(belongs),
            "lengths": self.lengths[list(options)],
        }


def _row(context: Sequence[int], continuation: Sequence[int]) -> Row:
    tokens = np.array([*context, *continuation], dtype=np.int32)
    return Row(tokens, np.arange(len(tokens)) >= len(context), np.zeros(len(tokens), dtype=np.int32))


def _padded(values: Tensor, size: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((size - len(values),), fill)])
