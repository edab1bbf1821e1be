"""What `qpruner verify` says of a folder that is whole, and of one that is not."""

from pathlib import Path

import pytest
import torch

from qpruner.commands import run
from qpruner.compressed import CompressedModel
from qpruner.errors import UserError
from qpruner.folder_manifest import Step


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    model.prune([([0], list(range(16)))] * 2)
    model.record(Step(name="StructuredPruning", options={"ratio": 0.1}))
    (tmp_path / "run").mkdir()
    model.keep(tmp_path / "run" / "model", tokenizer=None)
    return tmp_path / "run" / "model"


def test_a_whole_folder_is_told_with_its_recipe(
    folder: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known_by = CompressedModel.open(folder).identity
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    run(["verify", str(folder)])
    assert capsys.readouterr().out == (
        f"{folder}: {len(sizes)} files of {sum(sizes):,} bytes are as they were written.\n"
        f"The base is pruned, made from {tiny_llama}; SHA-256 {known_by}.\n"
        f"  1. StructuredPruning(ratio=0.1)\n"
        f"Adapters: none.\n"
    )
    run(["verify", str(folder.parent)])  # that of the run
    assert str(folder) in capsys.readouterr().out


def test_one_bit_is_enough(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors' was altered: its SHA-256 is not"):
        run(["verify", str(folder)])
    with torch.no_grad(), pytest.raises(UserError, match="holds no compressed model"):
        run(["verify", str(folder.parent.parent)])
