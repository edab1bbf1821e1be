"""What all data modules share, on the stories."""

from typing import Any

import pytest
import torch

from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED
from qpruner.stories import generate_stories


def make(**options: Any) -> StoriesDataModule:
    sizes = {"num_train": 30, "num_validation": 5, "num_test": 5, "num_choices": 4}
    return StoriesDataModule(tokenizer=EMBEDDED, **{**sizes, **options})


@pytest.fixture(scope="module")
def data() -> StoriesDataModule:
    return make(max_length=60)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_calibration_is_the_same_whatever_the_number_of_ranks(data: StoriesDataModule, num_ranks: int) -> None:
    alone = data.calibration(10, 20)
    assert alone.shape == (10, 20) and alone.dtype == torch.int64
    shares = [data.calibration(10, 20, rank, num_ranks) for rank in range(num_ranks)]
    assert sum(map(len, shares)) == 10
    for rank, share in enumerate(shares):
        assert torch.equal(share, alone[rank::num_ranks])


def test_calibration_sequences_are_parts_of_different_training_rows(data: StoriesDataModule) -> None:
    rows = data.examples("train").rows
    texts = [rows.tokens[rows.offsets[i] : rows.offsets[i + 1]].tolist() for i in range(len(rows))]
    found = []
    starts = set()
    for sequence in data.calibration(30, 20).tolist():
        (row,) = [i for i, text in enumerate(texts) if any(text[s : s + 20] == sequence for s in range(len(text) - 19))]
        found.append(row)
        starts.add(next(s for s in range(41) if texts[row][s : s + 20] == sequence))
    assert sorted(found) == list(range(30))
    assert len(starts) > 10  # cut at places of their own
    assert not torch.equal(make(max_length=60, seed=1).calibration(30, 20), data.calibration(30, 20))


def test_calibration_that_cannot_be_had(data: StoriesDataModule) -> None:
    with pytest.raises(UserError, match="asks for 31 sequences of 20 tokens; 30 of the 30 training rows are that long"):
        data.calibration(31, 20)
    with pytest.raises(UserError, match="0 of the 30 training rows"):
        data.calibration(1, 61)
    with pytest.raises(UserError, match="at least 1 sequence of 2 tokens, not 0 of 20"):
        data.calibration(0, 20)


def test_loaders_by_split(data: StoriesDataModule) -> None:
    train = data.train_dataloader()
    assert (train.shuffle, train.batch_size, len(train)) == (True, 8, 3)
    text, choices = data.test_dataloader()
    assert (text.shuffle, text.batch_size, len(text)) == (False, 16, 1)
    assert torch.equal(next(iter(text))["example"], torch.arange(5))
    assert next(iter(choices))["example"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(make(num_choices=0).val_dataloader()) == 1


def test_fingerprint_is_of_the_tokens(data: StoriesDataModule) -> None:
    fingerprint = data.fingerprint()
    assert {split: part["rows"] for split, part in fingerprint.items()} == {"train": 30, "validation": 5, "test": 5}
    assert fingerprint["test"]["tokens"] == 5 * 60
    assert make(max_length=60).fingerprint() == fingerprint
    assert make(max_length=60, story_seed=1).fingerprint()["test"]["sha256"] != fingerprint["test"]["sha256"]


def test_the_endings_to_choose_between(data: StoriesDataModule) -> None:
    stories = list(generate_stories("test", num_stories=5, seed=0))[:4]
    choices = data.choices("test")
    assert choices is not None and data.choices("train") is None
    batch = choices.collate(range(4))
    for row in range(8):
        story = stories[row // 2]
        right = int(batch["option"][row]) == int(batch["gold"][row])
        ending = story.ending if right else story.wrong_ending
        tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert data.tokenizer.decode(tokens) == f"<s>{story.prompt} {ending}"
        scored = batch["labels"][row][batch["labels"][row] != -100]
        assert data.tokenizer.decode(scored) == f" {ending}"
    assert set(make(num_choices=5).choices("test").gold.tolist()) <= {0, 1}  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_choices": 6}, {"num_choices": -1}])
def test_impossible_numbers_of_stories(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="num_choices must lie between"):
        make(**wrong)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"eval_batch_size": 0}, {"num_workers": -1}])
def test_impossible_batches(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="Batch sizes must be at least 1"):
        LoaderConfig(**wrong)
