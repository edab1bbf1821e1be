import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qpruner.datamodules import TextDataModule
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

STORIES = ["One day Tom went home.", "Max had six stamps and looked a little sad.", "It was raining."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED)


def make(**options: Any) -> TextDataModule:
    return TextDataModule(tokenizer=EMBEDDED, **options)


def rows(module: TextDataModule, split: Any) -> list[list[int]]:
    found = module.examples(split).rows
    return [found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist() for i in range(len(found))]


@pytest.fixture
def stories_file(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(f"\n {story}\n" for story in STORIES) + "<|endoftext|>\n")
    return path


def test_one_document_a_row_cut_at_the_length(stories_file: Path, tokenizer: Any) -> None:
    module = make(test=str(stories_file), layout="per_document", separator="<|endoftext|>", max_length=7)
    expected = [tokenizer(story)["input_ids"] for story in STORIES]
    assert {len(row) > 7 for row in expected} == {True, False}
    assert rows(module, "test") == [row[:7] for row in expected]
    assert module.protocol == "one document a row, cut at 7 tokens, first token of a row not scored"


def test_a_row_that_is_not_cut_can_end_with_the_end_of_text(stories_file: Path, tokenizer: Any) -> None:
    module = make(
        test=str(stories_file), layout="per_document", separator="<|endoftext|>", max_length=7, end_token=True
    )
    whole = [tokenizer(story)["input_ids"] + [tokenizer.eos_token_id] for story in STORIES]
    assert rows(module, "test") == [row[:7] for row in whole]
    assert {len(row) <= 7 for row in whole} == {True, False}


def test_packed_rows_are_cut_from_the_documents_joined_by_the_end_of_text(stories_file: Path, tokenizer: Any) -> None:
    module = make(test=str(stories_file), separator="<|endoftext|>", max_length=5)
    stream: list[int] = []
    for story in STORIES:
        stream += ([tokenizer.eos_token_id] if stream else []) + tokenizer(story)["input_ids"]
    assert rows(module, "test") == [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]
    assert module.protocol == "packed rows of 5 tokens, stride 5, first token of a row not scored"


def test_without_a_separator_a_text_file_is_one_document(stories_file: Path, tokenizer: Any) -> None:
    module = make(test=str(stories_file), max_length=5)
    stream = tokenizer(stories_file.read_text())["input_ids"]
    assert rows(module, "test") == [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]


@pytest.mark.parametrize("kind", [".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".parquet", "folder"])
def test_every_kind_of_source_gives_the_same_rows(stories_file: Path, tmp_path: Path, kind: str) -> None:
    options = {"layout": "per_document", "separator": "<|endoftext|>"}
    expected = rows(make(test=str(stories_file), **options), "test")
    records = [{"id": n, "body": story} for n, story in enumerate(STORIES)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / f"data{kind}"
    match kind:
        case ".txt.gz":
            path.write_bytes(gzip.compress(stories_file.read_bytes()))
        case ".jsonl":
            path.write_text(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps(records))
        case ".parquet":
            import datasets

            datasets.Dataset.from_list(records).to_parquet(path)
        case "folder":
            path.mkdir()
            (path / "a.jsonl").write_text(lines[: lines.index("\n") + 1])
            (path / "b.jsonl").write_text(lines[lines.index("\n") + 1 :])
    column = {} if kind == ".txt.gz" else {"text_column": "body"}
    assert rows(make(test=str(path), **options, **column), "test") == expected


def test_bits_per_byte_have_the_bytes_of_the_text(stories_file: Path) -> None:
    module = make(test=str(stories_file), layout="per_document", separator="<|endoftext|>", max_length=64)
    batch = module.examples("test").collate([0, 1, 2])
    assert batch["num_bytes"].tolist() == [len(story.encode()) for story in STORIES]


def test_splits_that_are_not_given_are_held_out_and_all_are_disjoint(tmp_path: Path) -> None:
    documents = [f"Story {n} of Tom." for n in range(400)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents * 2))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:10]))
    options = {"train": str(tmp_path / "train.jsonl"), "layout": "per_document", "held_out": 0.1}
    alone = make(**options)
    found = {split: {tuple(row) for row in rows(alone, split)} for split in ("train", "validation", "test")}
    assert sum(map(len, found.values())) == 400
    both = make(**options, test=str(tmp_path / "test.jsonl"))
    found = {split: {tuple(row) for row in rows(both, split)} for split in ("train", "validation", "test")}
    assert len(found["test"]) == 10
    assert not found["test"] & found["train"] and not found["test"] & found["validation"]
    assert sum(map(len, found.values())) == 400
    assert any(
        "left out 20 that also stand in a later split" in note or "left out" in note for note in both.prepared.notes
    )


def test_bad_records_are_counted_with_the_first_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "One day."}\nnot json\n{"body": "x"}\n{"text": 3}\n{"text": "  "}\n{"text": "Tom left."}\n'
    )
    module = make(test=str(path), layout="per_document")
    assert len(rows(module, "test")) == 2
    (note,) = [note for note in module.prepared.notes if "skipped" in note]
    assert "1 not JSON (first: a.jsonl line 2)" in note
    assert "2 without text in the field 'text' (first: a.jsonl line 3" in note
    assert "1 empty (first: a.jsonl line 5)" in note


def test_what_cannot_be_used_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "No data: give at least one"),
        ({"train": str(tmp_path / "none.txt")}, "There is no file or folder"),
        ({"test": write("empty.txt", "")}, "holds no records"),
        ({"test": write("blank.txt", " \n ")}, "holds no usable text.*empty"),
        ({"test": write("column.jsonl", '{"body": "x"}\n')}, "field 'text'.*with 'body'.*text_column"),
        ({"test": write("short.txt", "One day.")}, "do not fill one row of 256.*max_length.*per_document"),
        ({"train": write("one.txt", "One day. " * 99)}, "Holding 5% of 1 training record"),
        ({"test": write("x.csv", "a,b")}, "Cannot read"),
        ({"test": str(tmp_path / "x.csv"), "held_out": 0.5}, "held_out is 0.5"),
        ({"test": str(tmp_path / "short.txt"), "max_length": 1}, "max_length is 1"),
    ]
    for options, said in wrong:
        with pytest.raises(UserError, match=said):
            make(**options).examples("test")
    with pytest.raises(UserError, match="There is no train data: give --data.init_args.train"):
        make(test=write("long.txt", "One day. " * 200)).train_dataloader()
