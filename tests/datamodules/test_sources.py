import json
import re
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from qpruner.datamodules.documents import Skipped
from qpruner.datamodules.sources import Place, Source, find_place
from qpruner.datamodules.splits import Split
from qpruner.errors import UserError

RECORDS = [{"text": text} for text in ("one", "two", "three")]


def read(spec: Path | str, split: Split = "train", skipped: Skipped | None = None) -> list[str]:
    records = Source(str(spec), split).records(Skipped() if skipped is None else skipped)
    return [record["text"] for _, record in records]


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """As ``hf download --local-dir`` leaves a data set."""
    folder = tmp_path / "downloaded"
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": [f"{split} {n}" for n in range(10)]}).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    write(folder / ".cache" / "huggingface" / "x.json", "cache")
    (folder / "dataset_infos.json").write_text('{"default": {}}')
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))


# Where a spec points to.


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "folder" / "a.jsonl", "a")
    write(tmp_path / "odd@name:x" / "a.jsonl", "a")
    monkeypatch.chdir(tmp_path)
    folder, odd = Path("folder"), Path("odd@name:x")
    assert find_place("folder") == Place(folder)
    assert find_place("folder@test") == Place(folder, None, "test")
    assert find_place("folder:en@test[:10%]") == Place(folder, "en", "test", "[:10%]")
    assert find_place("folder:en") == Place(folder, "en")
    assert find_place("folder@[:3]") == Place(folder, None, None, "[:3]")
    assert find_place("folder/a.jsonl@train") == Place(folder / "a.jsonl", None, "train")
    assert find_place("odd@name:x") == Place(odd)
    assert find_place("odd@name:x@train") == Place(odd, None, "train")
    for name in ("owner/name", "name@train", "name:config@train[:10%]", "a@b@c"):
        assert find_place(name) is None


@pytest.mark.parametrize(
    "spec",
    ["./none", "../none", "/none/at/all", "~/none.d", "none.txt", "none.jsonl.gz", "none.csv@train", "/none:x@y"],
)
@pytest.mark.usefixtures("offline")
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(spec: str) -> None:
    with pytest.raises(UserError, match=f"There is no file or folder '{spec}'"):
        read(spec)


# Files and folders.


@pytest.mark.usefixtures("offline")
def test_only_the_split_that_is_asked_for_is_read(downloaded: Path) -> None:
    train, test = ([f"{split} {n}" for n in range(10)] for split in ("train", "test"))
    assert read(downloaded) == train == read(f"{downloaded}@train", "test")
    assert read(downloaded, "test") == test == read(f"{downloaded}@test") == read(f"{downloaded}@eval")
    assert read(f"{downloaded}:data@test") == test
    assert read(f"{downloaded}@train[2:4]") == train[2:4]
    assert read(f"{downloaded}@test[-10%:]") == test[-1:]
    assert read(f"{downloaded}@[:50%]") == train[:5]
    for spec, split in ((downloaded, "validation"), (f"{downloaded}@dev", "train")):
        with pytest.raises(UserError, match=r"has no split '(validation|dev)': the folder has train, test. Name one"):
            read(spec, split)
    for part in ("[a]", "[::2]", "[5:3]", "[90:95]"):
        with pytest.raises(UserError, match=rf"{re.escape(part)}.*(is no part of 10 record|holds no records)"):
            read(f"{downloaded}@train{part}")


def test_a_folder_named_for_no_split_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "er" / "b.jsonl", "B")
    write(tmp_path / "a.jsonl", "A")
    for split in ("train", "validation", "test"):
        assert read(tmp_path, split) == ["A", "B"]
    assert read(f"{tmp_path}@train") == ["A", "B"]
    assert Source(str(tmp_path), "train").selection is None
    with pytest.raises(UserError, match="has no split 'test': the folder holds only files that are named for none"):
        read(f"{tmp_path}@test")


