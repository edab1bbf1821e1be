"""The objective of a search: the loss on validation text, or one minus accuracy on tasks as far as items resolve it.

A few hundred questions resolve accuracies only down to their standard error, and of many plans, the one with the best
accuracy is the luckiest one. Accuracies are therefore compared in steps of that error, which depends on the number
of questions, and within a step the loss decides:

    value = e floor((1 - a) / e) + e loss / (1 + loss),   a = sum of w_t a_t,   e^2 = sum of w_t^2 / (4 n_t),

with the accuracy a_t of task t, its number of questions n_t, and weights w_t that sum to 1. 1/4 is the largest variance
that the answer to a question can have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qpruner.errors import UserError, nearest

ScoreOption = str | dict[str, float]
"""``loss``, ``accuracy`` for the mean over all tasks, or a mapping from tasks to their weights."""


@dataclass(frozen=True)
class Aim:
    """The objective that a search minimizes.

    Args:
        weights: weight of each task; the weights sum to 1. Empty for the loss alone.
        step: standard error of the weighted accuracy; 0 for the loss alone.
    """

    weights: dict[str, float]
    step: float

    @classmethod
    def of(cls, score: ScoreOption, questions: Mapping[str, int]) -> Self:
        """The objective that the ``score`` option of a search asks for.

        Args:
            score: ``score`` option of the search.
            questions: number of questions of each task in the validation split.

        Raises:
            UserError: there are no tasks, or the option names tasks that are not there.
        """
        if score == "loss":
            return cls({}, 0.0)
        if not questions:
            raise UserError(
                f"search.score is {score!r}, and the validation data have no questions. Give --data.tasks.folder and "
                f"--data.tasks.names, or score by loss."
            )
        weights = dict.fromkeys(questions, 1.0) if isinstance(score, str) else score
        for name in weights:
            if name not in questions:
                raise UserError(
                    f"search.score names the task {name!r}; the validation data have {', '.join(questions)}."
                    f"{nearest(name, questions)}"
                )
        total = sum(weights.values())
        shares = {name: weight / total for name, weight in weights.items()}
        return cls(shares, math.sqrt(sum(share**2 / (4 * questions[name]) for name, share in shares.items())))

    def accuracy(self, scores: Mapping[str, Any]) -> float | None:
        """The weighted accuracy from the scores of a trial; None for the loss alone."""
        if not self.weights:
            return None
        return sum(share * float(scores[f"{name}/accuracy"]) for name, share in self.weights.items())

    def value(self, loss: float, accuracy: float | None) -> float:
        """The value that is minimized.

        Args:
            loss: loss on the validation text.
            accuracy: weighted accuracy; None for the loss alone.
        """
        if accuracy is None:
            return loss
        # A quotient that should be a whole number may have been rounded to just below it.
        steps = math.floor((1 - accuracy) / self.step + 1e-9)
        return self.step * (steps + loss / (1 + loss))

    def of_scores(self, scores: Mapping[str, Any]) -> float:
        """The value that is minimized, computed from the scores of one trial."""
        return self.value(scores["loss"], self.accuracy(scores))


def check_score(score: ScoreOption) -> None:
    """Checks that the ``score`` option of a search is meaningful.

    Raises:
        UserError: an unknown word, no tasks, or a weight that is not above 0.
    """
    if isinstance(score, str):
        if score not in ("loss", "accuracy"):
            raise UserError(
                f"search.score is {score!r}; it must be loss, accuracy, or tasks with their weights such as "
                f"{{boolq: 1, winogrande: 1}}.{nearest(score, ('loss', 'accuracy'))}"
            )
    elif not score or not all(math.isfinite(weight) and weight > 0 for weight in score.values()):
        raise UserError(f"search.score is {score}; give each task a weight above 0, and at least one task.")
