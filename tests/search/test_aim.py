"""What a search minimizes."""

import math
from typing import Any

import pytest

from qpruner.errors import UserError
from qpruner.search.aim import Aim, check_score

QUESTIONS = {"boolq": 100, "piqa": 25}


def scores(loss: float, boolq: float, piqa: float) -> dict[str, Any]:
    return {"loss": loss, "boolq/accuracy": boolq, "piqa/accuracy": piqa, "accuracy": (boolq + piqa) / 2}


def test_the_loss_is_minimized_as_it_is() -> None:
    aim = Aim.of("loss", {})
    assert aim.of_scores(scores(2.5, 0.1, 0.9)) == 2.5 and aim.accuracy(scores(2.5, 0.1, 0.9)) is None


def test_the_step_is_the_standard_error_of_the_weighted_accuracy() -> None:
    assert Aim.of("accuracy", QUESTIONS).step == pytest.approx(math.sqrt(0.05**2 / 4 + 0.1**2 / 4))
    weighted = Aim.of({"boolq": 3.0, "piqa": 1.0}, QUESTIONS)
    assert weighted.accuracy(scores(1.0, 0.6, 0.8)) == pytest.approx(0.65)
    assert weighted.step == pytest.approx(math.sqrt((0.75 * 0.05) ** 2 + (0.25 * 0.1) ** 2))
    assert Aim.of({"boolq": 2.0}, QUESTIONS) == Aim({"boolq": 1.0}, 0.05)


def test_accuracy_decides_beyond_its_error_and_loss_within() -> None:
    aim = Aim.of({"boolq": 1.0}, QUESTIONS)  # steps of 0.05
    better, same, worse = (
        aim.of_scores(scores(*values)) for values in ((9.0, 0.66, 0.5), (1.0, 0.64, 0.5), (8.0, 0.62, 0.5))
    )
    assert better < same < worse  # 0.66 is a step above the other two, which the loss tells apart
    assert aim.of_scores(scores(1.0, 0.62, 0.5)) == same
    assert aim.value(1.0, 0.64) == pytest.approx(0.05 * (7 + 0.5))
    assert aim.value(1.0, 0.65) == pytest.approx(0.05 * (7 + 0.5))  # although 0.35 / 0.05 is 6.999... in floats


@pytest.mark.parametrize(
    ("score", "questions", "message"),
    [
        ("accuracy", {}, "have no questions. Give --data.tasks.folder"),
        ({"bolq": 1.0}, QUESTIONS, "names the task 'bolq'.* Did you mean 'boolq'?"),
    ],
)
def test_tasks_that_are_not_there_are_refused(score: Any, questions: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Aim.of(score, questions)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("acuracy", "must be loss, accuracy, or tasks.* Did you mean 'accuracy'?"),
        ({}, "at least one task"),
        ({"boolq": 0.0}, "a weight above 0"),
        ({"boolq": math.nan}, "a weight above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(score: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_score(score)
