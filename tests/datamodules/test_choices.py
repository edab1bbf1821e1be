import numpy as np
import torch

from qpruner.datamodules.choices import NOTHING, ChoiceExamples
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.rows import FILLER, Row, TokenRows

PAD = 99


def examples(*questions: list[tuple[list[int], list[int]]], gold: list[int], cut: int = 0) -> ChoiceExamples:
    """Questions from the context and the continuation of each of their options."""
    rows = [
        Row(np.array(c + o, np.int32), np.arange(len(c + o)) >= len(c), np.zeros(len(c + o), np.int32))
        for options in questions
        for c, o in options
    ]
    counts = torch.tensor([0, *map(len, questions)]).cumsum(0)
    lengths = torch.arange(1, len(rows) + 1)
    return ChoiceExamples(
        "task", "acc", TokenRows.of(rows), counts, torch.tensor(gold), lengths, torch.arange(len(questions)), PAD, cut
    )


SHARED = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7, 8])]
SINGLE = [([1, 2, 3, 4], [5]), ([1, 2, 3, 4], [6]), ([1, 2, 3, 4], [7])]
DIFFERENT = [([1, 2, 3], [9, 4]), ([1, 5], [9, 4])]  # the options stand in the context, as in WinoGrande


def test_a_question_becomes_its_trunk_and_branches_without_what_is_only_predicted() -> None:
    batch = examples(SHARED, gold=[1]).collate([0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 3, 4]]
    assert batch["branch"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch["targets"].tolist() == [[4, 5, 6, 7, 8]]
    assert batch["sources"].tolist() == [[2, 3, 2, 4, 5]]
    assert batch["options"].tolist() == [[0, 0, 1, 1, 1]]
    assert batch["lengths"].tolist() == [[1, 2]]
    assert (batch["gold"].tolist(), batch["example"].tolist()) == ([1], [0])


def test_options_of_one_token_are_the_trunk_alone() -> None:
    batch = examples(SINGLE, gold=[2]).collate([0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["branch"].tolist() == [[0] * 4]
    assert batch["sources"].tolist() == [[3, 3, 3]] and batch["targets"].tolist() == [[5, 6, 7]]


def test_a_trunk_ends_where_contexts_differ() -> None:
    given = examples(DIFFERENT, gold=[0])
    assert given.trunks.tolist() == [1]
    batch = given.collate([0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 5, 9]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 1, 2]]
    assert batch["sources"].tolist() == [[2, 3, 4, 5]]


def test_continuations_that_begin_alike_are_no_part_of_the_trunk() -> None:
    assert examples([([1], [2, 3]), ([1], [2, 4])], gold=[0]).trunks.tolist() == [1]


def test_contexts_that_were_cut_at_different_places_have_no_trunk() -> None:
    batch = examples([([2, 3], [4, 5]), ([3], [6])], gold=[0]).collate([0])
    assert batch["input_ids"].tolist() == [[2, 3, 4, 3]] and batch["branch"].tolist() == [[1, 1, 1, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0]] and batch["sources"].tolist() == [[1, 2, 3]]


def test_questions_of_different_sizes_are_padded_and_fillers_are_nothing() -> None:
    given = examples(SHARED, SINGLE, gold=[1, 2])
    batch = given.collate([1, FILLER, 0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, PAD, PAD], [PAD] * 6, [1, 2, 3, 4, 6, 7]]
    assert batch["branch"].tolist()[:2] == [[0] * 4 + [NOTHING] * 2, [0] + [NOTHING] * 5]
    assert batch["options"].tolist() == [[0, 1, 2, NOTHING, NOTHING], [NOTHING] * 5, [0, 0, 1, 1, 1]]
    assert batch["lengths"].tolist() == [[3, 4, 5], [0, 0, 0], [1, 2, 0]]
    assert batch["gold"].tolist() == [2, 0, 1] and batch["example"].tolist() == [1, FILLER, 0]


def test_sizes_are_those_of_the_trees() -> None:
    rows, tokens = examples(SHARED, SINGLE, DIFFERENT, gold=[0, 0, 0]).sizes()
    assert rows.tolist() == [1, 1, 1] and tokens.tolist() == [6, 4, 6]
    assert examples(SHARED, SINGLE, gold=[0, 0]).num_scored([0, 1]) == 8


def test_widths_of_long_trees_are_rounded_up_and_count_as_tokens_of_a_batch() -> None:
    trunk = list(range(64))
    question = [(trunk, [70]), (trunk, [71, 72])]  # which has a branch of one token
    given = examples(*[question] * 12, gold=[0] * 12)
    assert given.sizes()[1].tolist() == [65] * 12 and given.width(65) == 80
    batches = list(EvaluationLoader(given, tokens=400))
    assert sorted(tuple(batch["input_ids"].shape) for batch in batches) == [(2, 80), (5, 80), (5, 80)]
