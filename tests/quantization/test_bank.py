"""Plans assembled from a bank, back and forth, against models quantized afresh; and the files of a bank in a folder."""

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.families import LAYERS, logits_of
from support.linears import quantize_dequantize
from support.quantized import WIDE, equal, pruned, settings
from support.ranks import together

from qpruner.errors import UserError
from qpruner.files import hash_json
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.quantization import bank as banks
from qpruner.quantization.apply import LoftQSettings, linear_precisions, quantize_
from qpruner.quantization.bank import Bank, fill, fill_folder, open_folder
from qpruner.quantization.formats import num_bytes
from qpruner.quantization.packed import PackedLinear

CPU = torch.device("cpu")
NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
Q_PROJ = "model.layers.1.self_attn.q_proj"
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
LOFTQ = [settings(), None]


def in_folder(
    folder: Path,
    model: Any,
    plan: CompressionPlan,
    start: LoftQSettings | None = LOFTQ[0],
    *,
    precisions: Any = (NF4, INT8),
    processes: Processes | None = None,
    layers: list[int] | None = None,
) -> Bank:
    return fill_folder(
        folder, model, precisions, start, base=known_by(plan), layers=layers, processes=processes or Processes.alone()
    )


def dense(family: str = "llama") -> tuple[Any, CompressionPlan]:
    return pruned(family, [dict.fromkeys(UNITS, DENSE)] * LAYERS)


def known_by(plan: CompressionPlan) -> str:
    """Stands for the hash of the folder that keeps a pruned base."""
    return hash_json([plan.base_sha256, [(layer.kv_groups, layer.ffn_channels) for layer in plan.layers]])


def random_plans(plan: CompressionPlan, number: int) -> list[CompressionPlan]:
    """Of 4, 8 or 16 bits for each unit."""
    draw = random.Random(11)
    return [
        plan.with_precision([{unit: draw.choice((NF4, INT8, DENSE)) for unit in UNITS} for _ in plan.layers])
        for _ in range(number)
    ]


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def assert_same(model: Any, reference: Any) -> None:
    found, expected = model.state_dict(), reference.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert torch.equal(logits_of(model), logits_of(reference))


@FAMILIES
@pytest.mark.parametrize("start", LOFTQ, ids=["LoftQ", "plain"])
@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_assembled_plans_are_those_quantized_afresh(
    family: str, start: LoftQSettings | None, kept_in: str, tmp_path: Path
) -> None:
    model, plan = dense(family)
    original, linears = (
        copy.deepcopy(model),
        {name: model.get_submodule(name) for name in linear_precisions(model, plan)},
    )
    bank = (
        fill(model, (NF4, INT8), start, device=CPU) if kept_in == "memory" else in_folder(tmp_path, model, plan, start)
    )
    assert_same(model, original)
    for candidate in random_plans(plan, 4):
        fresh = copy.deepcopy(original)
        expected = quantize_(fresh, candidate, start, device=CPU)
        found = bank.assemble_(model, candidate)
        assert_same(model, fresh)
        assert found.keys() == expected.keys() and equal(found, expected)
        assert bool(found) == (start is not None)
        assert {name: getattr(model.get_submodule(name), "precision", DENSE) for name in linears} == linear_precisions(
            model, candidate
        )
    assert bank.assemble_(model, plan) == {}
    assert_same(model, original)
    assert all(model.get_submodule(name) is linear for name, linear in linears.items())


def test_a_lower_rank_starts_from_the_leading_part_which_is_what_it_would_be_afresh() -> None:
    model, plan = dense()
    start = settings(rank=3)
    bank = fill(model, [NF4], start, device=CPU)
    plan = plan.with_precision([dict.fromkeys(UNITS, NF4)] * LAYERS).with_ranks([1, None, 2])
    expected = quantize_(copy.deepcopy(model), plan, start, device=CPU)
    factors = bank.assemble_(model, plan)
    assert [len(factors[Q_PROJ.replace("1", str(layer))][0]) for layer in range(LAYERS)] == [1, 3, 2]
    for name, (lora_A, lora_B) in factors.items():
        assert (lora_A.shape, lora_B.shape) == tuple(tensor.shape for tensor in expected[name])
        torch.testing.assert_close(lora_B @ lora_A, expected[name][1] @ expected[name][0], rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match=r"adapters of rank 4 on .* filled for 3\. Raise --model\.lora\.r"):
        bank.assemble_(model, plan.with_ranks([4, None, None]))


