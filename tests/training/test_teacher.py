"""The dense model that teaches: which one it is, and whether there is room for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_model

from qpruner.compressed import CompressedModel
from qpruner.errors import UserError
from qpruner.memory import tensor_bytes
from qpruner.model_folder import read_base_config
from qpruner.plan import UNITS
from qpruner.pretrained import load_tokenizer
from qpruner.quantization.packed import PackedLinear
from qpruner.training import teacher
from qpruner.training.distillation import DistillationConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.teacher import OnlineTeacher, check_teacher, load_teacher, name_of_teacher, order_of_base


def load(name: Path, on: str = "cpu", **options: Any) -> Any:
    config = DistillationConfig(**options)
    return load_teacher(config, str(name), dtype="auto", trust_remote_code=False, device=torch.device(on))


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


@pytest.mark.parametrize(
    ("student", "teacher"), [("b", "dense"), ("b", "a"), ("a", "b"), ("a", "./a/"), ("dense", "a"), ("c", "b")]
)
def test_channels_are_found_through_every_folder_between(
    student: str, teacher: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "dense")
    for name, made_from in (("a", "dense"), ("b", "a"), ("c", "dense")):
        model = CompressedModel.load(made_from, dtype="float32")
        model.reorder(torch.randperm(model.network.config.hidden_size).tolist())
        model.keep(Path(name), tokenizer=None)
    order = order_of_base(DistillationConfig(hidden=1.0, base=teacher), student)
    ours, theirs = (
        CompressedModel.load(name, dtype="float32").network.get_input_embeddings().weight for name in (student, teacher)
    )
    assert torch.equal(ours, theirs if order is None else theirs[:, list(order)])
    assert (order is None) == (teacher == "./a/")
    assert order_of_base(DistillationConfig(base=teacher), student) is None  # hidden states are not taught


@pytest.mark.parametrize("taught_by", ["what it was made from", "itself"])
def test_hidden_states_are_compared_channel_by_channel(taught_by: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    order = torch.randperm(model.network.config.hidden_size).tolist()
    model.reorder(order)
    model.keep(tmp_path / "reordered", tokenizer=None)
    base = str(tmp_path / "reordered")
    config = DistillationConfig(hidden=1.0, base=base if taught_by == "itself" else None)
    assert order_of_base(config, base) == (None if taught_by == "itself" else tuple(order))

    module = LoRAFinetuner(base, dtype="float32", distillation=config)
    module.load_base()
    module.attach_adapters()
    network = load(Path(name_of_teacher(config, base)))
    teacher = OnlineTeacher(network, config, torch.device("cpu"))
    tokens = torch.randint(0, 2048, (2, 9))
    batch: Any = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    parts = module.distilled(batch, teacher).parts
    assert float(parts["hidden"].max()) < 1e-6 and float(parts["kl"].abs().max()) < 1e-4


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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - missing, needed))
    moved: list[torch.device] = []
    monkeypatch.setattr(type(network), "to", lambda self, device: moved.append(device))
    online = OnlineTeacher(network, DistillationConfig(), torch.device("cuda", 1))
    if missing:
        with pytest.raises(UserError, match=rf"needs {needed:,} more bytes .* {needed - 1:,} free.*teacher recorded"):
            online.begin()
    else:
        online.begin()
    assert len(moved) == 1 - missing


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}])
def test_what_it_takes_is_known_and_told_before_it_is_loaded(
    options: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny_llama, **options)
    packed = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    needed = tensor_bytes(loaded) - sum(4 * module.out_features for module in packed)  # without scales
    assert bool(packed) == (options.get("dtype") == "int8")
    said: list[str] = []
    monkeypatch.setattr(teacher, "rank_zero_info", said.append)
    monkeypatch.setattr(CompressedModel, "load", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, needed))
    with pytest.raises(UserError, match=rf"needs {needed:,} more bytes .*cuda:0 has {needed - 1:,} free.*dtype int8"):
        load(tiny_llama, "cuda:0", **options)
    assert said == [f"The model that teaches takes {needed:,} bytes on cuda:0."]


def test_a_folder_of_packed_weights_is_measured_once_it_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    plan = model.known_plan()
    eight = [dict.fromkeys(UNITS, teacher.INT8)] * len(plan.layers)
    model.quantize(plan.with_precision(eight), None, device=torch.device("cpu"))
    model.keep(tmp_path / "packed", tokenizer=None)
    said: list[str] = []
    monkeypatch.setattr(teacher, "rank_zero_info", said.append)
    network = load(tmp_path / "packed")
    assert said == [f"The model that teaches takes {tensor_bytes(network):,} bytes on cpu."]


def with_tokenizer(folder: Path, model: Path, changed: dict[str, int]) -> str:
    """A copy of a model whose tokenizer gives words other numbers; a new word is an added one."""
    shutil.copytree(model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= changed
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_a_teacher_with_another_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = read_base_config(str(tiny_llama))
    vocabulary = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]["vocab"]
    one, other = [word for word in vocabulary if len(word) > 2 and word.isalpha()][-2:]
    swapped = {one: vocabulary[other], other: vocabulary[one]}
    stranger = with_tokenizer(tmp_path / "stranger", tiny_llama, swapped)
    chat = Path(with_tokenizer(tmp_path / "chat", tiny_llama, {}))
    tokenizer = load_tokenizer(str(chat))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(chat)
    mute = Path(with_tokenizer(tmp_path / "mute", tiny_llama, {}))
    for file in mute.glob("tokenizer*"):
        file.unlink()

    def check(base: str | None) -> None:
        check_teacher(DistillationConfig(base=base), str(tiny_llama), config, trust_remote_code=False)

    with pytest.raises(UserError, match=r"stranger', has another vocabulary than the student .*give 2 words other"):
        check(stranger)
    for fitting in (str(chat), str(mute), str(tiny_llama), None):
        check(fitting)


def test_it_may_compute_elsewhere_than_the_student(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    network = load(tiny_llama)
    monkeypatch.setattr(type(network), "to", lambda self, device: moved.append(device))
    OnlineTeacher(network, DistillationConfig(), torch.device("meta")).begin()
    assert moved == [torch.device("meta")]
