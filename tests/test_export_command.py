"""What `qpruner export` says and refuses, and where it writes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.exports import source_of
from support.families import KEPT
from support.quantized import NF4

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.export import formats
from qpruner.export.dense import Dense
from qpruner.export.formats import exporter_for
from qpruner.export.source import Source
from qpruner.files import read_json
from qpruner.folder_manifest import is_compressed
from qpruner.plan import DENSE
from qpruner.pretrained import EMBEDDED, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(EMBEDDED)
    source_of(tmp_path / "x/model", kept=KEPT, precision=NF4, tokenizer=tokenizer, vocab_size=len(tokenizer))
    return tmp_path / "x/model"


@pytest.fixture
def weights_unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every further reading of weights an error."""

    def read(_: Path) -> None:
        raise AssertionError("Weights are read.")

    return lambda: monkeypatch.setattr(Source, "read", read)


def test_it_says_bytes_and_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["export", str(folder), "--format", "dense"])
    output = folder.parent / "exports" / "dense"
    said = capsys.readouterr().out
    assert is_compressed(output)
    files = [path for path in output.rglob("*") if path.is_file() and path.name != "export.json"]
    size = sum(path.stat().st_size for path in files)
    assert f"{size:,} bytes are on disk" in said and "16.00 bits per weight" in said
    assert "21 packed weights are dense, in float16." in said
    assert "On a few English sentences, logits differ by " in said


def test_an_export_is_replaced_where_that_is_wanted(folder: Path, tmp_path: Path) -> None:
    command = ["export", str(folder), "--format=dense", f"--output={tmp_path / 'out'}"]
    run(command)
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(UserError, match="is there already. Name another --output, or give --overwrite"):
        run(command)
    assert (tmp_path / "out" / "old.txt").exists()
    run([*command, "--overwrite"])
    assert is_compressed(tmp_path / "out") and not (tmp_path / "out" / "old.txt").exists()


def test_what_was_said_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["export", str(folder), "--format=dense", "--dtype=bfloat16"])
    record = read_json(folder.parent / "exports/dense/export.json")
    assert record["format"] == "dense" and record["options"] == {"dtype": "bfloat16"}
    assert record["predicted_bytes"] == 2 * record["weights"] < record["bytes"]
    assert record["changes"] == ["21 packed weights are dense, in bfloat16"]
    assert f"differ by {record['logits']['largest']:.2g} at most" in capsys.readouterr().out


def test_nothing_is_left_where_it_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("No room.")

    monkeypatch.setattr("qpruner.export.exporting.logit_errors", fail)
    with pytest.raises(UserError, match="No room"):
        run(["export", str(folder), "--format=dense", f"--output={tmp_path / 'new' / 'out'}"])
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("output", ["x/model", "x", ".", "file"])
def test_nothing_but_an_export_is_replaced(folder: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="it holds no export"):
        run(["export", str(folder), "--format=dense", f"--output={tmp_path / output}", "--overwrite"])
    assert is_compressed(folder) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("format", "family", "changes", "message"),
    [
        ("gguf", "phi3", {}, "llama.cpp has no architecture for this phi3: only llama,"),
        ("gguf", "gemma2", {"kept": KEPT}, "its layers are not equally wide"),
        ("gguf", "qwen3", {"kept": KEPT}, "its layers differ in width and its head is not its embedding"),
        ("gguf", "gemma", {"lora": {"target_modules": ["lm_head"]}}, "its head is not its embedding"),
        ("gguf", "llama", {"hidden_act": "gelu"}, "silu is computed where it has gelu"),
        ("gguf", "llama", {}, "holds no tokenizer.*--tokenizer false"),
        ("mlx", "gemma", {}, "mlx has no model that computes what a gemma does"),
        ("mlx", "llama", {"kept": KEPT, "attention_bias": True}, "have biases, which OpenELM has not"),
        ("mlx", "qwen3", {"attention_bias": True}, "has biases, which mlx's qwen3 has not"),
        ("onnx", "mixtral", {}, "does not work on mixtures of experts, as mixtral is. Use --format dense"),
        ("compressed-tensors", "mixtral", {}, "does not work on mixtures of experts, as mixtral is"),
        ("compressed-tensors", "gpt2", {}, "c_attn.* are no linears in transformers' own model"),
        ("compressed-tensors", "llama", {"precision": DENSE}, "No linear of this model is quantized"),
    ],
)
def test_what_cannot_be_exported_is_told_before_any_weight_is_read(
    tmp_path: Path, weights_unread: Callable[[], None], format: str, family: str, changes: dict[str, Any], message: str
) -> None:
    if (module := formats.EXPORTS[format].module) is not None:
        pytest.importorskip(module)
    source_of(tmp_path / "model", family, **{"precision": NF4} | changes)
    weights_unread()
    with pytest.raises(UserError, match=message):
        run(["export", str(tmp_path / "model"), f"--format={format}", f"--output={tmp_path / 'deep' / 'out'}"])
    assert [*tmp_path.iterdir()] == [tmp_path / "model"]


def test_places_that_cannot_be_written_are_told_before_any_weight_is_read(
    folder: Path, tmp_path: Path, weights_unread: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_unread()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file' is no folder. Name another folder to write"):
        run(["export", str(folder), "--format=dense", f"--output={tmp_path / 'file' / 'out'}"])
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=f"'{tmp_path}' may not be written. Name another folder to write"):
        run(["export", str(folder), "--format=dense", f"--output={tmp_path / 'deep' / 'out'}"])
    assert not (tmp_path / "deep").exists()


def test_an_unknown_format_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match=r"There is no format 'denze'. Did you mean 'dense'\? Choose one of dense"):
        run(["export", str(folder), "--format=denze"])


def test_a_missing_package_is_told_with_its_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Dense):
        name, extra, module = "other", "other-extra", "package_that_nobody_has"

    monkeypatch.setattr(formats, "EXPORTS", {"other": Other()})
    with pytest.raises(UserError, match=r"pip install 'qpruner\[other-extra\]'"):
        run(["export", str(folder), "--format=other"])


def test_options_of_a_format_are_its_own(folder: Path) -> None:
    with pytest.raises(UserError, match="--round_to is an option of --format gguf; dense has none of that name"):
        run(["export", str(folder), "--format=dense", "--round-to=Q8_0"])
    assert isinstance(exporter_for("dense", {}), Dense)


def test_a_file_for_llama_cpp(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    run(["export", str(folder), "--format=gguf", "--round-to=Q5_1", "--tokenizer=false"])
    output = folder.parent / "exports" / "gguf"
    assert {path.name for path in output.iterdir()} == {"model.gguf", "export.json"}
    said = capsys.readouterr().out
    assert f"{(output / 'model.gguf').stat().st_size:,} bytes are on disk in 1 file." in said
    assert "nf4 4/64 is rounded to Q5_1: blk.0.attn_q.weight" in said
    assert "there is no tokenizer; prompts are token ids." in said


def test_without_a_tokenizer_any_tokens_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source_of(tmp_path / "model", kept=KEPT, precision=NF4)
    run(["export", str(tmp_path / "model"), "--format=dense"])
    assert "On tokens of no meaning, logits differ by" in capsys.readouterr().out
