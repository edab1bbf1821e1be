"""What `qpruner verify` says of a folder that is whole, and of one that is not."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpruner.adapters.lora import LoRAConfig
from qpruner.commands import run
from qpruner.compressed import CompressedModel
from qpruner.errors import UserError
from qpruner.files import read_json, write_json
from qpruner.folder_manifest import Step, entries_of


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
    *told, last = capsys.readouterr().out.splitlines(keepends=True)
    assert re.fullmatch(
        r"The base loads and says what it said: logits differ by up to \S+ standard deviations.\n", last
    )
    assert float(last.split()[-3]) < 1e-5
    assert "".join(told) == (
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


def test_a_model_that_says_something_else_is_told(folder: Path) -> None:
    path = folder / "reference/logits.safetensors"
    recorded = load_file(path)
    save_file(recorded | {"logits": recorded["logits"].roll(1, dims=1).contiguous()}, path)
    bless(folder)
    with pytest.raises(UserError, match=r"says something else than when it was written: its logits differ by up to"):
        run(["verify", str(folder)])
    run(["verify", str(folder), "--load", "false"])


def test_what_is_no_number_is_not_the_same(folder: Path) -> None:
    path = folder / "reference/logits.safetensors"
    recorded = load_file(path)
    save_file(recorded | {"logits": torch.full_like(recorded["logits"], torch.nan)}, path)
    bless(folder)
    with pytest.raises(UserError, match="differ by up to nan"):
        run(["verify", str(folder)])


def test_what_transformers_reads_is_tried(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    model.prune([([0], list(range(16))), ([0], list(range(12)))])
    model.keep(tmp_path / "model", tokenizer=None)
    run(["verify", str(tmp_path / "model")])
    assert "The base by transformers alone loads and says what it said" in capsys.readouterr().out
    config = read_json(tmp_path / "model/config.json")
    config["rms_norm_eps"] = 1.0
    write_json(tmp_path / "model/config.json", config)
    bless(tmp_path / "model")
    with pytest.raises(UserError, match="says something else"):
        run(["verify", str(tmp_path / "model")])


def test_files_that_are_not_of_the_model_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").write_text("mine")
    run(["verify", str(folder), "--load", "false"])
    assert "Not of the model, and not looked at: notes.txt." in capsys.readouterr().out


def test_adapters_are_held_to_theirs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = CompressedModel.open(folder)
    model.attach(LoRAConfig(r=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.keep_adapters(trained=True)
    run(["verify", str(folder)])
    said = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" loads")[0] for line in said] == ["The base", "The base with its adapters"]
    first, second = (load_file(folder / place / "logits.safetensors") for place in ("reference", "adapter/reference"))
    assert torch.equal(first["tokens"], second["tokens"])
    assert not torch.equal(first["logits"], second["logits"])


def test_folders_of_before_have_no_logits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "reference/logits.safetensors").unlink()
    bless(folder)
    run(["verify", str(folder)])
    assert "no logits were recorded when it was written" in capsys.readouterr().out


def bless(folder: Path) -> None:
    """Makes the manifest say of the files what they are now."""
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {"files": entries_of_all(folder)})


def entries_of_all(folder: Path) -> dict[str, object]:
    return {name: entry for name, entry in entries_of(folder).items() if name != "manifest.json"}