def test_linears_weights_and_factors_by_name() -> None:
    model, _ = dense()
    weight, start = model.get_submodule(Q_PROJ).weight.detach(), settings(num_iterations=2)
    bank = fill(model, (NF4, INT8), start, device=CPU)
    assert bank.linear(Q_PROJ, DENSE) is model.get_submodule(Q_PROJ)
    assert torch.equal(bank.weight(Q_PROJ, DENSE, CPU), weight) and bank.factors(Q_PROJ, DENSE) is None
    assert torch.equal(
        fill(model, [INT8], None, device=CPU).weight(Q_PROJ, INT8, CPU), quantize_dequantize(weight, INT8)
    )
    errors = []
    for precision in (NF4, INT8):
        lora_A, lora_B = bank.factors(Q_PROJ, precision) or ()
        held = bank.weight(Q_PROJ, precision, CPU)
        errors.append(float((weight - held - start.scale * lora_B @ lora_A).norm()))
        assert errors[-1] < (weight - held).norm()
        other = bank.factors(Q_PROJ, INT8 if precision == NF4 else NF4) or ()
        assert errors[-1] < (weight - held - start.scale * other[1] @ other[0]).norm()
    assert errors[1] < errors[0] / 4


def test_only_targets_have_factors() -> None:
    model, plan = dense()
    bank = fill(model, [NF4], settings(targets=("v_proj",)), device=CPU)
    assert set(bank.assemble_(model, plan.with_precision([dict.fromkeys(UNITS, NF4)] * LAYERS))) == {
        f"model.layers.{n}.self_attn.v_proj" for n in range(LAYERS)
    }


def test_a_linear_stays_in_place_where_its_precision_does() -> None:
    model, plan = dense()
    bank = fill(model, (NF4, INT8), None, device=CPU)
    first, second = random_plans(plan, 2)
    bank.assemble_(model, first)
    before = {name: model.get_submodule(name) for name in linear_precisions(model, plan)}
    bank.assemble_(model, second)
    stays = {
        name for name, one in linear_precisions(model, first).items() if linear_precisions(model, second)[name] == one
    }
    assert {name for name, linear in before.items() if model.get_submodule(name) is linear} == stays
    assert 0 < len(stays) < len(before)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_placed_is_in_the_mode_of_what_was_there(training: bool) -> None:
    model, plan = dense()
    model.train(training)
    fill(model, [INT8], None, device=CPU).assemble_(model, plan.with_precision([dict.fromkeys(UNITS, INT8)] * LAYERS))
    assert {module.training for module in model.modules()} == {training}


@FAMILIES
@pytest.mark.parametrize("start", LOFTQ, ids=["LoftQ", "plain"])
def test_its_bytes_are_those_of_codes_scales_and_factors(family: str, start: LoftQSettings | None) -> None:
    model, plan = dense(family)
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in linear_precisions(model, plan)]
    expected = sum(num_bytes(*shape, precision) for shape in shapes for precision in (NF4, INT8))
    if start is not None:
        expected += sum(2 * start.rank * sum(shape) * 4 for shape in shapes)
    assert fill(model, (NF4, DENSE, INT8), start, device=CPU).num_bytes == expected


def test_a_precision_that_is_not_held_is_named(tmp_path: Path) -> None:
    model, plan = dense()
    for bank in (
        fill(model, [INT8, NF4], None, device=CPU),
        in_folder(tmp_path, model, plan, None, precisions=[INT8, NF4]),
    ):
        with pytest.raises(UserError, match=rf"not hold {Q_PROJ} in fp4 4/64; it holds int8-8-default, nf4-4-64\."):
            bank.linear(Q_PROJ, Precision("fp4", 4, 64))
        for precision in (Precision("nf4", 4), Precision("nf4", 4, 32)):
            with pytest.raises(UserError, match="does not hold"):
                bank.factors(Q_PROJ, precision)


def test_a_rank_above_a_linear_is_told() -> None:
    with pytest.raises(UserError, match=r"LoRA rank 8 is above that of model\.layers\.2\.mlp\.gate_proj, which is 7"):
        fill(dense()[0], [NF4], settings(rank=8), device=CPU)


