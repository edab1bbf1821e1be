"""Copies of the tiny Llama with one thing changed, as people have them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qpruner.files import read_json
from qpruner.pretrained import load_tokenizer

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 9\n"
)


def copy_base(
    base: Path,
    folder: Path,
    *,
    weights: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    without: tuple[str, ...] = (),
    files: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """A copy of a base.

    Args:
        base: to copy.
        folder: to make.
        weights: makes other tensors of those of the base.
        without: files to leave out.
        files: others to write, with their text.
        **config: entries of config.json to change.
    """
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*without))
    if weights is not None:
        tensors = weights(load_file(base / "model.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | config))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def save_quantized(base: Path, folder: Path, **options: Any) -> Path:
    """A base as transformers saves it with bitsandbytes."""
    quantization = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map={"": "cpu"})
    model.save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    return folder
