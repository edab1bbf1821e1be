import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.choice_records import LOCAL, RECORDS, many_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpruner.adapters.lora import LoRAConfig
from qpruner.compressed import CompressedModel
from qpruner.datamodules.choice_tasks import TaskQuestions
from qpruner.datamodules.choices import ChoiceExamples
from qpruner.datamodules.encoding import encode_pairs
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.questions import TASKS, Question, Record
from qpruner.errors import UserError
from qpruner.evaluation.harness import Harness, HarnessScore
from qpruner.files import hash_file
from qpruner.model_folder import load_compressed
from qpruner.plan import UNITS, Precision
from qpruner.records.evaluation import accuracies
from qpruner.training.answers import option_log_likelihoods, tree_limit

# Run with `pip install -e '.[test,eval]'`.
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra `eval`")


@pytest.fixture(scope="module")
def table() -> Any:
    """The harness's table of tasks, which takes seconds to read."""
    tasks = pytest.importorskip("lm_eval.tasks")
    return tasks.TaskManager()


@pytest.fixture
def manager(table: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: table)
    return table


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """The records of the hub as local test files."""
    for name, lines in RECORDS.items():
        write(tmp_path / "records" / name / "test.jsonl", lines)
    return tmp_path / "records"


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def loaded(base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def likelihoods(model: Any, tokenizer: Any, name: str, records: Sequence[Record | Question]) -> list[tuple[float, ...]]:
    """What our own path gives for questions, which lie in batches and have their beginning in common."""
    given = [each if isinstance(each, Question) else TASKS[name].question(each) for each in records]
    questions = TaskQuestions(tuple(given), tuple(range(len(given))), "here")
    positions = model.config.max_position_embeddings
    examples = ChoiceExamples.of(name, TASKS[name].measure, questions, tokenizer, max_length=positions, pad_token=0)
    limit = tree_limit(model)
    scores: dict[int, tuple[float, ...]] = {}
    for batch in EvaluationLoader(examples, tokens=1000):
        with torch.no_grad():
            rows = option_log_likelihoods(model, batch, tree_limit=limit)
        for number, row, lengths in zip(batch["example"].tolist(), rows, batch["lengths"], strict=True):
            scores[number] = tuple(row[lengths > 0].tolist())
    return [scores[number] for number in range(len(given))]


def run_harness(
    model: Any, tokenizer: Any, tasks: list[str], folder: Path | None = None, **options: Any
) -> dict[str, HarnessScore]:
    """The scores of some tasks, by name."""
    harness = Harness.open(tasks, folder)
    scores: dict[str, HarnessScore] = {}
    for name in tasks:
        scores |= harness.run(model, tokenizer, name, **options)
    return scores


@needs_harness
@pytest.mark.parametrize("name", TASKS)
def test_questions_and_their_tokens_are_those_of_the_harness(name: str, tiny_llama: Path, manager: Any) -> None:
    import datasets
    from lm_eval.models.huggingface import HFLM

    data = {"validation": datasets.Dataset.from_list(RECORDS[name])}
    options = {"custom_dataset": lambda **_: data, "training_split": None, "test_split": None}
    task = manager.load({"group": "here", "task": [{"task": name, **options}]})["tasks"][name]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(rank=0, world_size=1)
    requests = [request.args for request in task.instances]
    questions = [TASKS[name].question(record) for record in RECORDS[name]]
    pairs = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
    assert pairs == requests
    assert [q.lengths for q in questions] == [tuple(map(len, task.doc_to_choice(doc))) for doc in task.eval_docs]
    gold = task.doc_to_text if name == "winogrande" else task.doc_to_target
    assert [q.gold for q in questions] == [gold(doc) for doc in task.eval_docs]
    model, tokenizer = loaded(tiny_llama)
    harnessed = HFLM(pretrained=model, tokenizer=tokenizer)
    assert encode_pairs(tokenizer, pairs) == [harnessed._encode_pair(*pair) for pair in requests]


@needs_harness
@pytest.mark.usefixtures("manager")
def test_every_task_is_scored_from_local_records_item_by_item(tiny_llama: Path, records: Path) -> None:
    compare_item_by_item(tiny_llama, records, RECORDS, positions=60)


@needs_harness
@pytest.mark.slow
@pytest.mark.usefixtures("manager")
def test_two_hundred_records_of_each_task_agree_item_by_item(tiny_llama: Path, tmp_path: Path) -> None:
    given = {name: [*RECORDS[name], *many_records(name, 200)] for name in TASKS}
    for name, lines in given.items():
        write(tmp_path / name / "test.jsonl", lines)
    compare_item_by_item(tiny_llama, tmp_path, given, positions=128)


def compare_item_by_item(base: Path, folder: Path, given: dict[str, list[dict[str, Any]]], *, positions: int) -> None:
    """The harness against our own path: tokens, likelihoods, options and right options of every question."""
    model, tokenizer = loaded(base)
    model.config.max_position_embeddings = positions  # some contexts are longer
    model.train()
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]
    scores = run_harness(model, tokenizer, list(TASKS), folder=folder, batch_size=32)
    assert [module.training for module in model.modules()] == training
    assert tokenizer.pad_token is None or tokenizer.pad_token == loaded(base)[1].pad_token
    model.eval()
    for name, task in TASKS.items():
        questions = [task.question(record) for record in given[name]]
        scored, own = scores[name], likelihoods(model, tokenizer, name, questions)
        assert [item.item for item in scored.items] == [*range(len(questions))]
        for item, question, expected in zip(scored.items, questions, own, strict=True):
            assert (item.gold, item.lengths) == (question.gold, question.lengths)
            assert item.log_likelihoods == pytest.approx(expected, abs=1e-3, rel=1e-5)
        assert scored.score is not None
        assert (scored.score.items, scored.score.measure, scored.score.split) == (len(questions), task.measure, "test")
        assert scored.score.source == f"test.jsonl, SHA-256 {hash_file(folder / name / 'test.jsonl')}"
        items = [replace(item, log_likelihoods=expected) for item, expected in zip(scored.items, own, strict=True)]
        for measure, share in accuracies(items).items():
            if measure in scored.metrics:
                assert getattr(scored.score, measure) == pytest.approx(scored.metrics[measure])
                assert share == pytest.approx(scored.metrics[measure])
        assert scored.metrics["acc_stderr"] >= 0
    assert {name for name, scored in scores.items() if "acc_norm" not in scored.metrics} == {"boolq", "winogrande"}


