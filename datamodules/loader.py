"""Loaders that shard without repetition: one for training, which resumes where the fit stopped, one for evaluation."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qpruner.datamodules.rows import FILLER, Batch
from qpruner.errors import UserError
from qpruner.seeds import derive_seed


class Examples(Protocol):
    """Numbered examples that can be gathered into a batch."""

    def __len__(self) -> int: ...

    def collate(self, indices: Sequence[int]) -> Any: ...

    def num_scored(self, indices: Sequence[int]) -> int:
        """Total number of scored tokens of some examples."""
        ...

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Number of rows of each example, and number of tokens in the longest of these."""  # [E] int64, [E] int64
        ...

    def width(self, length: int) -> int:
        """Number of tokens to which the rows of a batch are padded where the longest of them has ``length``."""
        ...


class _Numbers(Dataset[int]):
    """Maps a number to itself: examples are gathered batch by batch, by `Examples.collate`."""

    def __getitem__(self, index: int) -> int:
        return index


class ResumableLoader:
    """Training batches of this rank's share of the examples, epoch after epoch.

    Every epoch has its own order, a function of the seed and of the number of the epoch, which is dealt to the ranks a
    batch at a time; examples that do not fill a batch on every rank are left out of that epoch.

    The progress of a fit is kept by the loops of its Trainer, which are part of a checkpoint. The loader is stateless
    and asks for the progress when the first batch of a pass is read. So it may be made before a checkpoint is restored,
    and is right with any number of workers.

    Args:
        examples: examples to load.
        batch_size: number of examples in a batch on one rank.
        seed: seed of the order.
        rank: rank of this process among the ``world_size`` that share the examples, from 0.
        world_size: number of processes that share the examples.
        num_workers: number of processes that prepare batches ahead of time; 0 prepares them in this process.
        limit: number or share of the batches of an epoch that will be read; see ``Trainer(limit_train_batches)``.
        accumulate: number of micro-batches per optimizer step; the last step of an epoch may have fewer.
        position: function that gives the epoch to read, and how many of its batches have already been read.

    Raises:
        UserError: there are too few examples for one batch on every rank.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        limit: int | float | None = None,
        accumulate: int = 1,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.limit = limit
        self.accumulate = accumulate
        self.position = position
        if len(self) == 0:
            raise UserError(
                f"The training split has {len(examples)} rows, fewer than the {batch_size} x {world_size} of one step "
                f"(batch size x processes). Give more text, or a smaller --data.init_args.loader.batch_size."
            )

    def __len__(self) -> int:
        """Number of batches in an epoch, the same on every rank."""
        return len(self.examples) // (self.batch_size * self.world_size)

    def batches(self, epoch: int) -> list[list[int]]:
        """The numbers of the examples in each of this rank's batches."""
        order = self._order(epoch)
        step = self.batch_size * self.world_size
        starts = range(self.rank * self.batch_size, len(self) * step, step)
        return [order[start : start + self.batch_size] for start in starts]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(len(self.examples), generator=generator).tolist()

    @property
    def batches_read(self) -> int:
        """Number of batches of an epoch that are read."""
        limit = len(self) if self.limit is None else self.limit
        return min(len(self), int(len(self) * limit) if isinstance(limit, float) else limit)

    @property
    def steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return math.ceil(self.batches_read / self.accumulate)

    def read_in(self, epoch: int, steps: float) -> list[int]:
        """The numbers of the examples that all ranks read in the first optimizer steps of an epoch."""
        batches = min(self.batches_read, steps * self.accumulate)
        return self._order(epoch)[: int(batches) * self.batch_size * self.world_size]

    def step_tokens(self, epoch: int) -> list[float]:
        """Mean number of scored tokens per micro-batch of each optimizer step, over its micro-batches and all ranks.

        A step with fewer micro-batches is still divided by the full number of them, as Trainers do with its loss.
        """  # [optimizer steps]
        order, size = self._order(epoch), self.batch_size * self.world_size  # examples of a micro-batch on all ranks
        end = self.batches_read * size
        micro_batches = self.accumulate * self.world_size
        return [
            self.examples.num_scored(order[start : min(start + size * self.accumulate, end)]) / micro_batches
            for start in range(0, end, size * self.accumulate)
        ]

    def __iter__(self) -> Iterator[Batch]:
        # As a generator, this asks for the position at the first `next`, not at `iter`, when it may not be known yet.
        epoch, first = self.position()
        step_tokens = self.step_tokens(epoch)
        batches = _gathered(self.examples, self.batches(epoch)[first:], self.num_workers)
        for number, batch in enumerate(batches, first):
            step = number // self.accumulate
            if step < len(step_tokens):  # a reader may continue beyond the limit
                batch["step_tokens"] = torch.tensor(step_tokens[step] or 1.0)
            yield batch

    # These methods tell Lightning that a fit can resume in the middle of an epoch with this loader.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the loader has no state."""


