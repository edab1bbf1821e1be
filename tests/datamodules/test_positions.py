"""Rows and calibration sequences against the table of positions that some families learn."""

import pytest
from transformers import GPT2Config, LlamaConfig

from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED


def stories(max_length: int) -> StoriesDataModule:
    data = StoriesDataModule(
        tokenizer=EMBEDDED, max_length=max_length, num_train=40, num_validation=4, num_test=4, num_choices=0
    )
    data.prepare_data()
    data.setup("fit")
    return data


def gpt2(num_positions: int) -> GPT2Config:
    return GPT2Config(vocab_size=2048, n_positions=num_positions)


def test_rows_and_calibration_stay_within_the_table_of_positions() -> None:
    told = "longest row of the data has 33 tokens, .* a table of 32 positions. Give --data.max_length 32"
    with pytest.raises(UserError, match=told):
        stories(33).check_model(gpt2(32))
    data = stories(32)
    data.check_model(gpt2(32))
    assert data.calibration(4, 32).shape == (4, 32)
    with pytest.raises(UserError, match="sequences of 33 tokens, and the model has a table of 32 positions"):
        data.calibration(4, 33)


def test_what_counts_is_the_longest_row_that_there_is() -> None:
    data = stories(4096)
    longest = max(int(rows.lengths.max()) for rows in data.prepared.splits.values())
    assert longest < 4096
    data.check_model(gpt2(longest))
    with pytest.raises(UserError, match=f"longest row of the data has {longest} tokens"):
        data.check_model(gpt2(longest - 1))


def test_rotary_positions_have_no_end() -> None:
    data = stories(48)
    data.check_model(LlamaConfig(vocab_size=2048, max_position_embeddings=32))
    assert data.calibration(4, 40).shape == (4, 40)
