import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pytest

from qpruner.datamodules.documents import Skipped, is_unicode, kind, read_file
from qpruner.errors import UserError

RECORDS = [{"text": "Grüße, 👋!", "n": 1}, {"text": "two\nlines", "n": 2}, {"text": "three", "n": 3}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TABLE = pyarrow.Table.from_pylist(RECORDS)


def read(path: Path, skipped: Skipped | None = None) -> list[dict[str, Any]]:
    return [record for _, record in read_file(path, Skipped() if skipped is None else skipped)]


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def arrow_stream(path: Path) -> None:
    with pyarrow.ipc.new_stream(path, TABLE.schema) as writer:
        writer.write_table(TABLE)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: put(path, LINES),
    "A.JSONL": lambda path: put(path, LINES),
    "a.ndjson": lambda path: put(path, LINES),
    "a.jsonl.gz": lambda path: put(path, gzip.compress(LINES.encode())),
    "a.jsonl.bz2": lambda path: put(path, bz2.compress(LINES.encode())),
    "a.jsonl.xz": lambda path: put(path, lzma.compress(LINES.encode())),
    "a.jsonl.zst": lambda path: put(path, pyarrow.Codec("zstd").compress(LINES.encode(), asbytes=True)),
    "a.json": lambda path: put(path, json.dumps(RECORDS, ensure_ascii=False)),
    "a.json.gz": lambda path: put(path, gzip.compress(json.dumps(RECORDS).encode())),
    "lines.json": lambda path: put(path, LINES),
    "columns.json": lambda path: put(path, json.dumps(TABLE.to_pydict())),
    "pandas.json": lambda path: pandas.DataFrame(RECORDS).to_json(path),
    "a.parquet": lambda path: datasets.Dataset.from_list(RECORDS).to_parquet(path),
    "a.arrow": arrow_stream,
    "a.feather": lambda path: pyarrow.feather.write_feather(TABLE, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == RECORDS


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_tables_of_more_rows_than_are_read_at_once(tmp_path: Path, name: str) -> None:
    table = pyarrow.table({"n": range(2345)})
    (pyarrow.parquet.write_table if name == "a.parquet" else pyarrow.feather.write_feather)(table, tmp_path / name)
    places, records = zip(*read_file(tmp_path / name, Skipped()), strict=True)
    assert [record["n"] for record in records] == list(range(2345))
    assert places[2344] == f"{name} row 2344"


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_tables_with_nested_fields(tmp_path: Path, name: str) -> None:
    record = {"messages": [{"role": "user", "content": "Hi"}], "meta": {"n": [1, None]}, "text": "a", "no": None}
    table = pyarrow.Table.from_pylist([record])
    table = table.set_column(2, "text", pyarrow.array(["a"]).dictionary_encode())
    (pyarrow.parquet.write_table if name == "a.parquet" else pyarrow.feather.write_feather)(table, tmp_path / name)
    assert read(tmp_path / name) == [record]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_record(tmp_path: Path, name: str) -> None:
    text = "One 🌍.\n\nTwo.\n"
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text
    assert read(put(tmp_path / name, content)) == [{"text": text}]


def test_files_as_windows_writes_them(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    assert read(put(tmp_path / "a.txt", bom + b"one\r\n\r\ntwo\r\n")) == [{"text": "one\n\ntwo\n"}]
    for name, text in (("a.jsonl", LINES), ("a.json", json.dumps(RECORDS, indent=1)), ("lines.json", LINES)):
        skipped = Skipped()
        assert read(put(tmp_path / name, bom + text.replace("\n", "\r\n").encode()), skipped) == RECORDS
        assert not skipped.counts


# CSV.


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'text,n\n"a, ""b""\nc",1\n\nd,2\n', [{"text": 'a, "b"\nc', "n": "1"}, {"text": "d", "n": "2"}]),
        ("a.csv", '\ufefftext;n\r\n"a;b, c\r\nd";1\r\n', [{"text": "a;b, c\nd", "n": "1"}]),
        ("a.csv", "text|n\na, b|1\n", [{"text": "a, b", "n": "1"}]),
        ("a.csv", "text\tn\na, b\t1\n", [{"text": "a, b", "n": "1"}]),
        ("a.csv", '"a;b;c","n"\nx,1\n', [{"a;b;c": "x", "n": "1"}]),
        ("a.csv", 'text\nhello world\n"x, y"\n', [{"text": "hello world"}, {"text": "x, y"}]),
        ("a.csv", "\n text , n\na,\n", [{"text": "a", "n": ""}]),
        ("a.csv", "text,n\na\0b,1\n", [{"text": "a\0b", "n": "1"}]),
        ("a.csv", f'text,n\n"{"x, " * 100_000}",1\n', [{"text": "x, " * 100_000, "n": "1"}]),
        ("a.tsv", 'text\tn;m\na "b" c, d\t1\n', [{"text": 'a "b" c, d', "n;m": "1"}]),
        ("a.csv.gz", gzip.compress(b"text,n\na,1\n", mtime=0), [{"text": "a", "n": "1"}]),
    ],
)
def test_csv(tmp_path: Path, name: str, content: str | bytes, expected: list[dict[str, str]]) -> None:
    skipped = Skipped()
    assert read(put(tmp_path / name, content), skipped) == expected
    assert not skipped.counts


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_as_pandas_writes_it(tmp_path: Path, separator: str) -> None:
    frame = pandas.DataFrame([{"text": 'a "quoted"\ttext,\nof two lines'}, {"text": "b"}])
    path = tmp_path / ("a.csv" if separator == "," else "a.tsv")
    frame.to_csv(path, index=False, sep=separator)
    assert read(path) == frame.to_dict("records")


