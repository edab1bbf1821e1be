"""Choice tasks from files, and which of their questions are for making choices and which for reported results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpruner.datamodules.documents import NOT_UNICODE, Skipped, is_unicode, kind, read_file
from qpruner.datamodules.questions import Question, find_task
from qpruner.errors import UserError
from qpruner.files import hash_file, hash_json

Part = Literal["validation", "test", "all"]
"""Which questions of a task: those for making choices, those for reported results, or all."""


@dataclass(frozen=True)
class ChoiceTasksConfig:
    """Choice tasks from files, which validation and test have in addition to text.

    ``FOLDER/TASK/`` has files named after their split, such as ``validation.jsonl`` and ``test.jsonl``, with the
    columns that the data set has on the hub. If there is only one of the two, half of its questions belong to
    validation and the other half to test; they are divided by their content, so no question is in both.

    Args:
        folder: folder with a folder for each task.
        names: names of the tasks: ``boolq``, ``piqa``, ``hellaswag``, ``winogrande``, ``arc_easy``, ``arc_challenge``,
            ``openbookqa``.
        items: most questions per task and split, the first ones in the order of the file; None for all.

    Raises:
        UserError: no names, a repeated name, an unknown one, or ``items`` below 1.
    """

    folder: str
    names: tuple[str, ...]
    items: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for name in self.names:
            find_task(name)
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"tasks.names is {list(self.names)}; give each task once, and at least one.")
        if self.items is not None and self.items < 1:
            raise UserError(f"tasks.items is {self.items}; it must be at least 1, or null for all questions.")


@dataclass(frozen=True)
class TaskQuestions:
    """The questions of a task that belong to a part.

    Args:
        questions: questions of the task.
        names: position of each question in its file, from 0.
        source: file that the questions were read from, with its SHA-256.
    """

    questions: tuple[Question, ...]
    names: tuple[int, ...]
    source: str

    def fingerprint(self) -> dict[str, Any]:
        """What the manifest of a run records about the questions."""
        content = [[each.contexts, each.continuations, each.gold] for each in self.questions]
        return {"questions": len(self.questions), "source": self.source, "sha256": hash_json(content)}


def read_task(folder: Path, name: str, part: Part, items: int | None = None) -> TaskQuestions:
    """Reads the questions of a task that belong to a part; see `ChoiceTasksConfig`.

    Args:
        folder: folder with a folder for each task.
        name: name of the task.
        part: part of the questions; ``all`` takes both files if there are two, that of validation first.
        items: most questions to read, the first ones; None for all.

    Raises:
        UserError: no such task or file, a record that is not a question, or no question for the part.
    """
    task = find_task(name)
    files = {split: file for split in ("validation", "test") if (file := _file_of(folder / name, split)) is not None}
    if not files:
        raise UserError(
            f"The task {name!r} has no file in {str(folder / name)!r}: give it validation.jsonl, test.jsonl, or both."
        )
    halved = len(files) == 1 and part != "all"
    paths = [files[part]] if part in files else list(files.values())
    questions: list[Question] = []
    names: list[int] = []
    skipped = Skipped()
    records = ((path, *placed) for path in paths for placed in read_file(path, skipped))
    for place, (path, where, record) in enumerate(records):
        if halved and _half(task.topic_of(record)) != part:
            continue
        if items is not None and len(questions) == items:
            break
        try:
            questions.append(_checked(task.question(record)))
        except UserError as error:
            raise UserError(f"{path.parent / where}: {error}") from error
        names.append(place)
    if skipped.counts:
        raise UserError(f"{str(folder / name)!r} has records that cannot be read: {skipped}. Mend or remove them.")
    if not questions:
        raise UserError(
            f"{str(folder / name)!r} has no questions for the {part} split of {name!r}. Give it more questions."
        )
    source = ", ".join(f"{path} sha256:{hash_file(path)[:16]}" for path in paths)
    return TaskQuestions(tuple(questions), tuple(names), source)


def _checked(question: Question) -> Question:
    """The question, once its texts are checked.

    Raises:
        UserError: it has a text that no tokenizer accepts.
    """
    if not all(map(is_unicode, (*question.contexts, *question.continuations))):
        raise UserError(f"It is a question {NOT_UNICODE}. Mend its text, or leave it out.")
    return question


def _file_of(folder: Path, split: str) -> Path | None:
    """The file of a task's split: named after it, perhaps with more after the name."""
    files = sorted(file for file in folder.glob(f"{split}*") if file.is_file() and kind(file))
    if len(files) > 1:
        raise UserError(
            f"{str(folder)!r} has several files of its {split} split: {', '.join(file.name for file in files)}. "
            f"Leave one of them there."
        )
    return files[0] if files else None


def _half(topic: list[str]) -> Part:
    """The part to which questions on a topic belong if both parts share a file."""
    return "validation" if int(hash_json(topic)[:8], 16) % 2 else "test"
