"""Calibration text, cut into micro-batches that pass through the model together.

Shapes: N sequences over all processes, T tokens in each, B sequences of a micro-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from qpruner.errors import check_ranges
from qpruner.processes import Processes


@dataclass(frozen=True)
class CalibrationConfig:
    """The text on which something is found out of a model, drawn from the training split.

    Args:
        num_sequences: number of sequences over all devices, at least 1.
        length: tokens in each sequence, at least 2.
        batch_size: tokens that pass through a block of the model together, in whole sequences and at least one of
            them. It bounds memory; what is found does not depend on it.
    """

    num_sequences: int = 10
    length: int = 64
    batch_size: int = 4096

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "calibration",
            num_sequences=("at least 1", self.num_sequences >= 1),
            length=("at least 2", self.length >= 2),
            batch_size=("at least 1", self.batch_size >= 1),
        )


@dataclass(frozen=True)
class MicroBatch:
    """Calibration sequences that pass through a block together.

    Args:
        first: number of the first sequence among those of all processes.
        tokens: tokens of the micro-batch, [B, T].
    """

    first: int
    tokens: Tensor


@dataclass(frozen=True)
class Calibration:
    """The calibration text of one process.

    Args:
        batches: micro-batches of this process; there may be none.
        num_sequences: number of sequences over all processes.
        processes: processes that share the text.
    """

    batches: Sequence[MicroBatch]
    num_sequences: int
    processes: Processes

    @classmethod
    def share(cls, tokens: Tensor, processes: Processes, batch_size: int) -> Self:
        """This process's share of some text, which is cut so finely that each process has some if there are as many
        sequences.

        Args:
            tokens: tokens of all sequences, [N, T], the same on all processes.
            processes: processes that share the text.
            batch_size: tokens that pass through a block together; see `CalibrationConfig`.
        """
        fair = math.ceil(len(tokens) / processes.world_size)
        if math.ceil(len(tokens) / fair) < processes.world_size:
            fair = max(len(tokens) // processes.world_size, 1)
        batches = micro_batches(tokens, min(batch_size, fair * tokens.shape[1]))
        return cls(batches[processes.rank :: processes.world_size], len(tokens), processes)


def micro_batches(tokens: Tensor, batch_size: int, first: int = 0) -> list[MicroBatch]:
    """Cuts sequences into micro-batches.

    Args:
        tokens: tokens of the sequences, [N, T].
        batch_size: tokens of a micro-batch, see `CalibrationConfig`.
        first: number of the first sequence.
    """
    rows = max(batch_size // tokens.shape[1], 1)
    return [MicroBatch(first + start, tokens[start : start + rows]) for start in range(0, len(tokens), rows)]
