import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from qpruner.datamodules.documents import Skipped, Source, is_unicode
from qpruner.errors import UserError

RECORDS = [{"text": "Grüße, 👋!", "n": 1}, {"text": "two\nlines", "n": 2}, {"text": "three", "n": 3}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def read(path: Path | str, skipped: Skipped | None = None) -> list[dict[str, Any]]:
    return [record for _, record in Source(str(path), "train").records(Skipped() if skipped is None else skipped)]


def gz(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


def parquet(path: Path, records: list[dict]) -> None:
    datasets.Dataset.from_list(records).to_parquet(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "a.jsonl.gz": lambda path: gz(path, LINES),
    "a.json": lambda path: path.write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8"),
    "a.json.gz": lambda path: gz(path, json.dumps(RECORDS)),
    "a.parquet": lambda path: parquet(path, RECORDS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == RECORDS
    assert read(tmp_path) == RECORDS  # the folder


def test_parquet_of_more_rows_than_a_batch(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [{"n": number} for number in range(2345)])
    places, records = zip(*Source(str(tmp_path), "train").records(Skipped()), strict=True)
    assert [record["n"] for record in records] == list(range(2345))
    assert places[2344] == "a.parquet row 2344"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_record(tmp_path: Path, name: str) -> None:
    text = "One 🌍.\n\nTwo.\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read(tmp_path / name) == [{"text": text}]


def test_files_as_windows_writes_them(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"one\r\n\r\ntwo\r\n")
    assert read(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]
    for name, text in (("a.jsonl", LINES), ("a.json", json.dumps(RECORDS, indent=1))):
        (tmp_path / name).write_bytes(bom + text.replace("\n", "\r\n").encode())
        skipped = Skipped()
        assert read(tmp_path / name, skipped) == RECORDS
        assert not skipped.counts


def test_a_folder_is_read_in_the_order_of_its_names_and_only_what_can_be(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.txt").write_text("B")
    (tmp_path / "a.jsonl").write_text('{"text": "A"}')
    gz(tmp_path / "z.txt.gz", "Z")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "folder.txt").mkdir()
    assert [record["text"] for record in read(tmp_path)] == ["A", "B", "Z"]


def test_bad_lines_are_counted_with_the_first_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n{"n": \n[2]\nnull\n{"n": 3}\nnonsense\n')
    skipped = Skipped()
    assert read(path, skipped) == [{"n": 1}, {"n": 3}]
    assert skipped.counts == {"not JSON": 2, "not a record with named fields": 2}
    assert str(skipped) == (
        "2 not JSON (first: a.jsonl line 3); 2 not a record with named fields (first: a.jsonl line 4)"
    )


def test_records_that_are_no_records_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"n": 1}, "text", 7]')
    skipped = Skipped()
    assert read(tmp_path / "a.json", skipped) == [{"n": 1}]
    assert str(skipped) == "2 not a record with named fields (first: a.json record 1)"


def test_empty_files_of_a_folder_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.json"):
        (tmp_path / name).touch()
    (tmp_path / "d.txt").write_text("text")
    skipped = Skipped()
    assert read(tmp_path, skipped) == [{"text": "text"}]
    assert str(skipped) == "3 file(s) without a record (first: a.txt)"


def test_nothing_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    with pytest.raises(UserError, match=r"a.jsonl' holds no records: 1 file\(s\) without a record \(first: a.jsonl\)"):
        read(path)
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"holds no records: 1 not JSON \(first: a.jsonl line 1\)"):
        read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"The folder '.*empty' holds no .txt, .jsonl, .json, .parquet file"):
        read(tmp_path / "empty")


TEXT = gzip.compress(b"A text that is long enough to be cut in two. " * 20)
DAMAGED = {
    "latin.txt": ("é".encode("latin-1") + b"abc", "codec can't decode byte 0xe9 in position 0"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "codec can't decode byte 0xe9 in position 10"),
    "cut.txt.gz": (TEXT[: len(TEXT) // 2], "Compressed file ended before"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-9], "Compressed file ended before"),
    "turned.txt.gz": (TEXT[:12] + bytes(255 - byte for byte in TEXT[12:]), "Error -3 while decompressing"),
    "plain.txt.gz": (b"not compressed at all", "Not a gzipped file"),
    "lines.json": (LINES.encode(), "Extra data: line 2 column 1"),
    "cut.json": (json.dumps(RECORDS).encode()[:-5], "line 1 column"),
    "object.json": (b'{"data": []}', "it must hold a list of records, not a dict"),
    "text.parquet": (b"not a table, but long enough for one", "Parquet magic bytes not found"),
    "empty.parquet": (b"", "Parquet file size is 0 bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    data, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"Cannot read {str(tmp_path / name)!r}: ")
    assert reason in str(error.value)
    assert "damaged or not what its name says: .txt is UTF-8 text, .jsonl has one record a line" in str(error.value)


@pytest.mark.parametrize("spec", ["./none", "../none", "/none/at/all", "~/none.d", "none.txt", "none.jsonl.gz"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=f"There is no file or folder '{spec}'"):
        read(spec)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nA\n")
    with pytest.raises(
        UserError, match=r"Cannot read '.*a.csv': give a .txt, .jsonl, .json, .parquet file \(.gz too\)"
    ):
        read(tmp_path / "a.csv")


def test_fingerprint_is_of_content_and_format(tmp_path: Path) -> None:
    def fingerprint(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return Source(str(path), "train").fingerprint()

    base = fingerprint("a.jsonl", b'{"text": "A"}')
    assert fingerprint("b.jsonl", b'{"text": "A"}') == base
    assert fingerprint("a.txt", b'{"text": "A"}') != base
    assert fingerprint("a.jsonl", b'{"text": "B"}') != base
    (tmp_path / "folder").mkdir()
    fingerprint("folder/a.jsonl", b'{"text": "A"}')
    assert Source(str(tmp_path / "folder"), "train").fingerprint() == base


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("NAME", ("NAME", None, "validation")),
        ("owner/NAME@train", ("owner/NAME", None, "train")),
        ("owner/NAME:CONFIG", ("owner/NAME", "CONFIG", "validation")),
        ("NAME:CONFIG-v1.0@train[:10%]", ("NAME", "CONFIG-v1.0", "train[:10%]")),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, spec: str, expected: tuple) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(spec, "validation")
    assert list(source.records(Skipped())) == [(f"{spec} row {n}", record) for n, record in enumerate(RECORDS)]
    assert source.fingerprint() == datasets.Dataset.from_list(RECORDS)._fingerprint
    assert set(asked) == {expected}


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = "'qpruner/none@train' is no local file or folder, and the hub gave no such data set .*NAME:CONFIG@SPLIT"
    with pytest.raises(UserError, match=message):
        read("qpruner/none@train")


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert is_unicode("é👋")
    assert not is_unicode(json.loads(r'"a\ud83d"'))
