"""Choice tasks from files: which questions belong to which part, and what a data module makes of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.choice_records import RECORDS, many_records, write_records
from transformers import AutoConfig

from qpruner.commands import run
from qpruner.datamodules import ChoiceTasksDataModule
from qpruner.datamodules.choice_tasks import ChoiceTasksConfig, Part, read_task
from qpruner.datamodules.encoding import encode_pairs
from qpruner.datamodules.questions import TASKS, Question
from qpruner.errors import UserError
from qpruner.files import hash_file, read_json


def names(folder: Path, part: Part, items: int | None = None, task: str = "piqa") -> list[int]:
    return list(read_task(folder, task, part, items).names)


def questions(records: list[dict[str, Any]], task: str = "piqa") -> list[Question]:
    return [TASKS[task].question(record) for record in records]


# Parts.


def test_of_two_files_validation_chooses_and_test_is_reported(tmp_path: Path) -> None:
    records = many_records("piqa", 7)
    write_records(tmp_path / "piqa" / "validation_1000.jsonl.gz", records[:3])
    write_records(tmp_path / "piqa" / "test.jsonl", records[3:])
    validation, test, everything = (read_task(tmp_path, "piqa", part) for part in ("validation", "test", "all"))
    assert list(validation.questions) == questions(records[:3]) and validation.names == (0, 1, 2)
    assert list(test.questions) == questions(records[3:]) and test.names == (0, 1, 2, 3)
    assert list(everything.questions) == questions(records) and everything.names == tuple(range(7))
    file = tmp_path / "piqa" / "test.jsonl"
    assert test.source == f"{file} sha256:{hash_file(file)[:16]}"
    assert everything.source == f"{validation.source}, {test.source}"


@pytest.mark.parametrize("file", ["validation.jsonl", "test-00000-of-00001.jsonl", "validation_1000.jsonl.gz"])
def test_half_of_a_single_file_chooses_and_the_other_half_is_reported(file: str, tmp_path: Path) -> None:
    records = many_records("arc_easy", 200)
    write_records(tmp_path / "arc_easy" / file, records)
    chosen, reported, everything = (names(tmp_path, part, task="arc_easy") for part in ("validation", "test", "all"))
    assert sorted(chosen + reported) == everything == list(range(200))
    assert 70 < len(chosen) < 130
    halves = [read_task(tmp_path, "arc_easy", part).questions for part in ("validation", "test")]
    assert not set(halves[0]) & set(halves[1])
    assert list(halves[0]) == questions([records[place] for place in chosen], "arc_easy")


def test_questions_on_one_topic_stay_together(tmp_path: Path) -> None:
    passages = [f"Passage {number} of some length." for number in range(40)]
    boolq = [{"passage": p, "question": f"is it {n}", "answer": n > 1} for p in passages for n in range(3)]
    twins = [
        {"sentence": f"{a} and {b} saw _ {word}.", "option1": first, "option2": second, "answer": "1"}
        for a, b in ((f"Ann{number}", f"Bob{number}") for number in range(40))
        for word, first, second in (("run", a, b), ("walk", b, a))
    ]
    for task, records, size in (("boolq", boolq, 3), ("winogrande", twins, 2)):
        write_records(tmp_path / task / "validation.jsonl", records)
        chosen, reported = (names(tmp_path, part, task=task) for part in ("validation", "test"))
        assert not {place // size for place in chosen} & {place // size for place in reported}
        assert chosen and reported


def test_halves_are_told_apart_by_content_alone(tmp_path: Path) -> None:
    records = many_records("piqa", 60)

    def half(*given: dict[str, Any]) -> set[Question]:
        write_records(tmp_path / "piqa" / "test.jsonl", given)
        return set(read_task(tmp_path, "piqa", "validation").questions)

    before = half(*records)
    assert half(*reversed(records)) == before
    assert half(*many_records("piqa", 30, seed=1), *records) & set(questions(records)) == before
    # Neither its number in another edition nor the order of its fields moves a question, and copies stay together.
    assert half(*({"idx": place, **dict(reversed(record.items()))} for place, record in enumerate(records))) == before
    assert half(*records, *records) == before


def test_items_are_the_first_of_the_part(tmp_path: Path) -> None:
    write_records(tmp_path / "piqa" / "test.jsonl", many_records("piqa", 40))
    for part in ("validation", "test", "all"):
        assert names(tmp_path, part, 5) == names(tmp_path, part)[:5]
    assert names(tmp_path, "all", 1000) == list(range(40))


# What is wrong with files.


def test_files_that_cannot_be_told_apart_or_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'piqa' has no file in .*piqa'.*validation.jsonl, test.jsonl, or both"):
        read_task(tmp_path, "piqa", "test")
    write_records(tmp_path / "piqa" / "train.jsonl", many_records("piqa", 2))
    with pytest.raises(UserError, match="has no file"):
        read_task(tmp_path, "piqa", "test")
    for file in ("test.jsonl", "test_2.jsonl", "test.txt.bak"):
        write_records(tmp_path / "piqa" / file, many_records("piqa", 2))
    with pytest.raises(UserError, match="several files of its test split: test.jsonl, test_2.jsonl. Leave one"):
        read_task(tmp_path, "piqa", "validation")


def without(record: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != field}


SINGLE = {"text": ["a"], "label": ["A"]}


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        ("piqa", without(RECORDS["piqa"][0], "label"), "no field 'label'; its fields are goal, sol1, sol2"),
        ("piqa", RECORDS["piqa"][0] | {"label": -1}, "Field 'label' is -1; it must be from 0 to 1"),
        ("arc_easy", RECORDS["arc_easy"][0] | {"answerKey": "A", "choices": SINGLE}, "at least two options; it has 1"),
        ("winogrande", RECORDS["winogrande"][0] | {"sentence": "No gap."}, "no gap"),
        ("hellaswag", RECORDS["hellaswag"][0] | {"endings": ["a", ""], "label": 0}, "Option 2 of 2 is empty"),
        ("piqa", RECORDS["piqa"][0] | {"sol2": "half \ud800"}, "with half a surrogate pair, which is no Unicode text"),
    ],
)
def test_a_record_that_is_no_question_is_named_by_file_and_line(
    task: str, record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = tmp_path / task / "validation.jsonl"
    write_records(file, [*RECORDS[task], record])
    with pytest.raises(UserError) as raised:
        read_task(tmp_path, task, "all")
    assert said in str(raised.value) and f"{file}" in str(raised.value) and "line 4" in str(raised.value)


def test_lines_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "piqa" / "test.jsonl"
    write_records(file, RECORDS["piqa"])
    file.write_text(file.read_text() + '{"goal": \n[1]\n')
    with pytest.raises(UserError, match=r"piqa' has records that cannot be read: .*test.jsonl line 4.*Mend or remove"):
        read_task(tmp_path, "piqa", "all")


def test_no_questions_left_for_a_part(tmp_path: Path) -> None:
    file = tmp_path / "piqa" / "test.jsonl"
    write_records(file, RECORDS["piqa"][:1])
    parts: list[Part] = ["validation", "test"]
    refused = []
    for part in parts:
        try:
            assert names(tmp_path, part) == [0]
        except UserError as error:
            refused.append(str(error))
    assert len(refused) == 1 and "has no questions for the" in refused[0] and str(file.parent) in refused[0]
    file.write_text("")
    with pytest.raises(UserError, match="has no questions for the all split of 'piqa'. Give it more questions"):
        read_task(tmp_path, "piqa", "all")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": ["boolqq"]}, r"There is no task 'boolqq'; there are boolq, .* Did you mean 'boolq'\?"),
        ({"names": ["piqa", "piqa"]}, r"tasks.names is \['piqa', 'piqa'\]; give each task once"),
        ({"names": []}, r"tasks.names is \[\]; .* at least one"),
        ({"names": ["piqa"], "items": 0}, "tasks.items is 0; it must be at least 1"),
    ],
)
def test_mistakes_in_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ChoiceTasksConfig("folder", **options)


# Data modules.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """PIQA in one file, OpenBookQA in two."""
    write_records(tmp_path / "zeroshot" / "piqa" / "validation.jsonl", many_records("piqa", 24))
    for split, seed in (("validation", 1), ("test", 2)):
        file = tmp_path / "zeroshot" / "openbookqa" / f"{split}.jsonl"
        write_records(file, many_records("openbookqa", 5, seed))
    return tmp_path / "zeroshot"


def test_the_fingerprint_says_what_chooses_and_what_is_reported(folder: Path, tiny_llama: Path) -> None:
    tasks = ChoiceTasksConfig(str(folder), ("piqa", "openbookqa"), items=4)
    fingerprint = ChoiceTasksDataModule(tasks, tokenizer=str(tiny_llama)).fingerprint()
    assert [*fingerprint] == ["validation tasks", "test tasks"]
    for task in tasks.names:
        chosen, reported = (fingerprint[f"{split} tasks"][task] for split in ("validation", "test"))
        assert (chosen["questions"], reported["questions"]) == (4, 4)
        assert chosen["sha256"] != reported["sha256"]
        assert (chosen["source"] == reported["source"]) == (task == "piqa")
    again = ChoiceTasksDataModule(tasks, tokenizer=str(tiny_llama)).fingerprint()
    assert again == fingerprint
    # Of what was asked, not of the file.
    write_records(folder / "piqa" / "validation.jsonl", many_records("piqa", 25))
    hashes = [
        each["test tasks"]["piqa"]["sha256"]
        for each in (again, ChoiceTasksDataModule(tasks, tokenizer=str(tiny_llama)).fingerprint())
    ]
    assert hashes[0] == hashes[1]


def test_questions_that_are_too_long_lose_their_beginning_as_in_the_harness(
    folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("qpruner.datamodules.base.rank_zero_info", said.append)
    data = ChoiceTasksDataModule(ChoiceTasksConfig(str(folder), ("openbookqa",)), tokenizer=str(tiny_llama))
    config = AutoConfig.from_pretrained(tiny_llama)
    config.max_position_embeddings = 30
    data.check_model(config)
    (examples,) = data.choices("test")
    given = read_task(folder, "openbookqa", "test").questions
    rows, long = [], 0
    for question in given:
        pairs = encode_pairs(data.tokenizer, list(zip(question.contexts, question.continuations, strict=True)))
        rows += [(context + option)[-31:] for context, option in pairs]
        long += any(len(context + option) > 31 for context, option in pairs)
    assert [examples.rows.tokens[slice(*examples.rows.offsets[n : n + 2])].tolist() for n in range(20)] == rows
    assert examples.cut == long and 0 < long < 5
    assert f"openbookqa: {long} of 5 questions are longer than the 30 positions of the model" in said[0]
    config.max_position_embeddings = 2
    data.check_model(config)
    with pytest.raises(UserError, match="An option has .* tokens, and the model can be given 2"):
        data.choices("test")


def test_tasks_alone_are_tested(folder: Path, config: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"folder": str(folder), "names": ["piqa", "openbookqa"], "items": 5}
    config["data"] = {"class_path": "ChoiceTasksDataModule", "init_args": {"tasks": tasks}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for command in ("test", "validate"):
        run([command, "--config", str(path)])
        (stage,) = read_json(tmp_path / "runs" / "x" / f"{command}.json")["stages"]
        results = stage["results"]
        assert "perplexity" not in results and (results["piqa/examples"], results["openbookqa/examples"]) == (5, 5)
        assert results["accuracy"] == pytest.approx((results["piqa/acc_norm"] + results["openbookqa/acc_norm"]) / 2)
