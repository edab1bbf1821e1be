"""The embedded stories: any amount of text from a seeded grammar, with endings to choose between."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.cache import Prepared
from qpruner.datamodules.choice_tasks import TaskQuestions
from qpruner.datamodules.documents import Skipped
from qpruner.datamodules.questions import Measure, Question
from qpruner.datamodules.splits import SPLITS, Split
from qpruner.datamodules.text import Layout, layout_protocol, missing_end, notes, rows_of_text, unended_rows
from qpruner.errors import UserError
from qpruner.stories import Story, generate_stories


class StoriesDataModule(TokenDataModule):
    """Small English stories made by `qpruner.stories`; nothing is read or downloaded.

    The three splits share no story, whatever the seed. Validation and test have a choice task, ``endings``: the right
    ending of a story against one with a value that the story does not mention, if there is one.

    Args:
        num_train: number of stories for fitting and calibration, at least 1.
        num_validation: number of stories for making choices, at least 1.
        num_test: number of stories for reported results, at least 1.
        num_choices: most two-choice endings in validation and in test each, limited by the number of stories in the
            split; 0 for none.
        story_seed: seed of the stories; different seeds give different stories.
        layout: ``packed`` joins the stories with the tokenizer's end-of-text token and cuts them into rows of exactly
            ``max_length`` tokens (the rest is dropped); ``per_document`` gives each a row, truncated to ``max_length``
            tokens.
        end_token: whether a ``per_document`` row that is not truncated ends with the end-of-text token, as a target;
            packed rows have it between stories.
        **kwargs: options of every data module; see `TokenDataModule`.

    Raises:
        UserError: a split without stories, or a negative number of choices.
    """

    def __init__(
        self,
        num_train: int = 4000,
        num_validation: int = 200,
        num_test: int = 400,
        num_choices: int = 400,
        story_seed: int = 0,
        layout: Layout = "per_document",
        end_token: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(num_train, num_validation, num_test) < 1 or num_choices < 0:
            raise UserError(
                f"Every split needs a story and num_choices must be at least 0, "
                f"not {num_train}, {num_validation}, {num_test} stories and {num_choices} choices."
            )
        self.num_stories: Mapping[Split, int] = dict(zip(SPLITS, (num_train, num_validation, num_test), strict=True))
        self.num_choices = num_choices
        self.story_seed = story_seed
        self.layout = layout
        self.end_token = end_token

    @property
    def protocol(self) -> str:
        return layout_protocol(self.layout, self.max_length)

    def options(self) -> dict[str, Any]:
        # A few stories stand for the grammar, so that a new grammar does not use the cache of the old one.
        sample = [story.text for story in generate_stories("train", num_stories=20, seed=self.story_seed)]
        return {
            "stories": dict(self.num_stories),
            "seed": self.story_seed,
            "layout": self.layout,
            "end_token": self.end_token,
            "sample": sample,
        }

    def build(self) -> Prepared:
        skipped = {split: Skipped() for split in SPLITS}
        texts = {split: [story.text for story in self.stories(split)] for split in SPLITS}
        rows = {
            split: rows_of_text(
                self.tokenizer,
                texts[split],
                layout=self.layout,
                end_token=self.end_token,
                max_length=self.max_length,
                skipped=skipped[split],
            )
            for split in SPLITS
        }
        said = notes(type(self).__name__, skipped, {}, rows, {})
        return Prepared(rows, said + missing_end(self.tokenizer, unended_rows(self.layout, self.end_token)))

    def stories(self, split: Split) -> list[Story]:
        return list(generate_stories(split, num_stories=self.num_stories[split], seed=self.story_seed))

    def questions(self, split: Split) -> dict[str, tuple[Measure, TaskQuestions]]:
        """The endings of the stories of validation and test, and the tasks that were requested."""
        questions: dict[str, tuple[Measure, TaskQuestions]] = {}
        if split != "train" and self.num_choices:
            questions["endings"] = ("acc", ending_questions(self.stories(split)[: self.num_choices], self.seed))
        return questions | super().questions(split)


def ending_questions(stories: Sequence[Story], seed: int, other: Literal["untold", "told"] = "untold") -> TaskQuestions:
    """The right ending of each story and another one as options, the right one first or second by a seeded coin.

    Args:
        stories: stories to end.
        seed: seed of the coins.
        other: whether the other ending has a value that the story does not mention (``untold``), or one that it
            mentions about something else (``told``).
    """
    coins = torch.randint(2, (len(stories),), generator=torch.Generator().manual_seed(seed)).tolist()
    questions = []
    for story, gold in zip(stories, coins, strict=True):
        wrong = story.untold_ending if other == "untold" else story.wrong_ending
        endings = (wrong, story.ending) if gold else (story.ending, wrong)
        texts = tuple(f" {ending}" for ending in endings)
        questions.append(Question((story.prompt,) * 2, texts, tuple(map(len, endings)), gold))
    return TaskQuestions(tuple(questions), tuple(range(len(questions))), "qpruner/stories")
