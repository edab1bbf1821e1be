import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qpruner.datamodules import TextDataModule
from qpruner.datamodules.cache import Prepared, default_cache_dir, load, store
from qpruner.datamodules.rows import TokenRows
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

ROWS = TokenRows(
    tokens=torch.tensor([3, 1, 4, 1], dtype=torch.int32),
    scored=torch.tensor([True, False, True, True]),
    num_bytes=torch.tensor([1, 2, 3, 4], dtype=torch.int32),
    offsets=torch.tensor([0, 1, 4]),
)


def test_round_trip(tmp_path: Path) -> None:
    store(tmp_path / "deep" / "x.safetensors", Prepared({"test": ROWS}, ("a note: é",)))
    found = load(tmp_path / "deep" / "x.safetensors")
    assert found.notes == ("a note: é",)
    assert found.splits.keys() == {"test"}
    for name in ("tokens", "scored", "num_bytes", "offsets"):
        stored = getattr(found.splits["test"], name)
        assert torch.equal(stored, getattr(ROWS, name))
        assert stored.dtype == getattr(ROWS, name).dtype
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write the token cache.*--data.init_args.cache_dir"):
        store(tmp_path / "file" / "x.safetensors", Prepared({"test": ROWS}, ()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
def test_a_folder_that_is_there_and_cannot_be_written() -> None:
    with pytest.raises(UserError, match=r"Cannot write the token cache in '/proc'.*--data.init_args.cache_dir"):
        store(Path("/proc/x.safetensors"), Prepared({"test": ROWS}, ()))


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    store(path, Prepared({"test": ROWS}, ()))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="Cannot read the token cache.*Delete this file"):
        load(path)


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_cache_dir() == Path("/some/where/qpruner/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/qpruner/tokens")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the token cache.*gone.safetensors"):
        load(tmp_path / "gone.safetensors")


def test_rows_are_built_once_for_the_same_content_tokenizer_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = TextDataModule.build
    monkeypatch.setattr(TextDataModule, "build", lambda self: built.append(1) or original(self))
    text = tmp_path / "a.txt"
    text.write_text("One day Tom went home. " * 20)

    def num_builds(path: Path = text, **options: Any) -> int:
        before = len(built)
        defaults = {"tokenizer": EMBEDDED, "max_length": 8, "cache_dir": str(tmp_path / "cache")}
        module = TextDataModule(test=str(path), **(defaults | options))
        assert len(module.examples("test")) > 0
        return len(built) - before

    assert num_builds() == 1
    assert num_builds() == 0
    renamed = tmp_path / "b.txt"
    renamed.write_text(text.read_text())
    assert num_builds(renamed) == 0
    assert num_builds(layout="per_document") == 1
    assert num_builds(separator=".") == 1
    text.write_text("Another story. " * 20)
    assert num_builds() == 1
    assert num_builds(max_length=9) == 1
    other = load_tokenizer(EMBEDDED)
    other.add_tokens(["Another"])
    other.save_pretrained(tmp_path / "tokenizer")
    assert num_builds(tokenizer=str(tmp_path / "tokenizer")) == 1
    assert num_builds() == 0


def test_one_process_prepares_and_another_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many tokenizers on the hub, this one was saved in the middle of a training that cut and padded.
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("One day Tom went home. " * 20)
    ranks = [
        TextDataModule(test=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer"), max_length=8)
        for _ in range(2)
    ]
    assert ranks[0].tokenizer.backend_tokenizer.truncation is not None
    ranks[0].prepare_data()
    monkeypatch.setattr(TextDataModule, "build", lambda self: pytest.fail("built again"))
    for rank in ranks:
        rank.setup("fit")
        expected = tokenizer("One day Tom went home. " * 20)["input_ids"]
        assert rank.examples("test").rows.tokens.tolist() == expected[: len(expected) // 8 * 8]