# Folders.


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = dense()
    first = in_folder(tmp_path, model, plan)
    made = modified(tmp_path)
    assert sorted(made) == [f"layer-{number:03d}.safetensors" for number in range(LAYERS)]
    monkeypatch.setattr(banks, "quantize_linear", None)
    second = in_folder(tmp_path, model, plan, precisions=[INT8, DENSE])
    assert modified(tmp_path) == made
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())


def test_what_is_missing_is_made(tmp_path: Path) -> None:
    model, plan = dense()
    whole, made = in_folder(tmp_path, model, plan), modified(tmp_path)
    (tmp_path / "layer-001.safetensors").unlink()
    again = in_folder(tmp_path, model, plan)
    assert {name for name, time in modified(tmp_path).items() if time != made[name]} == {"layer-001.safetensors"}
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in whole.tensors.items())


def test_a_file_without_a_precision_is_made_again_with_it(tmp_path: Path) -> None:
    model, plan = dense()
    in_folder(tmp_path, model, plan, precisions=[NF4])
    with pytest.raises(UserError, match="does not hold"):
        in_folder(tmp_path, model, plan, precisions=[NF4]).linear(Q_PROJ, INT8)
    made = modified(tmp_path)
    found = in_folder(tmp_path, model, plan)
    assert not made.items() & modified(tmp_path).items()
    expected = fill(model, (NF4, INT8), LOFTQ[0], device=CPU).tensors
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.items())


def of_two_ranks(*folders: Path) -> list[Any]:
    """What each of two processes gets when both fill a bank, each in the folder that it sees."""
    models = [dense(), dense()]  # drawn here: threads share the random state
    works = [
        lambda processes, place=place, model=model: in_folder(place, *model, processes=processes)
        for place, model in zip(folders, models, strict=True)
    ]
    return together(*works)


