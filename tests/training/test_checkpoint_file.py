"""The file that a fit goes on from, whole and damaged."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.errors import UserError
from qpruner.training.checkpoint_file import read_checkpoint
from qpruner.training.module import LoRAFinetuner


@pytest.fixture
def path(tiny_llama: Path, tmp_path: Path) -> Path:
    module = LoRAFinetuner(base=str(tiny_llama), lora=LoRAConfig(r=2, target_modules=("q_proj",)))
    module.configure_model()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    return tmp_path / "last.ckpt"


def test_a_whole_one_is_read(path: Path) -> None:
    content = read_checkpoint(path)
    assert content["lora"]["r"] == 2 and len(content["state_dict"]) == 4
    assert LoRAFinetuner.load_from_checkpoint(path, weights_only=True).lora.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\0" * len(data),
        lambda data: data[:2000] + b"\0" * 100 + data[2100:],
        lambda data: b"no checkpoint",
        None,
    ],
)
def test_a_damaged_one_is_named(path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    for read in (read_checkpoint, LoRAFinetuner.load_from_checkpoint):
        with pytest.raises(UserError, match=rf"{re.escape(repr(str(path)))}.* Copy the file again") as error:
            read(path)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("state_dict"), "state_dict missing"),
        (lambda c: c["base"].update(folder=3), "base.folder must be text, not 3"),
        (lambda c: c["hyper_parameters"].update(dtype="int8"), "hyper_parameters.dtype must be auto or float32 or"),
        (lambda c: c["hyper_parameters"]["lora"].update(r=0), "lora.r is 0; it must be at least 1"),
        (lambda c: c.update(lora=c["lora"] | {"r": 4}), "of another kind: r 4 there, 2 here"),
        (lambda c: c["state_dict"].popitem(), "q_proj.* are missing, of another shape or too many"),
        (lambda c: c["state_dict"].update(x=torch.ones(2)), "not those of the model: x are missing"),
        (lambda c: c["state_dict"].update({k: v[:1] for k, v in c["state_dict"].items()}), "and 1 more are missing"),
    ],
)  # fmt: skip
def test_one_that_holds_something_else_is_named(path: Path, change: Callable[[Any], Any], said: str) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=said) as error:
        LoRAFinetuner.load_from_checkpoint(path, weights_only=True)
    assert str(path) in str(error.value)