@needs_harness
@pytest.mark.usefixtures("manager")
def test_variants_of_the_records_and_a_limit(tiny_llama: Path, tmp_path: Path) -> None:
    for name, lines in LOCAL.items():
        write(tmp_path / name / "validation_2.jsonl", lines * 2)
    model, tokenizer = loaded(tiny_llama)
    scores = run_harness(model, tokenizer, list(LOCAL), folder=tmp_path, limit=1, num_fewshot=0)
    for name, (record,) in LOCAL.items():
        (item,), question = scores[name].items, TASKS[name].question(record)
        assert (item.gold, item.lengths) == (question.gold, question.lengths)
        (expected,) = likelihoods(model.eval(), tokenizer, name, [question])
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-4)
        score = scores[name].score
        assert score is not None and score.split == "validation"


@needs_harness
@pytest.mark.usefixtures("manager")
def test_a_compressed_model_with_adapters_is_scored(tiny_llama: Path, records: Path, tmp_path: Path) -> None:
    compressed = CompressedModel.load(str(tiny_llama), dtype="float32")
    plan = compressed.known_plan()
    plan = replace(
        plan.with_precision([dict.fromkeys(UNITS, Precision("nf4", 4, 64))] * len(plan.layers)),
        embedding=Precision("int8", 8),
        head=Precision("int8", 8),
    )
    compressed.quantize(plan, None, device=torch.device("cpu"))
    compressed.attach(LoRAConfig(r=2, dropout=0.5), seed=3)
    compressed.keep(tmp_path / "model", tokenizer=None, trained=True)
    model, tokenizer = load_compressed(tmp_path / "model"), AutoTokenizer.from_pretrained(tiny_llama)
    expected = likelihoods(model, tokenizer, "piqa", RECORDS["piqa"])
    (scored,) = run_harness(model, tokenizer, ["piqa"], folder=records).values()
    assert [item.log_likelihoods for item in scored.items] == [pytest.approx(e, abs=1e-4) for e in expected]


