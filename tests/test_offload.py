"""A model whose blocks lie in files against the same model in memory: everything found of it, and made of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration
from support.disks import files_end_at
from support.families import each_of, logits_of, tiny_model
from support.fits import finetuner, fit
from torch import Tensor, nn

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.anatomy import FAMILIES, decoder_blocks
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.compressed import CompressedModel
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.memory import place_
from qpruner.offload import (
    Offload,
    Shelf,
    _mapped_from_files,
    at_work,
    choose,
    let_go,
    offload_,
    offload_of,
    outside_blocks,
    passing,
    tensors_of,
)
from qpruner.plan import Precision
from qpruner.pruning.scores import score_units
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.formats import quantize

CPU = torch.device("cpu")
ELSEWHERE: Any = torch.float64
"""What tensors are moved to in place of a second device, which a machine without an accelerator lacks."""
TEXT = CalibrationConfig(num_sequences=12, length=16, batch_size=64)


def shelved_files() -> int:
    """Files without a name that are mapped into this process."""
    return Path("/proc/self/maps").read_text().count(".offload-")


def lies_in_file(tensor: Tensor) -> bool:
    return any(start <= tensor.data_ptr() < end for start, end in _mapped_from_files())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_a_shelved_tensor_has_its_values_and_no_file_that_anyone_sees(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6000).view(2, 3000).to(dtype).T  # not contiguous
    shelved = Offload(tmp_path).shelve(tensor)
    assert torch.equal(shelved, tensor) and shelved.dtype is dtype and shelved.shape == (3000, 2)
    assert lies_in_file(shelved) and not lies_in_file(tensor)
    assert list(tmp_path.iterdir()) == []
    let_go([shelved])
    assert torch.equal(shelved, tensor)


def test_what_was_written_over_a_shelved_tensor_is_not_let_go(tmp_path: Path) -> None:
    shelved = Offload(tmp_path).shelve(torch.zeros(100_000))
    shelved[5000] = 7
    let_go([shelved])
    assert shelved[5000] == 7 and shelved.sum() == 7


def test_an_empty_tensor_stays_as_it_is(tmp_path: Path) -> None:
    empty = torch.empty(0, 4)
    assert Offload(tmp_path).shelve(empty) is empty


def test_a_full_disk_is_told_and_nothing_is_left_there(tmp_path: Path) -> None:
    with files_end_at(1000), pytest.raises(UserError, match=rf"Cannot write '{tmp_path}': .*Make room there"):
        Offload(tmp_path).shelve(torch.zeros(1000))
    assert list(tmp_path.iterdir()) == []


def test_tensors_on_a_shelf_lie_in_files_and_are_gone_with_it(tmp_path: Path) -> None:
    tensors = [torch.arange(4000, dtype=torch.float64).view(50, 80), torch.ones(()), torch.empty(3, 0)]
    expected, pointers = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    Shelf(tensors, None)
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    before = shelved_files()
    shelf = Shelf(tensors, Offload(tmp_path))
    for _ in range(2):
        assert all(map(lies_in_file, tensors[:2])) and shelved_files() == before + 2
        with shelf.taken():
            assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))
    assert list(tmp_path.iterdir()) == []
    del shelf, tensors
    assert shelved_files() == before


def test_tensors_on_a_shelf_come_to_their_device_and_go_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(6.0)
    shelf = Shelf([tensor], Offload(tmp_path))
    let_go_of: list[int] = []
    monkeypatch.setattr("qpruner.offload.let_go", lambda tensors: let_go_of.extend(t.data_ptr() for t in tensors))
    shelf._places = [(tensor, ELSEWHERE)]
    home = tensor.data_ptr()
    with shelf.taken():
        assert tensor.dtype is ELSEWHERE and tensor.sum() == 15
        assert let_go_of == []
    assert tensor.dtype is torch.float32 and tensor.data_ptr() == home and let_go_of == [home]


def test_weights_go_into_files_once_and_packed_ones_never(tmp_path: Path) -> None:
    packed = quantize(nn.Linear(64, 64, bias=False), Precision("nf4", 4, 64))
    module = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), packed, nn.Linear(64, 64))
    Offload(tmp_path).shelve_(module)
    first, _, trains = module
    assert lies_in_file(first.weight) and lies_in_file(first.bias)
    assert not any(map(lies_in_file, packed.parameters())) and not lies_in_file(trains.weight)
    place = first.weight.data_ptr()
    Offload(tmp_path).shelve_(module)
    assert first.weight.data_ptr() == place


def test_a_block_at_work_is_on_the_device_and_then_where_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama").requires_grad_(False)
    offload_(model, Offload(tmp_path))
    block = decoder_blocks(model)[1]
    before = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    values = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with at_work(block, ELSEWHERE, offload_of(model)):
        assert {tensor.dtype for tensor in tensors_of(block)} == {ELSEWHERE}
    assert {name: parameter.data_ptr() for name, parameter in block.named_parameters()} == before
    with at_work(block, CPU, offload_of(model)):
        block.mlp.up_proj.weight = nn.Parameter(torch.ones(5, 64), requires_grad=False)
    assert lies_in_file(block.mlp.up_proj.weight) and block.mlp.up_proj.weight.sum() == 320
    assert all(
        torch.equal(parameter, values[name]) for name, parameter in block.named_parameters() if "up_proj" not in name
    )


def test_what_comes_while_a_block_is_at_work_is_not_taken_for_what_went(tmp_path: Path) -> None:
    """An object that comes may get the id of one that went."""
    block = nn.ModuleList(nn.Linear(8, 8).requires_grad_(False) for _ in range(40))
    with at_work(block, CPU, Offload(tmp_path)):
        for number in range(40):
            block[number] = nn.Linear(3, 2).requires_grad_(False)
            block[number].weight.fill_(number)
    assert [(linear.weight.shape, float(linear.weight[0, 0])) for linear in block] == [
        (torch.Size([2, 3]), number) for number in range(40)
    ]


def test_a_model_that_is_offloaded_no_longer_is_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").requires_grad_(False)
    moved: list[Any] = []
    monkeypatch.setattr(model, "to", moved.append)
    offload_(model, None)
    offload_(model, Offload(tmp_path))
    assert moved == []
    offload_(model, None)
    assert moved == ["cpu"] and offload_of(model) is None


def test_of_a_whole_model_nothing_moves() -> None:
    model = tiny_model("llama")
    block = decoder_blocks(model)[0]
    with at_work(block, ELSEWHERE, offload_of(model)):
        assert {tensor.dtype for tensor in tensors_of(block)} == {torch.float32}


def test_room_is_asked_for_what_is_outside_and_the_largest_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("qpruner.memory.check_free", lambda needed, device, remedy: asked.append(needed))
    model = tiny_model("llama").requires_grad_(False)
    offload_(model, Offload(tmp_path))
    block = sum(tensor.nbytes for tensor in tensors_of(decoder_blocks(model)[0]))
    place_(model, CPU)  # where all of it is
    assert asked == [block]


@each_of(FAMILIES)
def test_text_passes_through_an_offloaded_model(tmp_path: Path, family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    expected = logits_of(model)
    offload_(model, Offload(tmp_path))
    assert all(lies_in_file(parameter) for block in decoder_blocks(model) for parameter in block.parameters())
    assert not any(map(lies_in_file, outside_blocks(model)))
    with passing(model):
        assert torch.equal(logits_of(model), expected)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in decoder_blocks(model))


@pytest.mark.parametrize("criterion", ["fisher", "param_mix", "wanda", "flap", "reconstruction"])
def test_scores_are_the_same(tmp_path: Path, criterion: Any) -> None:
    def scores(model: Any) -> list[Tensor]:
        layers = score_units(model, criterion, "sum", calibration(2), seed=0)
        return [tensor for layer in layers for tensor in (layer.kv_groups, layer.ffn_channels)]

    model = tiny_model("qwen2").requires_grad_(False)
    expected = scores(model)
    offload_(model, Offload(tmp_path))
    assert all(torch.equal(*pair) for pair in zip(scores(model), expected, strict=True))


def decided(method: str) -> MixedPrecisionQuantization:
    deciding = DecidingConfig(widths=(2, 4, 8), calibration=TEXT, contexts=2)
    return MixedPrecisionQuantization(allocation=method, budget=Budget(average_bits=5.0), deciding=deciding)


COMPRESSIONS: dict[str, Callable[[], list[Any]]] = {
    "sequential": lambda: [StructuredPruning(0.1, calibration=TEXT, compensation_text=TEXT)],
    "local": lambda: [
        StructuredPruning(0.1, rounds=2, calibration=TEXT, compensation="local", compensation_text=TEXT),
        MixedPrecisionQuantization(4),
    ],
    "by text": lambda: [MixedPrecisionQuantization(3, calibrated=CalibratedConfig(text=TEXT, output_groups=2))],
    "mutual information": lambda: [decided("mutual_information")],
    "sensitivity": lambda: [decided("sensitivity")],
    "marginal": lambda: [decided("marginal")],
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(name, "auto", marks=[pytest.mark.slow] if name in ("local", "sensitivity", "marginal") else [])
            for name in COMPRESSIONS
        ),
        ("sequential", "bfloat16"),
    ],
)
def test_a_fit_makes_the_same_of_it(
    tmp_path: Path, tiny_llama: Path, stories: StoriesDataModule, name: str, dtype: Any
) -> None:
    def compressed(offload: Any) -> dict[str, Tensor]:
        module = finetuner(tiny_llama, dtype=dtype, offload=offload)
        module.kept_in = tmp_path / offload / "base"
        fit(module, stories, *COMPRESSIONS[name](), steps=1)
        assert not module.compressed.offloaded
        return {**module.state_dict(), "plan": torch.tensor(list(module.compressed.known_plan().to_json().encode()))}

    always, never = compressed("always"), compressed("never")
    assert always.keys() == never.keys()
    assert [key for key in never if not torch.equal(always[key], never[key])] == []


def test_only_what_is_left_of_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", 2**20, CPU)[0] is False
    offloads, reason = choose("auto", 2**50, CPU)
    assert offloads and "block by block from files (offload auto)" in reason and f"{2**50:,}" in reason
    assert choose("always", 1, CPU)[0] and not choose("never", 2**50, CPU)[0]
    free = 10 * 2**30
    monkeypatch.setattr("qpruner.offload._available", lambda: free)
    assert [choose("auto", free // 5, CPU, number)[0] for number in (1, 4, 5)] == [False, False, True]
    monkeypatch.setattr("qpruner.offload._available", lambda: None)
    monkeypatch.setattr("sys.platform", "darwin")
    offloads, reason = choose("auto", 2**50, CPU)
    assert not offloads and reason.endswith("and the system does not say what it has free.")
    with pytest.raises(UserError, match="--model.offload always needs Linux"):
        choose("always", 1, CPU)


def test_a_base_in_another_number_format_never_is_whole_in_memory(tmp_path: Path, tiny_llama: Path) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="bfloat16", offload=Offload(tmp_path))
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    assert all(lies_in_file(parameter) for block in decoder_blocks(model.network) for parameter in block.parameters())
    assert model.offloaded


def test_a_base_as_it_is_stored_is_mapped_from_its_own_file(tmp_path: Path, tiny_llama: Path) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="float32", offload=Offload(tmp_path))
    place = decoder_blocks(model.network)[0].mlp.up_proj.weight.data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [([int(end, 16) for end in line[0].split("-")], line[-1]) for line in lines]
    (holder,) = (name for (start, end), name in ranges if start <= place < end)
    assert holder == str(tiny_llama / "model.safetensors")
