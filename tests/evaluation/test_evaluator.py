"""What an evaluator measures, against a plain reference, and which of it it does not measure again."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.choice_records import many_records, write_records
from support.ranks import together

from qpruner.datamodules.choice_tasks import TaskQuestions, read_task
from qpruner.datamodules.encoding import encode_pairs
from qpruner.datamodules.questions import TASKS, Question
from qpruner.errors import UserError
from qpruner.evaluation.evaluator import Evaluator
from qpruner.evaluation.subject import Subject
from qpruner.processes import Processes
from qpruner.records.evaluation import Evaluation, Item, items_file
from qpruner.schema import conform

ALONE = Processes.alone()


@pytest.fixture
def subject(tiny_llama: Path) -> Subject:
    return Subject.load(str(tiny_llama))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in TASKS:
        write_records(tmp_path / "tasks" / name / "test.jsonl", many_records(name, 12))
    return tmp_path / "tasks"


@torch.no_grad()
def likelihood(subject: Subject, context: str, continuation: str) -> float:
    ((before, tokens),) = encode_pairs(subject.tokenizer, [(context, continuation)])
    logits = subject.network(torch.tensor([before + tokens[:-1]])).logits[0, -len(tokens) :]
    return float(logits.log_softmax(-1)[range(len(tokens)), tokens].sum())


def answer(evaluator: Evaluator, name: str, questions: TaskQuestions) -> list[Item]:
    evaluator.task(evaluator.tokenize(name, TASKS[name].measure, questions), questions.source, "all")
    return items_of(evaluator.folder, name)


def items_of(folder: Path, name: str) -> list[Item]:
    return [conform(json.loads(line), Item) for line in items_file(folder, name).read_text().splitlines()]


def likeliest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_a_plain_reference_says(name: str, subject: Subject, folder: Path, tmp_path: Path) -> None:
    questions = read_task(folder, name, "all")
    evaluator = Evaluator(subject, ALONE, tmp_path / "out", batch_tokens=300)
    items = answer(evaluator, name, questions)
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item, question, place in zip(items, questions.questions, questions.names, strict=True):
        pairs = zip(question.contexts, question.continuations, strict=True)
        scores = [likelihood(subject, *pair) for pair in pairs]
        assert item.log_likelihoods == pytest.approx(scores, abs=1e-4)
        assert (item.item, item.gold, item.lengths) == (place, question.gold, question.lengths)
        right["acc"].append(likeliest(scores) == question.gold)
        by_length = [score / length for score, length in zip(scores, question.lengths, strict=True)]
        right["acc_norm"].append(likeliest(by_length) == question.gold)
    score = Evaluation.read(evaluator.path).tasks[name]
    assert (score.acc, score.acc_norm) == tuple(sum(right[way]) / 12 for way in ("acc", "acc_norm"))
    assert (score.items, score.measure, score.source) == (12, TASKS[name].measure, questions.source)
    assert f"| {name} " in (tmp_path / "out" / "report.md").read_text()


def test_batches_change_no_result(subject: Subject, folder: Path, tmp_path: Path) -> None:
    for name in ("hellaswag", "winogrande", "arc_challenge"):
        questions = read_task(folder, name, "all")
        small, large = (
            answer(Evaluator(subject, ALONE, tmp_path / str(size), batch_tokens=size), name, questions)
            for size in (1, 100_000)
        )
        for one, other in zip(small, large, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
            assert replace(one, log_likelihoods=other.log_likelihoods) == other


def test_processes_deal_the_questions_and_have_what_one_has(subject: Subject, folder: Path, tmp_path: Path) -> None:
    questions = read_task(folder, "arc_easy", "all")  # of three to five options
    alone = answer(Evaluator(subject, ALONE, tmp_path / "1", batch_tokens=200), "arc_easy", questions)
    answered: list[int] = []

    def work(processes: Processes) -> None:
        evaluator = Evaluator(subject, processes, tmp_path / "3", batch_tokens=200)
        examples = evaluator.tokenize("arc_easy", "acc", questions)
        collate = examples.collate
        object.__setattr__(examples, "collate", lambda numbers: answered.extend(numbers) or collate(numbers))
        evaluator.task(examples, questions.source, "all")

    assert together(work, work, work) == [None] * 3
    assert sorted(number for number in answered if number >= 0) == list(range(12))
    assert items_of(tmp_path / "3", "arc_easy") == alone


def test_what_was_answered_is_not_answered_again_unless_it_changed(
    subject: Subject, folder: Path, tmp_path: Path
) -> None:
    questions = read_task(folder, "piqa", "all")
    answer(Evaluator(subject, ALONE, tmp_path / "out", batch_tokens=300), "piqa", questions)

    def has(given: TaskQuestions, part: Any = "all") -> bool:
        return Evaluator(subject, ALONE, tmp_path / "out", batch_tokens=1).has_answered("piqa", given, part)

    assert has(questions)
    assert not has(read_task(folder, "piqa", "all", items=3))
    assert not has(questions, "validation")
    write_records(folder / "piqa" / "test.jsonl", many_records("piqa", 12, seed=1))
    assert not has(read_task(folder, "piqa", "all"))
    items_file(tmp_path / "out", "piqa").unlink()
    assert not has(questions)


def test_other_weights_and_another_writer_are_refused(subject: Subject, folder: Path, tmp_path: Path) -> None:
    questions = read_task(folder, "piqa", "all")
    begin: Callable[..., Evaluator] = lambda who, **options: Evaluator(  # noqa: E731
        who, ALONE, tmp_path / "out", batch_tokens=300, **options
    )
    evaluator = begin(subject)
    answer(evaluator, "piqa", questions)
    with pytest.raises(UserError, match="Another process writes its results into .*another --output"):
        begin(subject)
    evaluator._lock.release()
    other = replace(subject, identity="other", name="other")
    with pytest.raises(UserError, match=r"other weights, those of '.*tiny_llama'. Give another --output, or --restart"):
        begin(other)
    anew = begin(other, restart=True)
    assert anew.evaluation.tasks == {} and not items_file(tmp_path / "out", "piqa").exists()
    assert not anew.path.exists()  # so that what is left of the old can never pass for the new


def test_a_broken_model_has_no_accuracy(subject: Subject, folder: Path, tmp_path: Path) -> None:
    subject.network.model.norm.weight.data.fill_(math.nan)
    evaluator = Evaluator(subject, ALONE, tmp_path / "out", batch_tokens=300)
    answer(evaluator, "piqa", read_task(folder, "piqa", "all"))
    score = Evaluation.read(evaluator.path).tasks["piqa"]
    assert math.isnan(score.acc) and math.isnan(score.acc_norm)


def test_a_token_that_the_model_does_not_know(subject: Subject, tmp_path: Path) -> None:
    subject.network.resize_token_embeddings(20)
    questions = TaskQuestions((Question(("The cat",) * 2, (" sat", " ran"), (3, 3), 0),), (0,), "here")
    evaluator = Evaluator(subject, ALONE, tmp_path / "out", batch_tokens=300)
    with pytest.raises(UserError, match="The questions of 'piqa' have the token .* embedding of the model has 20 rows"):
        evaluator.tokenize("piqa", "acc", questions)