def test_rows_that_do_not_fit_the_header_are_counted(tmp_path: Path) -> None:
    skipped = Skipped()
    assert read(put(tmp_path / "a.csv", "text,n\na,1\nb\nc, d,3\n"), skipped) == [{"text": "a", "n": "1"}]
    assert str(skipped) == "2 with another number of fields than names of fields (first: a.csv row 1)"


# What is no record.


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bad_lines_are_counted_with_the_first_place(tmp_path: Path, name: str) -> None:
    skipped = Skipped()
    deep = "[" * 100_000
    path = put(tmp_path / name, f'{{"n": 1}}\n\n{{"n": \n[2]\nnull\n{{"n": 3}}\nnonsense\n{deep}\n{"9" * 5000}\n')
    assert read(path, skipped) == [{"n": 1}, {"n": 3}]
    assert skipped.counts == {"not JSON": 4, "not a record with named fields": 2}
    assert str(skipped) == (
        f"4 not JSON (first: {name} line 3); 2 not a record with named fields (first: {name} line 4)"
    )


def test_records_that_are_no_records_in_a_list(tmp_path: Path) -> None:
    skipped = Skipped()
    assert read(put(tmp_path / "a.json", '[{"n": 1}, "text", 7]'), skipped) == [{"n": 1}]
    assert str(skipped) == "2 not a record with named fields (first: a.json record 1)"


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_structs_of_tables_have_no_fields_of_others(tmp_path: Path, name: str) -> None:
    records = [{"calls": [{"a": 1, "to": {"x": None}}]}, {"calls": [{"b": [None, 2]}, None]}]
    table = pyarrow.Table.from_pylist(records)
    (pyarrow.parquet.write_table if name == "a.parquet" else pyarrow.feather.write_feather)(table, tmp_path / name)
    assert read(tmp_path / name) == [{"calls": [{"a": 1, "to": {}}]}, {"calls": [{"b": [None, 2]}, None]}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert read(tmp_path / "a.json") == records


CHAT = [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"messages": CHAT}, [{"messages": CHAT}]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [{"prompt": CHAT[:1], "completion": CHAT[1:]}]),
        ({"messages": [CHAT, CHAT]}, [{"messages": CHAT}] * 2),
        ({"1": RECORDS[0], "2": RECORDS[1]}, RECORDS[:2]),
    ],
)
def test_what_a_json_object_holds(tmp_path: Path, content: Any, expected: list[Any]) -> None:
    assert read(put(tmp_path / "a.json", json.dumps(content))) == expected


