from pathlib import Path

import pytest
import torch

from qpruner.datamodules import TextDataModule
from qpruner.datamodules.cache import Prepared, default_cache_dir, load, store
from qpruner.datamodules.rows import TokenRows
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED

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


def test_rows_are_built_once_for_the_same_content_tokenizer_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = TextDataModule.build
    monkeypatch.setattr(TextDataModule, "build", lambda self: built.append(1) or original(self))
    text = tmp_path / "a.txt"
    text.write_text("One day Tom went home. " * 20)

    def num_builds(path: Path = text, **options: object) -> int:
        before = len(built)
        module = TextDataModule(test=str(path), tokenizer=EMBEDDED, max_length=8, cache_dir=str(tmp_path), **options)
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
