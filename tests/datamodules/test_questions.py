from typing import Any

import pytest
from support.choice_records import LOCAL, RECORDS

from qpruner.datamodules.questions import TASKS, Question, asked, find_task
from qpruner.errors import UserError


def question(task: str, number: int = 0, **changes: Any) -> Question:
    return TASKS[task].question(RECORDS[task][number] | changes)


def test_boolq_asks_for_no_or_yes_behind_the_passage() -> None:
    context = "A bee is an insect. -- Bees make honey.\nQuestion: do bees make honey?\nAnswer:"
    assert question("boolq") == Question((context, context), (" no", " yes"), (2, 3), 1)
    assert TASKS["boolq"].question(LOCAL["boolq"][0]).gold == 1
    assert TASKS["boolq"].question(LOCAL["boolq"][0] | {"answer": False}).gold == 0


def test_piqa_keeps_the_spaces_of_its_solutions() -> None:
    context = "Question: To boil an egg\nAnswer:"
    solutions = ("put it into boiling water", "put it into the freezer ")
    assert question("piqa") == Question((context,) * 2, tuple(f" {s}" for s in solutions), (25, 24), 0)
    assert question("piqa", label="1").gold == 1


def test_hellaswag_is_cleaned_of_its_markers() -> None:
    context = "Roof shingle removal: A man is sitting on a roof. He"
    assert question("hellaswag") == Question(
        (context,) * 4, (" falls.", " eats.", " sings.", " pulls."), (6, 5, 6, 6), 3
    )
    marked = question("hellaswag", 1)
    assert set(marked.contexts) == {"Home and Garden: How to paint a wall. Buy Paint. Ask the shop."}
    expected = ("  Take a brush. Begin.", " Wait first.", " Sleep. Wake up.", " Paint  the neighbour.")
    assert marked.continuations == expected
    assert marked.lengths == tuple(len(text) - 1 for text in expected)
    # A bracket that closes nothing stays; what follows the first letter of the second part becomes small.
    assert question("hellaswag", 2).contexts[0] == "Sumo: Two men meet in a ring] The smaller one "


def test_hellaswag_that_was_cleaned_before_is_left_as_it_is() -> None:
    cleaned = TASKS["hellaswag"].question(LOCAL["hellaswag"][0])
    assert set(cleaned.contexts) == {"Sumo: Two men  meet. The"}
    assert cleaned.continuations == (" men bow  low.", " ring [wooden] falls.", " end", " start")
    assert cleaned.gold == 1


def test_winogrande_scores_what_follows_each_option() -> None:
    before = "Sarah was a better surgeon than Maria so "
    assert question("winogrande") == Question(
        (before + "Sarah", before + "Maria"), (" got the easier cases.",) * 2, (len(before) + 5,) * 2, 1
    )
    assert question("winogrande", 2).continuations == (" was weak; a_b.",) * 2
    assert question("winogrande", answer=1).gold == 0


def test_arc_and_openbookqa_name_the_right_option_by_its_label() -> None:
    context = "Question: What do plants need?\nAnswer:"
    assert question("arc_easy", 1) == Question((context,) * 3, (" sugar", " light", " milk"), (5, 5, 4), 1)
    assert question("arc_challenge").gold == 1
    assert [question("arc_easy", number).gold for number in range(3)] == [2, 1, 4]
    spaced = question("openbookqa", 1)
    assert spaced.contexts[0] == "Gas can fill any container, and liquid " and spaced.gold == 0


def test_the_usual_measure_is_by_characters_where_options_are_sentences() -> None:
    assert {name for name, task in TASKS.items() if task.measure == "acc"} == {"boolq", "winogrande", "arc_easy"}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("boolq", {"label": -1}, "Field 'label' is -1; it must be from 0 to 1"),
        ("boolq", {"label": None}, "no field 'label'; its fields are question, passage, label"),
        ("piqa", {"label": 2}, "Field 'label' is 2; it must be from 0 to 1"),
        ("piqa", {"sol2": ""}, "Option 2 of 2 is empty"),
        ("piqa", {"goal": 3}, "Field 'goal' is 3; it must be a text"),
        ("hellaswag", {"label": ""}, "Field 'label' is ''; it must be from 0 to 3"),
        ("hellaswag", {"label": 1.0}, "Field 'label' is 1.0"),
        ("hellaswag", {"endings": "falls."}, "must be a list of texts"),
        ("hellaswag", {"endings": ["falls."], "label": 0}, "at least two options; it has 1"),
        ("winogrande", {"sentence": "No gap."}, "no gap"),
        ("winogrande", {"answer": ""}, "Field 'answer' is ''; it must be from 1 to 2"),
        ("winogrande", {"answer": "0"}, "Field 'answer' is '0'; it must be from 1 to 2"),
        ("arc_easy", {"answerKey": "F"}, r"'answerKey' is 'F'; it must be one of \['A', 'B', 'C', 'D'\]"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 options and 1 labels"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["C"]}}, "at least two options; it has 1"),
        ("arc_easy", {"choices": ["a", "b"]}, "must have a list 'text' and a list 'label'"),
        ("openbookqa", {"choices": {"label": ["A"]}}, "no field 'text'; its fields are label"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        question(task, **changes)


def test_the_fields_of_a_record_are_named_where_one_is_missing() -> None:
    with pytest.raises(UserError, match="no field 'activity_label'; its fields are text, label"):
        TASKS["hellaswag"].question({"text": "a", "label": 0})
    with pytest.raises(UserError, match="no field 'label'; its fields are none"):
        TASKS["boolq"].question({})


def test_other_questions_are_asked_alike() -> None:
    assert asked("Who?", ("I", "you"), 1) == Question(("Who?", "Who?"), (" I", " you"), (1, 3), 1)


def test_a_task_is_known_by_its_name() -> None:
    assert find_task("piqa") is TASKS["piqa"]
    with pytest.raises(UserError, match=r"no task 'arc-easy'; there are boolq, .*Did you mean 'arc_easy'\?"):
        find_task("arc-easy")
