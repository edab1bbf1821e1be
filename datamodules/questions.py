"""Questions with options, and the tasks that are made of them: what a record becomes, as the harness has it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Measure = Literal["acc", "acc_norm"]
"""Which option is the answer: the likeliest, or the likeliest for its number of characters."""


@dataclass(frozen=True)
class Question:
    """A question with its options.

    Args:
        contexts: what stands before the scored text, for each option; all the same unless the options stand there.
        continuations: scored text of each option, with the space before it.
        lengths: characters of each option, by which ``acc_norm`` divides its log-likelihood.
        gold: place of the right option, from 0.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class ChoiceTask:
    """A task of questions with options.

    Args:
        question: makes a question of a record.
        measure: measure by which the task is usually reported.
    """

    question: Callable[[Mapping[str, Any]], Question]
    measure: Measure
