from dataclasses import replace

import pytest
import torch

from qpruner.calibration.text import Calibration, CalibrationConfig, micro_batches
from qpruner.errors import UserError
from qpruner.processes import Processes

N, T = 6, 9
TOKENS = torch.arange(N * T).view(N, T)


@pytest.mark.parametrize(
    ("batch_size", "rows"),
    [(1, [1] * 6), (T, [1] * 6), (2 * T - 1, [1] * 6), (2 * T, [2, 2, 2]), (4 * T + 3, [4, 2]), (1000, [6])],
)
def test_micro_batches_are_whole_sequences_of_at_most_so_many_tokens(batch_size: int, rows: list[int]) -> None:
    cut = micro_batches(TOKENS, batch_size, first=3)
    assert [len(batch.tokens) for batch in cut] == rows
    assert [batch.first for batch in cut] == [3 + sum(rows[:place]) for place in range(len(rows))]
    assert torch.equal(torch.cat([batch.tokens for batch in cut]), TOKENS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("batch_size", [1, 2 * T, 1000])
def test_processes_share_all_sequences_and_each_has_some(world_size: int, batch_size: int) -> None:
    shares = [
        Calibration.share(TOKENS, replace(Processes.alone(), rank=rank, world_size=world_size), batch_size)
        for rank in range(world_size)
    ]
    batches = sorted((batch for share in shares for batch in share.batches), key=lambda batch: batch.first)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), TOKENS)
    assert all(torch.equal(batch.tokens[0], TOKENS[batch.first]) for batch in batches)
    assert all(share.batches and share.num_sequences == N for share in shares)


@pytest.mark.parametrize(
    ("sequences", "world_size", "shares"),
    [(5, 4, [2, 1, 1, 1]), (9, 8, [2, 1, 1, 1, 1, 1, 1, 1]), (7, 3, [3, 3, 1]), (6, 4, [2, 2, 1, 1])],
)
def test_no_process_is_idle_where_there_are_as_many_sequences(
    sequences: int, world_size: int, shares: list[int]
) -> None:
    tokens = torch.zeros(sequences, T, dtype=torch.long)
    found = [
        Calibration.share(tokens, replace(Processes.alone(), rank=rank, world_size=world_size), 1000)
        for rank in range(world_size)
    ]
    assert [sum(len(batch.tokens) for batch in share.batches) for share in found] == shares


def test_more_processes_than_sequences_leave_some_without() -> None:
    share = Calibration.share(TOKENS[:2], replace(Processes.alone(), rank=2, world_size=3), 1000)
    assert (share.batches, share.num_sequences) == ([], 2)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("num_sequences", 0, "calibration.num_sequences is 0; it must be at least 1"),
        ("length", 1, "calibration.length is 1; it must be at least 2"),
        ("batch_size", 0, "calibration.batch_size is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        CalibrationConfig(**{option: value})
