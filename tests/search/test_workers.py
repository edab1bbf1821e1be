"""What a worker does, in this process: it prepares itself, and whatever a trial raises is an outcome."""

import pickle

import pytest
from support.toys import Toy, Unpreparable, outcomes

from qpruner.errors import UserError
from qpruner.search.ledger import Key, Scores
from qpruner.search.workers import Outcome, SerialExecutor, evaluate, prepare


def test_a_trial_comes_back_as_plain_data() -> None:
    outcome = evaluate(lambda key: {"loss": key["x"], "pair": (1, 2)}, {"x": 0.5})
    assert outcome == Outcome(scores={"loss": 0.5, "pair": [1, 2]})


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (UserError("The loss is not finite.\nAnd more."), "The loss is not finite."),  # without the name of its class
        (LookupError("no such layer\nand more"), "LookupError: no such layer"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_is_told_in_a_line(error: Exception, why: str) -> None:
    def refused(key: Key) -> Scores:
        raise error

    outcome = evaluate(refused, {})
    assert (outcome.scores, outcome.why) == (None, why)
    assert "in refused" in outcome.details and "raise error" in outcome.details
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_scores_that_are_no_plain_data_are_an_error_of_the_trial() -> None:
    outcome = evaluate(lambda key: {"loss": object()}, {})  # type: ignore[dict-item]
    assert outcome.why == "TypeError: Object of type object is not JSON serializable"


def test_what_ends_a_process_is_no_outcome() -> None:
    def interrupted(key: Key) -> Scores:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(interrupted, {})


def test_one_prepares_itself_or_says_why_not() -> None:
    trial = prepare(Toy())
    assert not isinstance(trial, Exception) and trial({"choices": [1.3]}) == {"loss": 1.0}
    mistake, other = prepare(Unpreparable("user")), prepare(Unpreparable("other"))
    assert type(mistake) is UserError and str(mistake) == "There is no bank."
    assert type(other) is RuntimeError and "A worker could not prepare itself." in str(other)
    assert "disk on fire" in str(other)  # also in another process, where its cause is gone
    assert str(pickle.loads(pickle.dumps(other))) == str(other)


def test_trials_in_this_process_come_in_their_order_as_they_are_asked_for() -> None:
    ran: list[int] = []

    def trial(key: Key) -> Scores:
        ran.append(key["x"])
        return {"loss": 1 / key["x"]}

    executor = SerialExecutor(trial)
    answers = executor.run([{"x": 2}, {"x": 0}, {"x": 4}])
    assert next(answers) == (0, Outcome(scores={"loss": 0.5})) and ran == [2]
    (place, failed), last = answers
    assert place == 1 and failed.why == "ZeroDivisionError: division by zero"
    assert last == (2, Outcome(scores={"loss": 0.25})) and ran == [2, 0, 4]
    assert outcomes(SerialExecutor(Toy().prepare()), {}, {"do": "raise"})[0].scores == {"loss": 0.09}
