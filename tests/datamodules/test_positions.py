"""Rows and calibration sequences against the table of positions that some families learn."""

import pytest
from transformers import GPT2Config, LlamaConfig

from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED


def stories(max_length: int) -> StoriesDataModule:
    return StoriesDataModule(
        tokenizer=EMBEDDED, max_length=max_length, num_train=40, num_validation=4, num_test=4, num_choices=0
    )


def test_rows_and_calibration_stay_within_the_table_of_positions() -> None:
    config = GPT2Config(vocab_size=2048, n_positions=32)
    with pytest.raises(UserError, match=r"max_length is 33, .* a table of 32 positions. Give --data.max_length 32"):
        stories(33).check_model(config)
    data = stories(32)
    data.prepare_data()
    data.setup("fit")
    data.check_model(config)
    assert data.calibration(4, 32).shape == (4, 32)
    with pytest.raises(UserError, match="sequences of 33 tokens, and the model has a table of 32 positions"):
        data.calibration(4, 33)


def test_rotary_positions_have_no_end() -> None:
    data = stories(48)
    data.prepare_data()
    data.setup("fit")
    data.check_model(LlamaConfig(vocab_size=2048, max_position_embeddings=32))
    assert data.calibration(4, 40).shape == (4, 40)
