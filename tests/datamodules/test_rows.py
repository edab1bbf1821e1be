import numpy as np
import torch
from torch import Tensor

from qpruner.datamodules.rows import FILLER, Row, TextExamples, TokenRows

PAD = 9


def row(tokens: list[int], scored: list[int], num_bytes: list[int]) -> Row:
    return Row(np.array(tokens, np.int32), np.array(scored, np.bool_), np.array(num_bytes, np.int32))


LONG = row([5, 6, 7], [1, 0, 1], [100, 20, 3])
SHORT = row([8, 4], [1, 1], [100, 7])
ROWS = TokenRows.of([LONG, SHORT])


def assert_batch(batch: dict[str, Tensor], **expected: list) -> None:
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_lie_end_to_end() -> None:
    assert ROWS.tokens.tolist() == [5, 6, 7, 8, 4]
    assert ROWS.offsets.tolist() == [0, 3, 5]
    assert (len(ROWS), ROWS.lengths.tolist()) == (2, [3, 2])
    assert (ROWS.tokens.dtype, ROWS.scored.dtype, ROWS.num_bytes.dtype) == (torch.int32, torch.bool, torch.int32)
    nothing = TokenRows.of([])
    assert (len(nothing), len(nothing.tokens), nothing.num_scored) == (0, 0, 0)


def test_the_first_token_of_a_row_is_no_target() -> None:
    assert ROWS.num_scored == 2  # 7 and 4
    assert int((ROWS.pad([0, 1], PAD)["labels"] != -100).sum()) == ROWS.num_scored


def test_padded_batch_by_hand() -> None:
    assert_batch(
        ROWS.pad([1, 0, FILLER], PAD),
        input_ids=[[8, 4, PAD], [5, 6, 7], [PAD, PAD, PAD]],
        attention_mask=[[1, 1, 0], [1, 1, 1], [1, 0, 0]],
        labels=[[-100, 4, -100], [-100, -100, 7], [-100, -100, -100]],
        num_bytes=[7, 3, 0],
        example=[1, 0, FILLER],
    )


def test_padding_leaves_the_rows_as_they_were() -> None:
    before = [ROWS.tokens.clone(), ROWS.scored.clone(), ROWS.num_bytes.clone()]
    ROWS.pad([0, 1], PAD)["input_ids"].fill_(0)
    assert all(map(torch.equal, before, [ROWS.tokens, ROWS.scored, ROWS.num_bytes]))


def test_an_empty_row_is_one_unscored_token_wherever_it_stands() -> None:
    empty = row([], [], [])
    rows = TokenRows.of([empty, LONG, empty, SHORT, empty])
    assert (rows.scored_tokens.tolist(), rows.num_scored) == ([0, 1, 0, 1, 0], 2)
    assert_batch(
        rows.pad([0, 2, 3, 4], PAD),
        input_ids=[[PAD, PAD], [PAD, PAD], [8, 4], [PAD, PAD]],
        attention_mask=[[1, 0], [1, 0], [1, 1], [1, 0]],
        labels=[[-100, -100], [-100, -100], [-100, 4], [-100, -100]],
        num_bytes=[0, 0, 7, 0],
        example=[0, 2, 3, 4],
    )


def test_text_examples_are_the_rows() -> None:
    examples = TextExamples(ROWS, PAD)
    assert len(examples) == 2
    assert examples.collate([1])["input_ids"].tolist() == [[8, 4]]


def test_a_row_is_cut_joined_and_asked_for_its_end() -> None:
    both = Row.join([LONG[1:], SHORT])
    assert [part.tolist() for part in (both.tokens, both.scored, both.num_bytes)] == [
        [6, 7, 8, 4],
        [False, True, True, True],
        [20, 3, 100, 7],
    ]
    assert (both.ends_with(4), both.ends_with(8), both[:0].ends_with(4)) == (True, False, False)


def test_long_batches_have_few_widths_none_beyond_the_longest_row() -> None:
    lengths = (1, 64, 65, 80, 81, 99, 200)
    rows = TokenRows.of(row([1] * length, [1] * length, [1] * length) for length in lengths)
    widths = [rows.pad([number], PAD)["input_ids"].shape[1] for number in range(len(lengths))]
    assert widths == [1, 64, 80, 80, 96, 112, 200]
    alone, wide = rows.pad([4], PAD), rows.pad([4, 6], PAD)
    for batch in (alone, wide):
        assert batch["attention_mask"][0].tolist() == [1] * 81 + [0] * (batch["input_ids"].shape[1] - 81)
        assert (batch["input_ids"][0, 81:] == PAD).all() and (batch["labels"][0, 81:] == -100).all()