def test_training_never_gets_what_is_called_test(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", "T")
    with pytest.raises(UserError, match=r"has no split 'train': the folder has test\."):
        read(tmp_path)
    write(tmp_path / "corpus.jsonl", "C")
    assert read(tmp_path) == ["C"]
    assert read(tmp_path / "test.jsonl") == ["T"]  # a file that is given is what was asked for


def test_siblings_are_splits_of_the_same_folder(downloaded: Path, tmp_path: Path) -> None:
    source = Source(str(downloaded), "train")
    assert source.sibling("test") == Source(str(downloaded), "test")
    assert source.sibling("validation") is None
    assert Source(f"{downloaded}@train", "train").sibling("test") is None
    assert Source(str(write(tmp_path / "a.jsonl", "a")), "train").sibling("test") is None
    (downloaded / "data" / "test-00000-of-00001.parquet").rename(downloaded / "data" / "rest.parquet")
    assert Source(str(downloaded), "train").sibling("test") is None


def test_empty_files_of_a_folder_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.json"):
        (tmp_path / name).touch()
    write(tmp_path / "d.jsonl", "text")
    skipped = Skipped()
    assert read(tmp_path, skipped=skipped) == ["text"]
    assert str(skipped) == "3 file(s) without a record (first: a.txt)"


def test_nothing_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    with pytest.raises(UserError, match=r"a.jsonl' holds no records: 1 file\(s\) without a record \(first: a.jsonl\)"):
        read(path)
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"holds no records: 1 not JSON \(first: a.jsonl line 1\)"):
        read(path)
    write(tmp_path / "folder" / "train.jsonl", "a")
    (tmp_path / "folder" / "valid.jsonl").touch()
    with pytest.raises(UserError, match=r"^The split 'valid' of '.*folder' holds no records: 1 file\(s\) without"):
        read(tmp_path / "folder", "validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"The folder '.*empty' holds no .txt, .jsonl, .*parquet"):
        read(tmp_path / "empty")


def test_what_a_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"Cannot read '.*a.zip': give a .txt, .jsonl, .*Unpack archives"):
        read(tmp_path / "a.zip")
    path = write(tmp_path / "a.jsonl", "a")
    with pytest.raises(UserError, match=r"a.jsonl' is a file, which has no splits. Give it without @"):
        read(f"{path}@train")


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


def test_fingerprint_is_of_what_is_read_of_a_folder(downloaded: Path) -> None:
    def fingerprint(spec: str = "", split: Split = "train") -> str:
        return Source(f"{downloaded}{spec}", split).fingerprint()

    train = fingerprint()
    assert fingerprint("@train", "test") == train
    assert len({train, fingerprint("@test"), fingerprint("@train[:3]"), fingerprint("@train[:4]")}) == 4
    datasets.Dataset.from_dict({"text": ["other"]}).to_parquet(downloaded / "data" / "test-00000-of-00001.parquet")
    assert fingerprint() == train and fingerprint("@train[:3]") != train
    datasets.Dataset.from_dict({"text": ["other"]}).to_parquet(downloaded / "data" / "train-00000-of-00001.parquet")
    assert fingerprint() != train


# What the datasets library loads.


def test_a_folder_whose_readme_asks_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("text#n\none, two#1\nthree#2\n")
    (folder / "README.md").write_text('---\nconfigs:\n- config_name: x\n  data_files: a.csv\n  sep: "#"\n---\n')
    assert read(folder) == ["one, two", "three"]
    before = Source(str(folder), "train").fingerprint()
    (folder / "a.csv").write_text("text#n\none, two, three#1\n")
    assert Source(str(folder), "train").fingerprint() != before
    assert read(f"{folder}@train[:1]") == ["one, two, three"]
    with pytest.raises(UserError, match=r"cannot be read as its README.md says \(ValueError: .*test"):
        read(folder, "test")
    assert {path.name for path in folder.iterdir()} == {"a.csv", "README.md"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("NAME", ("NAME", None, "validation")),
        ("owner/NAME@train", ("owner/NAME", None, "train")),
        ("owner/NAME:CONFIG", ("owner/NAME", "CONFIG", "validation")),
        ("NAME:CONFIG-v1.0@train[:10%]", ("NAME", "CONFIG-v1.0", "train[:10%]")),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, spec: str, expected: tuple[Any, ...]) -> None:
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
