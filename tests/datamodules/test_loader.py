from itertools import islice

import numpy as np
import pytest
import torch

from qpruner.datamodules.loader import EvaluationLoader, ResumableLoader, fill_batches
from qpruner.datamodules.rows import FILLER, Row, TextExamples, TokenRows
from qpruner.errors import UserError

EPOCHS = 3


def examples(number: int) -> TextExamples:
    """Rows of one token each, the row's own number."""
    numbers = torch.arange(number, dtype=torch.int32)
    return TextExamples(
        TokenRows(numbers, torch.ones(number, dtype=torch.bool), torch.zeros_like(numbers), torch.arange(number + 1)),
        pad_token=0,
    )


def loader(number: int, batch_size: int = 2, **options: object) -> ResumableLoader:
    options = {"seed": 5} | options
    return ResumableLoader(examples(number), batch_size=batch_size, **options)  # type: ignore[arg-type]


def read(source: ResumableLoader | EvaluationLoader, limit: int | None = None) -> list[tuple[int, ...]]:
    """One pass, of at most so many batches, as a Trainer makes it."""
    return [tuple(batch["example"].tolist()) for batch in islice(source, limit)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1, 7, 12, 13])
def test_evaluation_shows_every_example_once_over_all_ranks(number: int, world_size: int) -> None:
    ranks = [
        EvaluationLoader(examples(number), tokens=2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    shares = [read(rank) for rank in ranks]
    assert {len(share) for share in shares} == {len(rank) for rank in ranks} == {-(-number // (2 * world_size))}
    seen = [index for batches in zip(*shares, strict=True) for batch in batches for index in batch]
    assert sorted(index for index in seen if index != FILLER) == list(range(number))
    assert all(batch == (FILLER,) for share in shares for batch in share if FILLER in batch)
    assert [read(rank) for rank in ranks] == shares  # every time


def test_evaluation_batches_are_as_full_as_their_tokens_allow() -> None:
    lengths = torch.tensor([5, 1, 9, 2, 2, 30, 4, 0])
    one = torch.ones_like(lengths)
    ten, six, any_number = ((tokens, lambda length: length) for tokens in (10, 6, 10**9))
    # From the shortest: 0 1 2 2 are 4 rows of 2; with 4 they would be 5 x 4. Then 4 and 5 (2 x 5), 9, and 30 alone.
    assert fill_batches(one, lengths, *ten) == [[7, 1, 3, 4], [6, 0], [2], [5]]
    # Examples of 3, 1, 1, 2, ... rows stay together: 1 x 0 and 1 x 1, then 2 + 1 rows of 2, ...
    assert fill_batches(torch.tensor([3, 1, 1, 2, 1, 1, 1, 1]), lengths, *six) == [[7, 1], [3, 4], [6], [0], [2], [5]]
    assert fill_batches(one, lengths, *any_number) == [[7, 1, 3, 4, 6, 0, 2, 5]]
    assert fill_batches(one[:0], lengths[:0], *ten) == []


def rows_of(lengths: list[int]) -> TokenRows:
    return TokenRows.of(Row(np.ones(n, np.int32), np.ones(n, np.bool_), np.ones(n, np.int32)) for n in lengths)


def test_widths_that_are_rounded_up_count_as_tokens_of_a_batch() -> None:
    """65 tokens are padded to 80, and 129 to 144, of which 51 and 28 are in 4096; unrounded, 63 and 31 would be."""
    source = EvaluationLoader(TextExamples(rows_of([65] * 120 + [129] * 60 + [300]), 0), tokens=4096)
    shapes = sorted(tuple(batch["input_ids"].shape) for batch in source)
    # The last rows of a length are in a batch with the first of the next: 18 of 65 with 10 of 129.
    assert shapes == [(1, 300), (22, 144), (28, 144), (28, 144), (51, 80), (51, 80)]
    assert max(rows * width for rows, width in shapes) == 4080


def test_no_width_is_rounded_beyond_the_longest_row() -> None:
    source = EvaluationLoader(TextExamples(rows_of([100] * 8), 0), tokens=400)
    assert [tuple(batch["input_ids"].shape) for batch in source] == [(4, 100)] * 2


def test_sizes_of_text_are_its_rows() -> None:
    lengths = torch.tensor([3, 7, 2, 5, 1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.arange(18, dtype=torch.int32)
    rows = TokenRows(tokens, torch.ones(18, dtype=torch.bool), torch.zeros_like(tokens), offsets)
    assert [part.tolist() for part in TextExamples(rows, 0).sizes()] == [[1] * 5, [3, 7, 2, 5, 1]]


def test_the_first_evaluation_batches_are_neither_the_shortest_nor_the_longest() -> None:
    lengths = torch.arange(1, 401)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.zeros(int(offsets[-1]), dtype=torch.int32)
    rows = TokenRows(tokens, torch.ones(len(tokens), dtype=torch.bool), torch.zeros_like(tokens), offsets)
    batches = EvaluationLoader(TextExamples(rows, 0), tokens=800).batches()
    first = [float(lengths[batch].float().mean()) for batch in batches[: len(batches) // 4]]
    assert min(first) < 150 and max(first) > 300


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_repeats_nothing_within_an_epoch(world_size: int) -> None:
    number, batch_size = 31, 2
    ranks = [loader(number, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(EPOCHS):
        shares = [rank.batches(epoch) for rank in ranks]
        seen = [index for share in shares for batch in share for index in batch]
        assert len(set(seen)) == len(seen) == number - number % (batch_size * world_size)
        assert {len(batch) for share in shares for batch in share} == {batch_size}
        assert {len(share) for share in shares} == {len(rank) for rank in ranks}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    one, same, other = loader(20), loader(20), loader(20, seed=6)
    epochs = [one.batches(epoch) for epoch in range(EPOCHS)]
    assert [same.batches(epoch) for epoch in range(EPOCHS)] == epochs
    assert len({*map(str, epochs), str(other.batches(0))}) == EPOCHS + 1
    assert [[*batch] for batch in read(one)] == epochs[0]
    assert sorted(sum(epochs[0], [])) == list(range(20)) != sum(epochs[0], [])


def test_what_all_ranks_read_in_some_steps_of_an_epoch() -> None:
    ranks = [loader(21, rank=rank, world_size=2, accumulate=2, limit=4) for rank in range(2)]  # of five batches each
    for steps, batches in ((1, 2), (2, 4), (9, 4), (float("inf"), 4)):
        read = [example for rank in ranks for batch in rank.batches(1)[:batches] for example in batch]
        for rank in ranks:
            assert sorted(rank.read_in(1, steps)) == sorted(read)


def test_order_neither_draws_on_nor_depends_on_the_global_generator() -> None:
    state = torch.get_rng_state()
    first = read(loader(20))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert read(loader(20)) == first


def read_epoch(number: int, epoch: int) -> list[tuple[int, ...]]:
    return [tuple(batch) for batch in loader(number).batches(epoch)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_goes_on_at_the_position_when_its_first_batch_is_read(num_workers: int) -> None:
    place = (0, 0)
    source = loader(11, num_workers=num_workers, position=lambda: place)
    early = iter(source)
    for place in [(0, 0), (0, 2), (1, 0), (2, 4)]:
        assert read(source) == read_epoch(11, place[0])[place[1] :]
    assert [tuple(batch["example"].tolist()) for batch in early] == read_epoch(11, 2)[4:]


def test_a_rank_goes_on_in_its_own_share() -> None:
    whole = [read(loader(20, rank=rank, world_size=2)) for rank in range(2)]
    for rank in range(2):
        resumed = loader(20, rank=rank, world_size=2, position=lambda: (0, 3))
        assert read(resumed) == whole[rank][3:] != whole[1 - rank][3:]


def test_too_few_examples_for_one_step() -> None:
    with pytest.raises(UserError, match=r"5 rows, fewer than the 2 x 3 .* smaller --data.init_args.loader.batch_size"):
        loader(5, world_size=3)
    assert len(loader(6, world_size=3)) == 1


@pytest.mark.parametrize(("world_size", "accumulate", "limit"), [(1, 1, None), (1, 3, None), (2, 2, None), (1, 2, 3)])
def test_a_training_batch_knows_the_scored_tokens_of_its_optimizer_step(
    world_size: int, accumulate: int, limit: int | None
) -> None:
    """13 rows of 2 to 14 tokens, all but the first of each scored, in micro-batches of 2."""
    lengths = torch.arange(2, 15)
    numbers = torch.arange(int(lengths.sum()), dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = TokenRows(numbers, torch.ones(len(numbers), dtype=torch.bool), torch.zeros_like(numbers), offsets)
    ranks = [
        ResumableLoader(
            TextExamples(rows, 0), batch_size=2, seed=5, rank=rank, world_size=world_size,
            accumulate=accumulate, limit=limit,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    shares = [list(islice(rank, limit)) for rank in ranks]
    assert [rank.steps for rank in ranks] == [-(-len(shares[0]) // accumulate)] * world_size
    for first in range(0, len(shares[0]), accumulate):
        step = [batch for share in shares for batch in share[first : first + accumulate]]
        scored = sum(int((batch["labels"] != -100).sum()) for batch in step)
        assert scored > 0
        for batch in step:
            assert float(batch["step_tokens"]) == pytest.approx(scored / accumulate / world_size)