class EvaluationLoader:
    """Every example exactly once over all ranks, in batches filled up to a number of tokens.

    Examples of similar length are batched together, so that there is little padding. The batches come in a random but
    fixed order, because a Trainer's ``limit_..._batches`` reads the first of them, and these should be neither the
    shortest nor the longest. A rank that runs out is given a batch of one `FILLER` example, because ranks that disagree
    on the number of batches would wait for each other forever.

    Args:
        examples: examples to load.
        tokens: most tokens in a batch, padding included: number of rows times the width that they are padded to. An
            example is never split, so an example with more tokens becomes a batch of its own.
        rank: rank of this process among the ``world_size`` that share the examples, from 0.
        world_size: number of processes that share the examples.
        num_workers: number of processes that prepare batches ahead of time; 0 prepares them in this process.
    """

    def __init__(
        self, examples: Examples, *, tokens: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> None:
        self.examples = examples
        self.tokens = tokens
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers

    def __len__(self) -> int:
        """Number of batches on each rank."""
        return -(-len(self._all_batches) // self.world_size)

    def batches(self) -> list[list[int]]:
        """The numbers of the examples in each of this rank's batches."""
        mine = self._all_batches[self.rank :: self.world_size]
        return mine + [[FILLER]] * (len(self) - len(mine))

    @cached_property
    def _all_batches(self) -> list[list[int]]:
        filled = fill_batches(*self.examples.sizes(), self.tokens, self.examples.width)
        generator = torch.Generator().manual_seed(derive_seed(0, "evaluation order"))
        return [sorted(filled[place]) for place in torch.randperm(len(filled), generator=generator).tolist()]

    def __iter__(self) -> Iterator[Batch]:
        yield from _gathered(self.examples, self.batches(), self.num_workers)


def fill_batches(rows: Tensor, longest: Tensor, tokens: int, width: Callable[[int], int]) -> list[list[int]]:
    """Batches examples of similar length, as many per batch as the number of tokens allows.

    Args:
        rows: [E], number of rows of each example.
        longest: [E], number of tokens in the longest row of each example.
        tokens: most tokens in a batch, padding included; see `EvaluationLoader`.
        width: function from the length of the longest row of a batch to the width of all; see `Examples.width`.

    Returns:
        The numbers of the examples of each batch, from the shortest to the longest examples.
    """
    batches: list[list[int]] = []
    num_rows = 0
    order = longest.argsort(stable=True)
    for example, more, length in zip(order.tolist(), rows[order].tolist(), longest[order].tolist(), strict=True):
        num_rows += more
        if not batches or num_rows * width(max(length, 1)) > tokens:
            batches.append([])
            num_rows = more
        batches[-1].append(example)
    return batches


def _gathered(examples: Examples, batches: Sequence[Sequence[int]], num_workers: int) -> Iterator[Batch]:
    """The batches of examples, prepared here or by worker processes."""
    loader = DataLoader(
        _Numbers(),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=examples.collate,
        num_workers=num_workers,
        # Workers draw no random numbers; its own generator keeps the loader from using the global one.
        generator=torch.Generator(),
    )
    yield from loader
