"""The dense model that teaches: which one it is, and whether there is room for it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_model

from qpruner.compressed import CompressedModel
from qpruner.errors import UserError
from qpruner.memory import tensor_bytes
from qpruner.training import teacher
from qpruner.training.distillation import DistillationConfig
from qpruner.training.teacher import OnlineTeacher, check_room, check_teacher, load_teacher, name_of_teacher


def load(name: Path, **options: Any) -> Any:
    config = DistillationConfig(**options)
    return load_teacher(config, str(name), dtype="auto", trust_remote_code=False, device=torch.device("cpu"))


@pytest.fixture
def compressed(tiny_llama: Path, tmp_path: Path) -> Path:
    """The folder of a base without 8 of the 48 channels of each layer, made of a copy of the tiny Llama."""
    shutil.copytree(tiny_llama, tmp_path / "dense")
    model = CompressedModel.load(str(tmp_path / "dense"), dtype="float32")
    model.prune([(range(2), range(40))] * 2)
    model.keep(tmp_path / "compressed", tokenizer=None)
    return tmp_path / "compressed"


def test_it_is_the_one_asked_for_else_the_dense_one_behind_the_base(compressed: Path, tiny_llama: Path) -> None:
    asked, usual = DistillationConfig(base="other"), DistillationConfig()
    assert name_of_teacher(asked, str(compressed)) == "other"
    assert name_of_teacher(usual, str(tiny_llama)) == str(tiny_llama)
    assert name_of_teacher(usual, str(compressed)) == str(compressed.with_name("dense"))
    shutil.rmtree(compressed.with_name("dense"))
    with pytest.raises(UserError, match=r"dense', is not there. Give one as --model.distillation.base"):
        check_teacher(usual, str(compressed), None, trust_remote_code=False)


def test_it_is_held_as_told(tiny_llama: Path) -> None:
    assert load(tiny_llama).dtype == torch.float32  # as the base, which is stored in it
    half = load(tiny_llama, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and not half.training
    assert not any(parameter.requires_grad for parameter in half.parameters())
    whole, packed = load(tiny_llama), load(tiny_llama, dtype="int8")
    linears = [module for name, module in whole.named_modules() if ".layers." in name and hasattr(module, "weight")]
    weights = sum(linear.weight.numel() for linear in linears if linear.weight.ndim == 2)
    rows = sum(len(linear.weight) for linear in linears if linear.weight.ndim == 2)
    assert tensor_bytes(whole) - tensor_bytes(packed) == 3 * weights - 4 * rows  # a scale for each row


@pytest.mark.parametrize("missing", [0, 1])
def test_a_device_without_room_is_told_before_the_teacher_is_moved(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_model("llama")
    needed = tensor_bytes(network)
    monkeypatch.setattr(teacher.torch.cuda, "mem_get_info", lambda device: (needed - missing, needed))
    if missing:
        with pytest.raises(UserError, match=rf"needs {needed:,} bytes .* {needed - 1:,} free.*teacher recorded"):
            check_room(network, torch.device("cuda", 1))
    else:
        check_room(network, torch.device("cuda", 1))


def test_it_may_compute_elsewhere_than_the_student(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    network = load(tiny_llama)
    monkeypatch.setattr(type(network), "to", lambda self, device: moved.append(device))
    OnlineTeacher(network, DistillationConfig(), torch.device("meta")).begin()
    assert moved == [torch.device("meta")]