def test_a_json_file_with_one_record(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.json", '{"text": "a", "tags": ["x", "y"]}\n')) == [{"text": "a", "tags": ["x", "y"]}]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_empty_files_hold_nothing(tmp_path: Path, name: str) -> None:
    assert read(put(tmp_path / name, "")) == []


TEXT = gzip.compress(b"A text that is long enough to be cut in two. " * 20)
DAMAGED = {
    "latin.txt": ("é".encode("latin-1") + b"abc", "codec can't decode byte 0xe9 in position 0", "is text in UTF-8"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "codec can't decode byte 0xe9 in position 10", "one record"),
    "utf16.csv": ("text,n\na,1\n".encode("utf-16"), "can't decode byte 0xff in position 0", "names of its fields"),
    "unclosed.csv": (b'text,n\n"a,1\nb,2\n', "unexpected end of data", "quotes fields"),
    "cut.txt.gz": (TEXT[: len(TEXT) // 2], "Compressed file ended before", "text"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-9], "Compressed file ended before", "one record"),
    "turned.txt.gz": (TEXT[:12] + bytes(255 - byte for byte in TEXT[12:]), "Error -3 while decompressing", "text"),
    "plain.txt.gz": (b"not compressed at all", "Not a gzipped file", "text"),
    "plain.txt.bz2": (b"not compressed at all", "Invalid data stream", "text"),
    "plain.txt.xz": (b"not compressed at all", "Input format not supported", "text"),
    "plain.txt.zst": (b"not compressed at all", "ZSTD decompress failed", "text"),
    "cut.json": (json.dumps(RECORDS).encode()[:-5], "line 1 column", "is one list of records"),
    "twice.json": (b'[{"n": 1}]\n[{"n": 2}]', "Extra data: line 2 column 1", "is one list of records"),
    "deep.json": (b"[" * 100_000, "recursion", "is one list of records"),
    "object.json": (b'{"data": [{"n": 1}]}', "a list of records, not a dict; if they are the list 'data' in it", ""),
    "named.json": (b'{"a": {"n": 1}, "b": {"n": 2}}', "must hold a list of records, not a dict of them", ""),
    "twice.csv": (b"text,n, text\na,1,b\n", "it has several fields of the name 'text'", "names of its fields"),
    "number.json": (b"7", "must hold a list of records, not a int", "or has one a line"),
    "text.parquet": (b"not a table, but long enough for one", "Parquet magic bytes not found", "Apache Parquet"),
    "empty.parquet": (b"", "Parquet file size is 0 bytes", "Apache Parquet"),
    "text.arrow": (b"not a table, but long enough for one", "metadata bytes", "Apache Arrow"),
    "empty.arrow": (b"", "schema", "Apache Arrow"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    content, reason, meaning = DAMAGED[name]
    with pytest.raises(UserError) as error:
        read(put(tmp_path / name, content))
    assert str(error.value).startswith(f"Cannot read {str(tmp_path / name)!r}: ")
    assert reason in str(error.value)
    says, _, explanation = str(error.value).partition(
        f"It is damaged or not what its name says: a {kind(Path(name))} file "
    )
    assert says and meaning in explanation


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt", "a.csv", "a.json.gz"])
def test_a_pointer_to_a_file_in_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(UserError, match=f"{name}' is only a pointer to a file in Git LFS.*git lfs pull"):
        read(put(tmp_path / name, pointer))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.txt", ".txt"), ("a.b.JSONL.GZ", ".jsonl"), ("a.csv.zst", ".csv"), ("a.parquet", ".parquet")]
    + [(name, "") for name in ("a.parquet.gz", "a.tar.gz", "a.zip", "a.md", "gz", ".gz", ".txt")],
)
def test_what_names_say_of_formats(name: str, expected: str) -> None:
    assert kind(Path(name)) == expected


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert is_unicode("é👋")
    assert not is_unicode(json.loads(r'"a\ud83d"'))
