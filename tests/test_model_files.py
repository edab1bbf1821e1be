"""Folders that people take for a base model."""

import json
from pathlib import Path

import pytest
from support.bases import copy_base

from qpruner.errors import UserError
from qpruner.model_files import check_is_model, check_weights, weight_files

ADAPTERS = json.dumps({"base_model_name_or_path": "maker/base", "peft_type": "LORA"})


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_adapters_alone_and_beside_a_model(tmp_path: Path) -> None:
    touch(tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(ADAPTERS)
    with pytest.raises(UserError, match=r"holds adapters of PEFT \(adapter_config.json\), and a base .*'maker/base'"):
        check_is_model(tmp_path)
    touch(tmp_path, "config.json")
    with pytest.raises(UserError, match=r"adapters of PEFT .*beside a model.*take the adapter_\* files out of it"):
        check_is_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model/config.json", "run.log"], r"holds no config.json; '.*/model' does. Give the folder of the model"),
        (["checkpoint-10/config.json", "checkpoint-20/config.json"], "'.*checkpoint-10', '.*checkpoint-20' do. Give"),
        (["phase2/model/config.json"], "'.*phase2/model' does"),
        (["tokenizer.json"], "holds no config.json, but a tokenizer alone"),
        (["model_index.json", "unet/config.json"], "but a diffusers pipeline"),
        (["modules.json", "0_Transformer/config.json"], "but a sentence-transformers model"),
        (["small.gguf"], "but a GGUF file"),
        (["params.json", "consolidated.00.pth", "tokenizer.model"], "but weights in the layout of their makers"),
        (["notes.md"], "holds no config.json. Give a folder as `save_pretrained`"),
    ],
)
def test_folders_without_a_configuration(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check_is_model(touch(tmp_path, *files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "holds no safetensors; its weights are pickles"),
        (["consolidated.00.pth"], "its weights are pickles"),
        (["small-q4.gguf", "pytorch_model.bin"], "its weights are GGUF"),
        (["tokenizer.json"], r"holds no weights \(model.safetensors, or shards"),
    ],
)
def test_folders_without_safetensors(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(touch(tmp_path, "config.json", *files))


def test_what_lies_beside_the_weights_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """A checkpoint of a training, and the same weights in the layout of their makers."""
    folder = copy_base(tiny_llama, tmp_path / "checkpoint-500")
    touch(folder, "optimizer.pt", "trainer_state.json", "consolidated.safetensors", "model.gguf")
    check_is_model(folder)
    check_weights(folder)
    assert weight_files(folder) == [folder / "model.safetensors"]