def test_two_ranks_fill_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them quantizes its layers alone, and then both have all."""
    written: list[str] = []

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path.name.split(".")[1])
        save_file(tensors, path, metadata)

    monkeypatch.setattr(banks, "save_file", save)
    banks_of_ranks = of_two_ranks(tmp_path, tmp_path)
    assert sorted(written) == ["layer-000", "layer-001", "layer-002"]
    expected = fill(dense()[0], (NF4, INT8), LOFTQ[0], device=CPU).tensors
    for bank in banks_of_ranks:
        assert isinstance(bank, Bank) and bank.tensors.keys() == expected.keys()
        assert all(torch.equal(bank.tensors[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(("layer", "rank", "left"), [(1, 1, [0, 2]), (2, 0, [0, 1])])
def test_a_layer_that_fails_on_one_rank_ends_the_work_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, rank: int, left: list[int]
) -> None:
    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if f"layer-00{layer}" in path.name:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(banks, "save_file", save)
    answers = of_two_ranks(tmp_path, tmp_path)
    for told in answers:
        assert isinstance(told, UserError)
        assert str(told).startswith(f"Cannot write '{tmp_path}/layer-00{layer}.safetensors': No space left on device")
    assert sorted(modified(tmp_path)) == [f"layer-00{number}.safetensors" for number in left]  # for the next time


def test_a_folder_that_another_rank_has_not_filled_is_told(tmp_path: Path) -> None:
    """To all: each rank has a disk of its own, and the second lacks what the first has made."""
    answers = of_two_ranks(tmp_path / "0", tmp_path / "1")
    for answer, number in zip(answers, (1, 0), strict=True):
        assert isinstance(answer, UserError) and f"layer-00{number}.safetensors' was to be made by" in str(answer)


@pytest.mark.parametrize("size", [0, 5, 400, -1])
def test_a_file_that_was_cut_off_is_named_and_made_again(tmp_path: Path, size: int) -> None:
    model, plan = dense()
    whole = {key: tensor.clone() for key, tensor in in_folder(tmp_path, model, plan).tensors.items()}  # not mapped
    path = tmp_path / "layer-002.safetensors"
    whole_bytes = path.read_bytes()
    path.write_bytes(whole_bytes[:size])
    with pytest.raises(UserError, match=rf"{path}' is not a whole file of a bank"):
        open_folder(tmp_path, model, LOFTQ[0], base=known_by(plan))
    with pytest.warns(UserWarning, match=rf"{path}' is not a whole file of a bank: .* It is made again"):
        again = in_folder(tmp_path, model, plan).tensors
    assert path.read_bytes() == whole_bytes
    assert again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)


def test_only_layers_that_are_asked_for_are_quantized(tmp_path: Path) -> None:
    model, plan = dense()
    in_folder(tmp_path, model, plan, layers=[1])
    assert [path.name for path in tmp_path.iterdir()] == ["layer-001.safetensors"]
    bank = fill(model, [INT8], None, layers=[0, 2], device=CPU)
    assert {key.partition("/")[0].split(".")[2] for key in bank.tensors} == {"0", "2"}


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = dense()
    linears = [module for module in model.model.layers.modules() if type(module) is torch.nn.Linear]
    needed = sum(num_bytes(*linear.weight.shape, precision) for linear in linears for precision in (NF4, INT8))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed - 1))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"needs {needed:,} bytes in .* has {needed - 1:,} left"):
        in_folder(tmp_path, model, plan, precisions=[NF4, INT8])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed))  # type: ignore[attr-defined]
    in_folder(tmp_path, model, plan, precisions=[NF4, INT8])


OTHERS: dict[str, Callable[[Any, CompressionPlan], tuple[Any, CompressionPlan, LoftQSettings | None]]] = {
    "sha": lambda model, plan: (model, replace(plan, base_sha256="ab"), LOFTQ[0]),
    "pruning": lambda model, plan: (*pruned("llama", kept=[WIDE[1], WIDE[0], WIDE[2]]), LOFTQ[0]),
    "channels": lambda model, plan: (model, moved(plan), LOFTQ[0]),
    "dtype": lambda model, plan: (copy.deepcopy(model).bfloat16(), plan, LOFTQ[0]),
    "no LoftQ": lambda model, plan: (model, plan, None),
    "rank": lambda model, plan: (model, plan, settings(rank=2)),
    "scale": lambda model, plan: (model, plan, settings(scale=2.0)),
    "targets": lambda model, plan: (model, plan, settings(targets=("q_proj",))),
    "iterations": lambda model, plan: (model, plan, settings(num_iterations=2)),
    "seed": lambda model, plan: (model, plan, settings(seed=1)),
}


def moved(plan: CompressionPlan) -> CompressionPlan:
    """As wide, of other channels."""
    first, *others = plan.layers
    return replace(plan, layers=(replace(first, ffn_channels=tuple(c + 1 for c in first.ffn_channels)), *others))


@pytest.mark.parametrize("other", OTHERS)
def test_the_bank_of_another_model_or_start_is_refused_and_made_again(tmp_path: Path, other: str) -> None:
    model, plan = dense()
    in_folder(tmp_path, model, plan)
    made = modified(tmp_path)
    assert modified(tmp_path) == made
    other_model, other_plan, loftq = OTHERS[other](model, plan)
    with pytest.raises(UserError, match=rf"{tmp_path}/layer-000\.safetensors' belongs to a bank of another model"):
        open_folder(tmp_path, other_model, loftq, base=known_by(other_plan))
    with pytest.warns(UserWarning, match="belongs to a bank of another model.* It is made again"):
        bank = in_folder(tmp_path, other_model, other_plan, loftq)
    fresh = fill(other_model, [NF4, INT8], loftq, device=CPU)
    assert all(torch.equal(bank.tensors[key], tensor) for key, tensor in fresh.tensors.items())


def test_tensors_are_named_by_linear_precision_and_part(tmp_path: Path) -> None:
    in_folder(tmp_path, *dense(), precisions=[INT8])
    with safe_open(tmp_path / "layer-001.safetensors", framework="pt") as file:
        keys = set(file.keys())
    parts = {key.removeprefix(f"{Q_PROJ}/int8-8-default/") for key in keys if key.startswith(f"{Q_PROJ}/")}
    assert parts == {"codes", "scales", "lora_A", "lora_B"} and len(keys) == 7 * 4


def test_packed_linears_are_on_the_tensors_of_the_bank() -> None:
    model, _ = dense("qwen2")
    bank = fill(model, [INT8], None, device=CPU)
    linear = bank.linear(Q_PROJ, INT8)
    assert isinstance(linear, PackedLinear) and linear.bias is not None and not linear.bias.requires_grad
    held = {tensor.data_ptr() for tensor in bank.tensors.values()}
    assert {tensor.data_ptr() for tensor in linear.packed().values()} <= held
    assert linear.bias.data_ptr() == model.get_submodule(Q_PROJ).bias.data_ptr()
