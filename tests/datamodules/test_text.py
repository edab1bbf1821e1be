import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qpruner.datamodules import InstructionDataModule, TextDataModule
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

WORDS = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "é": 4, "</s>": 5}
STORIES = ["One day Tom went home.", "Max had six stamps and looked a little sad.", "It was raining."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED)


def make(**options: Any) -> TextDataModule:
    return TextDataModule(tokenizer=EMBEDDED, **options)


def word_module(sources: dict[str, str], folder: Path, *, end: str | None = None, **options: Any) -> TextDataModule:
    """With a tokenizer that has a token a word, and perhaps an end-of-text token that it adds itself."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        words.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, WORDS[end])])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=end).save_pretrained(folder / "words")
    return TextDataModule(**sources, tokenizer=str(folder / "words"), **({"layout": "per_document"} | options))


def rows(module: TextDataModule, split: Any) -> list[list[int]]:
    found = module.examples(split).rows
    return [found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist() for i in range(len(found))]


TRAINED = "".join(json.dumps({"text": f"a b {number}"}) + "\n" for number in range(60))


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


@pytest.mark.parametrize("kind", [".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", "saved", "folder"])
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
        case ".csv":
            datasets.Dataset.from_list(records).to_csv(path)
        case ".parquet":
            datasets.Dataset.from_list(records).to_parquet(path)
        case "saved":
            datasets.Dataset.from_list(records).save_to_disk(path)
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
    left_out = [int(note.split("left out ")[1].split()[0]) for note in both.prepared.notes if "left out" in note]
    assert sum(left_out) == 20  # each of ten stands in the training file twice


def test_a_folder_with_splits_gives_each_of_them(tmp_path: Path, tokenizer: Any) -> None:
    texts = {split: [f"Story {n} of {split}." for n in range(100)] for split in ("train", "test")}
    for split, documents in texts.items():
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": documents}).to_parquet(path)
    options: dict[str, Any] = {"layout": "per_document", "held_out": 0.1, "max_length": 32}
    expected = {split: {tuple(tokenizer(text)["input_ids"]) for text in texts[split]} for split in texts}

    def splits(module: TextDataModule) -> dict[str, set[tuple[int, ...]]]:
        return {split: {tuple(row) for row in rows(module, split)} for split in module.prepared.splits}

    whole = make(train=str(tmp_path), **options)
    found = splits(whole)
    assert found["test"] == expected["test"]  # the folder's own
    assert found["validation"] and found["train"] | found["validation"] == expected["train"]  # held out of training
    both = [note for note in whole.prepared.notes if "its folder" in note]
    assert both[0].startswith("TextDataModule: train: read 1 file(s) of the split 'train' in its folder (data/train-0")
    assert both[1].startswith("TextDataModule: test: read 1 file(s) of the split 'test' in its folder (data/test-0")
    assert splits(make(train=str(tmp_path), test=str(tmp_path), **options)) == found
    named = splits(make(train=f"{tmp_path}@train", **options))  # by its name the split alone
    assert set().union(*named.values()) == expected["train"] and len(named["test"]) < 50
    assert splits(make(train=str(tmp_path), **options | {"held_out": 0.0})).keys() == {"train", "test"}
    with pytest.raises(UserError, match="has no split 'validation': the folder has train, test"):
        make(train=str(tmp_path), validation=str(tmp_path))


def test_a_document_in_two_files_of_a_folder_stays_on_one_side(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, [f"Story {n} of Tom." for n in range(200)])
    module = make(train=str(tmp_path), layout="per_document", held_out=0.2)
    found = {split: Counter(map(tuple, rows(module, split))) for split in ("train", "validation", "test")}
    assert {count for counter in found.values() for count in counter.values()} == {2}
    assert sum(map(len, found.values())) == 200 and all(found.values())


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
        (
            {"test": write("near.csv", "Text,n\nOne day.,1\n")},
            "with 'Text', 'n'.*text_column names. Did you mean 'Text'",
        ),
        ({"test": write("typed.jsonl", '{"text": ["a"]}\n')}, r"first: typed.jsonl line 1, where it is \['a'\]"),
        ({"test": write("x.pdf", "a,b")}, "Cannot read"),
        ({"test": str(tmp_path / "short.txt"), "held_out": 0.5}, "held_out is 0.5"),
        ({"test": str(tmp_path / "short.txt"), "max_length": 1}, "max_length is 1"),
    ]
    for options, said in wrong:
        with pytest.raises(UserError, match=said):
            make(**options).examples("test")
    with pytest.raises(UserError, match="None of 1 document.* has the 2 tokens that a row needs"):
        word_module({"test": write("word.txt", "a")}, tmp_path).examples("test")
    with pytest.raises(UserError, match="Nothing is left of the train split"):
        make(train=str(tmp_path / "one.txt"), validation=str(tmp_path / "one.txt"), held_out=0.0).examples("train")
    with pytest.raises(UserError, match="There is no train data: give --data.init_args.train"):
        make(test=write("long.txt", "One day. " * 200)).train_dataloader()


def test_a_path_that_is_not_there_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("qpruner.datamodules.base.load_tokenizer", lambda name, **options: calls.append("tokenizer"))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append("hub"))
    (tmp_path / "empty").mkdir()
    for kind in (TextDataModule, InstructionDataModule):
        for wrong, said in (("none.jsonl", "There is no file or folder"), ("empty", "holds no .txt, .jsonl")):
            with pytest.raises(UserError, match=said):
                kind(train="owner/NAME", test=str(tmp_path / wrong), tokenizer=EMBEDDED)
        assert calls == []
        assert kind(train="owner/NAME", tokenizer=EMBEDDED).sources.keys() == {"train"}
        assert calls == ["tokenizer"]  # of the hub nothing is asked yet
        calls.clear()


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no records: 1 file(s) without a record (first: test.jsonl)."),
        ("nonsense", "holds no records: 1 not JSON"),
        ('{"body": "x"}', "holds no usable text: 1 without text in the field 'text'"),
        ("\xff", "is damaged or not what its name says"),
        ('{"text": "a"}', "None of 1 document(s) has the 2 tokens that a row needs."),
        (TRAINED, "Nothing is left of the train split: all its 60 record(s) also stand in test."),
    ],
)
def test_a_split_that_nobody_named_does_not_end_the_run(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(TRAINED)
    (tmp_path / "data" / "test.jsonl").write_text(content, encoding="latin-1")
    module = word_module({"train": str(tmp_path / "data")}, tmp_path, held_out=0.2)
    assert all(rows(module, split) for split in ("train", "validation", "test"))
    assert sum(len(rows(module, split)) for split in ("train", "validation", "test")) == 60
    (note,) = [note for note in module.prepared.notes if "left alone what" in note]
    assert note.startswith("TextDataModule: test: left alone what the folder has of it. ") and reason in note
    named = {"train": str(tmp_path / "data"), "test": f"{tmp_path / 'data'}@test"}
    with pytest.raises(UserError, match=re.escape(reason)):
        word_module(named, tmp_path, held_out=0.2).prepare_data()


def test_an_end_of_text_that_the_tokenizer_adds_is_not_doubled(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["a b", "c", "b a"])
    packed = word_module({"test": path}, tmp_path, end="</s>", layout="packed", max_length=2)
    assert rows(packed, "test") == [[1, 2], [5, 3], [5, 2], [1, 5]]
    assert packed.examples("test").rows.scored.all()
    alone = word_module({"test": path}, tmp_path, end="</s>", end_token=True)
    assert rows(alone, "test") == [[1, 2, 5], [3, 5], [2, 1, 5]]


def test_without_an_end_of_text_nothing_stands_between(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["a b", "c", "b a"])
    assert rows(word_module({"test": path}, tmp_path, layout="packed", max_length=2), "test") == [[1, 2], [3, 2]]
    assert rows(word_module({"test": path}, tmp_path, end_token=True), "test") == [[1, 2], [2, 1]]


def test_bytes_of_a_tokenizer_of_words_include_the_spaces_between(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["é  a nothing b"])
    batch = word_module({"test": path}, tmp_path).examples("test").collate([0])
    assert batch["labels"].tolist() == [[-100, 1, 0, 2]]
    assert batch["num_bytes"].tolist() == [len("  a nothing b")]


def test_documents_that_make_no_row_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b c"}\n{"text": "a\\ud83d"}\n{"text": "c"}\n')
    module = word_module({"test": str(tmp_path / "a.jsonl")}, tmp_path)
    assert rows(module, "test") == [[2, 3]]
    (note,) = [note for note in module.prepared.notes if "skipped" in note]
    assert "1 with half a surrogate pair, which is no Unicode text (first: a.jsonl line 3)" in note
    assert "2 with fewer than 2 tokens (first: 'a')" in note


def test_windows_line_ends_and_plain_ones_are_the_same_text(tmp_path: Path) -> None:
    text = "One day\nTom went home.\n\n" * 20
    (tmp_path / "plain.txt").write_bytes(text.encode())
    (tmp_path / "windows.txt").write_bytes(text.replace("\n", "\r\n").encode())
    plain, windows = (make(test=str(tmp_path / f"{name}.txt"), max_length=16) for name in ("plain", "windows"))
    assert rows(windows, "test") == rows(plain, "test")
    with pytest.raises(UserError, match="Nothing is left of the train split"):
        make(train=str(tmp_path / "windows.txt"), test=str(tmp_path / "plain.txt"), held_out=0.0).prepared  # noqa: B018


def test_one_training_document_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One day Tom went home. " * 20)
    module = make(train=str(tmp_path / "a.txt"), held_out=0.0, max_length=16)
    assert module.prepared.splits.keys() == {"train"}
    assert module.fingerprint().keys() == {"train"}


def test_notes_say_what_there_is(stories_file: Path, tokenizer: Any) -> None:
    module = make(test=str(stories_file), layout="per_document", separator="<|endoftext|>")
    tokens = sum(len(tokenizer(story)["input_ids"]) for story in STORIES)
    assert module.prepared.notes == (f"TextDataModule: test: 3 rows, {tokens} tokens",)


@pytest.mark.parametrize(
    ("options", "unended"),
    [
        ({"layout": "packed", "max_length": 2}, "documents follow each other in a row with nothing between them"),
        ({"end_token": True}, "no row ends with one"),
        ({"end_token": False}, None),
    ],
)
def test_a_missing_end_token_is_told_where_rows_would_have_it(
    options: dict[str, Any], unended: str | None, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{word} {word}"}) + "\n" for word in "abc"))
    sources = {"test": str(tmp_path / "a.jsonl")}
    without = word_module(sources, tmp_path, **options)
    told = [note for note in without.prepared.notes if "end-of-text" in note]
    assert told == (
        [
            f"The tokenizer {str(tmp_path / 'words')!r} has no end-of-text token: {unended}, and the model is not "
            f"taught where a text ends."
        ]
        if unended
        else []
    )
    ended = word_module(sources, tmp_path, end="</s>", **options)
    assert not any("end-of-text" in note for note in ended.prepared.notes)
