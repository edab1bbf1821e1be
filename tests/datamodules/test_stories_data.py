from typing import Any

import pytest

from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.splits import SPLITS
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED
from qpruner.stories import generate_stories


def make(**options: Any) -> StoriesDataModule:
    sizes = {"num_train": 30, "num_validation": 5, "num_test": 5, "num_choices": 4}
    return StoriesDataModule(tokenizer=EMBEDDED, **{**sizes, **options})


def rows(module: StoriesDataModule, split: Any) -> list[list[int]]:
    found = module.examples(split).rows
    return [found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist() for i in range(len(found))]


@pytest.mark.parametrize("end_token", [False, True])
def test_a_story_a_row(end_token: bool) -> None:
    module = make(story_seed=3, end_token=end_token)
    for split, number in zip(SPLITS, (30, 5, 5), strict=True):
        texts = [story.text for story in generate_stories(split, num_stories=number, seed=3)]
        assert rows(module, split) == [(module.tokenizer(text)["input_ids"] + [1] * end_token)[:256] for text in texts]
    batch = module.examples("test").collate([0])
    assert batch["num_bytes"].item() == len(next(generate_stories("test", num_stories=1, seed=3)).text.encode())


def test_packed_stories_begin_and_end_within_rows() -> None:
    module = make(layout="packed", max_length=50)
    stream: list[int] = []
    for story in generate_stories("validation", num_stories=5, seed=0):
        stream += ([1] if stream else []) + module.tokenizer(story.text)["input_ids"]
    assert rows(module, "validation") == [stream[i : i + 50] for i in range(0, len(stream) - 49, 50)]
    assert module.protocol.startswith("packed rows of 50 tokens")


def test_splits_share_no_story_whatever_the_seed() -> None:
    modules = [make(story_seed=seed, num_train=300) for seed in range(3)]
    texts = {split: {story.text for module in modules for story in module.stories(split)} for split in SPLITS}
    assert [len(texts[split]) > 2 * size for split, size in zip(SPLITS, (300, 5, 5), strict=True)] == [True] * 3
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))


def test_the_endings_to_choose_between() -> None:
    module = make()
    stories = module.stories("test")[:4]
    (choices,) = module.choices("test")
    batch = choices.collate(range(4))
    assert choices.task == "endings" and batch["example"].tolist() == [0, 1, 2, 3]
    for question, story in enumerate(stories):
        for option in range(2):
            row = choices.rows.tokens[slice(*choices.rows.offsets[2 * question + option :][:2].tolist())]
            ending = story.ending if option == int(batch["gold"][question]) else story.untold_ending
            assert module.tokenizer.decode(row) == f"<s>{story.prompt} {ending}"
            scored = batch["targets"][question][batch["options"][question] == option]
            assert module.tokenizer.decode(scored) == f" {ending}"
            assert int(batch["lengths"][question, option]) == len(ending)
    assert module.choices("train") == []
    assert make(num_choices=0).choices("test") == []
    assert [len(make(num_choices=9).choices(split)[0]) for split in ("validation", "test")] == [5, 5]


def test_the_right_ending_stands_first_as_often_as_second() -> None:
    (choices,) = make(num_test=300, num_validation=300, num_choices=300).choices("test")
    assert 110 < choices.gold.sum() < 190


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_test": 0}, {"num_choices": -1}])
def test_impossible_numbers_of_stories(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="num_choices must be at least 0"):
        make(**wrong)