@needs_harness
@pytest.mark.usefixtures("manager")
def test_examples_before_a_question_change_it_and_are_never_the_question(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "arc_easy" / "test.jsonl", RECORDS["arc_easy"][:2])
    model, tokenizer = loaded(tiny_llama)
    (scored,) = run_harness(model, tokenizer, ["arc_easy"], folder=tmp_path, num_fewshot=1).values()
    first, second = (TASKS["arc_easy"].question(record) for record in RECORDS["arc_easy"][:2])
    example = f"{second.contexts[0]}{second.continuations[second.gold]}\n\n"
    behind = replace(first, contexts=tuple(example + context for context in first.contexts))
    (expected,) = likelihoods(model.eval(), tokenizer, "arc_easy", [behind])
    assert scored.items[0].log_likelihoods == pytest.approx(expected, abs=1e-4)


GROUP = """
group: both
task: [pairs, writing]
"""
PAIRS = """
task: pairs
custom_dataset: !function records.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["one", "two"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITING = """
task: writing
custom_dataset: !function records.load
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LOAD = """
import datasets

def load(**_):
    return {"test": datasets.Dataset.from_list([{"question": "How many?", "answer": n} for n in ("one", "two")])}
"""


@needs_harness
def test_groups_and_what_is_no_question_give_the_numbers_of_the_harness(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    for name, text in {"both.yaml": GROUP, "pairs.yaml": PAIRS, "writing.yaml": WRITING, "records.py": LOAD}.items():
        (tmp_path / name).write_text(text)
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: manager)
    model, tokenizer = loaded(tiny_llama)
    scores = run_harness(model, tokenizer, ["both"])
    pairs, writing = scores["pairs"], scores["writing"]
    assert [item.gold for item in pairs.items] == [0, 1] and {item.lengths for item in pairs.items} == {(3, 3)}
    assert pairs.score is not None
    # The same question with both answers: whatever the model says, it is right once.
    assert pairs.metrics["acc"] == pairs.score.acc == 0.5 and pairs.score.measure == "acc"
    assert writing.score is None and not writing.items
    assert writing.metrics["exact_match"] == 0.0
    with pytest.raises(UserError, match="'both' is a group of tasks; name its tasks"):
        run_harness(model, tokenizer, ["both"], folder=tmp_path)


@needs_harness
@pytest.mark.usefixtures("manager")
def test_what_cannot_be_scored_is_told_first(tmp_path: Path) -> None:
    def run(*tasks: str, folder: Path | None = tmp_path) -> None:
        run_harness(SimpleNamespace(), None, tasks, folder=folder)

    with pytest.raises(UserError, match=r"no task 'arc-easy'\. Did you mean 'arc_easy'\?"):
        run("arc-easy")
    with pytest.raises(UserError, match="no folder .*piqa.* with records of the task 'piqa'"):
        run("piqa")
    write(tmp_path / "piqa" / "train.jsonl", RECORDS["piqa"])
    with pytest.raises(UserError, match="no split to score. Name a file for it: test.jsonl"):
        run("piqa")
    write(tmp_path / "piqa" / "test.jsonl", [*RECORDS["piqa"], RECORDS["piqa"][0] | {"label": 5}])
    with pytest.raises(UserError, match=r"test.jsonl.*4.*Field 'label' is 5"):
        run("piqa")


def test_the_missing_extra_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"need the extra `eval`.*pip install 'qpruner\[eval\]'"):
        run_harness(SimpleNamespace(), None, ["piqa"])
