"""Questions with options, and the tasks made of them: records become questions exactly as in lm-evaluation-harness.

A record has the fields that its data set has on the Hugging Face hub. Two variants are also read: BoolQ with a Boolean
``answer`` in place of ``label``, and HellaSwag whose text has already been cleaned, with ``ctx`` alone in place of
``ctx_a`` and ``ctx_b``. A label may be a number or a string of digits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qpruner.errors import UserError, brief, cut, nearest

Measure = Literal["acc", "acc_norm"]
"""Which option counts as the answer: the likeliest, or the likeliest relative to its number of characters."""
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A question with its options.

    Args:
        contexts: text before the scored text, for each option; the same for all unless it contains the options.
        continuations: scored text of each option, with the space before it.
        lengths: number of characters of each option, by which ``acc_norm`` divides its log-likelihood.
        gold: index of the right option, from 0.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class ChoiceTask:
    """A task of questions with options.

    Args:
        question: function that makes a question of a record; raises a `UserError` that says what is wrong with it.
        measure: measure by which the task is usually reported.
        topic: fields that say what a question is about; questions with the same values of these fields, in any order,
            belong together.
    """

    question: Callable[[Record], Question]
    measure: Measure
    topic: tuple[str, ...]

    def topic_of(self, record: Record) -> list[str]:
        """What a question is about, as text."""
        return sorted(str(record.get(name)) for name in self.topic)


def find_task(name: str) -> ChoiceTask:
    """The task with this name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; there are {', '.join(TASKS)}.{nearest(name, TASKS)}")
    return TASKS[name]


def asked(context: str, options: Sequence[str], gold: int) -> Question:
    """The question whose options all continue the same context, after a space.

    Args:
        context: text before each option.
        options: text of each option.
        gold: index of the right option, from 0.

    Raises:
        UserError: there are fewer than two options, or one of them is empty.
    """
    return _question([context] * len(options), [f" {option}" for option in options], options, gold)


def _question(contexts: Sequence[str], continuations: Sequence[str], options: Sequence[str], gold: int) -> Question:
    if len(options) < 2:
        raise UserError(f"A question needs at least two options; it has {len(options)}.")
    if "" in options:
        raise UserError(f"Option {options.index('') + 1} of {len(options)} is empty.")
    return Question(tuple(contexts), tuple(continuations), tuple(map(len, options)), gold)


def _boolq(record: Record) -> Question:
    gold = _place(record, "answer" if "answer" in record and "label" not in record else "label", ("no", "yes"))
    return asked(f"{_text(record, 'passage')}\nQuestion: {_text(record, 'question')}?\nAnswer:", ("no", "yes"), gold)


def _piqa(record: Record) -> Question:
    options = (_text(record, "sol1"), _text(record, "sol2"))
    return asked(f"Question: {_text(record, 'goal')}\nAnswer:", options, _place(record, "label", options))


def _hellaswag(record: Record) -> Question:
    label, endings = _text(record, "activity_label"), _texts(record, "endings")
    if "ctx_a" in record or "ctx" not in record:
        context = _cleaned(f"{label}: {_text(record, 'ctx_a')} {_text(record, 'ctx_b').capitalize()}")
        endings = [_cleaned(ending) for ending in endings]
    else:
        context = f"{label}: {_text(record, 'ctx')}"
    return asked(context, endings, _place(record, "label", endings))


def _cleaned(text: str) -> str:
    """The text without remnants of WikiHow's mark-up: ``[title]`` ends a sentence, other brackets mean nothing."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(record: Record) -> Question:
    """Scores what follows the gap, with each option in it (partial evaluation, arXiv 1806.02847, section 3)."""
    before, gap, behind = _text(record, "sentence").partition("_")
    if not gap:
        raise UserError("Its sentence has no gap; a gap is written as '_'.")
    contexts = [before + _text(record, name) for name in ("option1", "option2")]
    answer = _place(record, "answer", contexts, first=1)
    return _question(contexts, [f" {behind.strip()}"] * 2, contexts, answer)


def _arc(record: Record) -> Question:
    return asked(f"Question: {_text(record, 'question')}\nAnswer:", *_choices(record))


def _openbookqa(record: Record) -> Question:
    return asked(_text(record, "question_stem"), *_choices(record))


def _choices(record: Record) -> tuple[list[str], int]:
    """The options of a record and the index of the right one, which the record names by a letter or a number."""
    choices = _field(record, "choices")
    if not isinstance(choices, Mapping):
        raise UserError(f"Field 'choices' is {brief(choices)}; it must have a list 'text' and a list 'label'.")
    options, labels = _texts(choices, "text"), _texts(choices, "label")
    answer = _text(record, "answerKey").strip()
    if len(labels) != len(options):
        raise UserError(f"It has {len(options)} options and {len(labels)} labels.")
    if answer not in labels:
        raise UserError(
            f"Field 'answerKey' is {answer!r}; it must be one of {brief(labels)}, the labels of its options."
        )
    return options, labels.index(answer)


def _place(record: Record, name: str, options: Sequence[str], first: int = 0) -> int:
    """The index of the right option, from 0, given in a field that counts from ``first``."""
    value = _field(record, name)
    number = int(value) if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()) else None
    if number is None or not 0 <= number - first < len(options):
        wanted = f"from {first} to {len(options) - 1 + first}, the number of the right option"
        raise UserError(f"Field {name!r} is {brief(value)}; it must be {wanted}.")
    return number - first


def _text(record: Record, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise UserError(f"Field {name!r} is {brief(value)}; it must be a text.")
    return value


def _texts(record: Record, name: str) -> list[str]:
    value = _field(record, name)
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value) or isinstance(value, str):
        raise UserError(f"Field {name!r} is {brief(value)}; it must be a list of texts.")
    return list(value)


def _field(record: Record, name: str) -> Any:
    if record.get(name) is None:
        raise UserError(f"It has no field {name!r}; its fields are {cut(', '.join(map(str, record))) or 'none'}.")
    return record[name]


TASKS: dict[str, ChoiceTask] = {
    "boolq": ChoiceTask(_boolq, "acc", ("passage",)),
    "piqa": ChoiceTask(_piqa, "acc_norm", ("goal",)),
    "hellaswag": ChoiceTask(_hellaswag, "acc_norm", ("activity_label", "ctx")),
    "winogrande": ChoiceTask(_winogrande, "acc", ("option1", "option2")),
    "arc_easy": ChoiceTask(_arc, "acc", ("question",)),
    "arc_challenge": ChoiceTask(_arc, "acc_norm", ("question",)),
    "openbookqa": ChoiceTask(_openbookqa, "acc_norm", ("question_stem",)),
}
"""The seven tasks of LLM-Pruner's and QPruner's tables, in order, with the prompts of lm-evaluation-harness 0.4.13.

The papers do not say which accuracy they report; the measures are those that are usual for these tasks. The harness has
no ``acc_norm`` for BoolQ and WinoGrande. For WinoGrande it is defined here as the harness's rule would have it: the
option is the sentence up to and including the word in the gap, and its characters are counted.
"""
