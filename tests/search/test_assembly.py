"""Models that are put together without text, against the dense model that is pruned, compensated and quantized."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.searches import finetuner, stories_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.compressed import CompressedModel
from qpruner.memory import tensor_bytes
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pretrained import load_tokenizer
from qpruner.processes import Processes
from qpruner.pruning.compensation import shared_copy
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import fill
from qpruner.quantization.calibrated import Packing
from qpruner.quantization.calibrated_bank import BankText
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.formats import dequantize, format_for, precision_of
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.rounding import RoundingConfig, round_weight
from qpruner.search.assembly import Assembly, has_sums, keep_sums, sums_path

CPU = torch.device("cpu")
INT8, AFFINE, NF4 = Precision("int8", 8), Precision("affine", 3, 32), precision_of(4, 64, {})
PRECISIONS = (INT8, AFFINE, NF4)
KEPT: Any = [((1,), (*range(4, 30), 40)), (range(2), range(0, 48, 2))]


def text_of(base: Path) -> Calibration:
    return Calibration.share(stories_of(base).calibration(16, 12), Processes.alone(), 48)


def whole(base: Path) -> CompressedModel:
    return CompressedModel.load(str(base), dtype="float32")


def mixed(plan: CompressionPlan) -> CompressionPlan:
    """Each unit of a layer in another precision, and one dense."""
    precisions = [
        dict(zip(UNITS, (AFFINE, NF4, INT8, AFFINE), strict=True)),
        dict(zip(UNITS, (NF4, INT8, AFFINE, Precision("dense", 16)), strict=True)),
    ]
    return plan.with_precision(precisions, embedding=INT8, head=INT8)


@pytest.fixture(scope="module")
def sums(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        keep_sums(folder, whole(tiny_llama).network, text_of(tiny_llama), "text")
    return folder


def assembly(base: Path, sums: Path | None, iterations: int) -> Assembly:
    module, model = finetuner(base), whole(base)
    settings = LoftQSettings.of(module.lora, iterations, 3)
    bank = fill(model.network, PRECISIONS, settings, device=CPU)
    plan = mixed(model.known_plan())
    return Assembly(model, plan, bank, settings, sums, compensates=sums is not None, by_text=None)


def by_hand(base: Path, compensated: bool, iterations: int) -> CompressedModel:
    model = whole(base)
    before, dense = model.known_plan(), shared_copy(model.network)
    model.prune([(list(groups), list(channels)) for groups, channels in KEPT])
    if compensated:
        model.compensate(dense, before, text_of(base), "local")
    model.quantize(mixed(model.known_plan()), LoftQSettings.of(finetuner(base).lora, iterations, 3), device=CPU)
    return model


def packed(model: CompressedModel, name: str) -> PackedLinear:
    linear = model.network.get_submodule(name)
    assert isinstance(linear, PackedLinear)
    return linear


def weights(model: CompressedModel) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.network.named_modules():
        if isinstance(module, PackedLinear):
            yield name, dequantize(module)
        elif isinstance(module, torch.nn.Linear):
            yield name, module.weight.detach()


@pytest.mark.parametrize(("compensated", "iterations"), [(False, 1), (True, 0), (True, 1), (True, 2)])
def test_an_assembled_model_is_the_one_that_is_made_step_by_step(
    compensated: bool, iterations: int, tiny_llama: Path, sums: Path
) -> None:
    expected = by_hand(tiny_llama, compensated, iterations)
    assemble = assembly(tiny_llama, sums if compensated else None, iterations)
    plan = mixed(assemble.plan.keeping(KEPT))
    assemble(mixed(assemble.plan.keeping([((0,), range(3, 9)), ((0, 1), range(7))])))  # what came before is no matter
    model = assemble(plan)
    assert model.known_plan() == plan and model.state is expected.state
    assert tensor_bytes(model.network) == tensor_bytes(expected.network)
    others = dict(weights(expected))
    assert others.keys() == dict(weights(model)).keys()
    for name, weight in weights(model):
        if name.endswith(("o_proj", "down_proj")) and compensated:  # sums are rounded to float32
            torch.testing.assert_close(weight, others[name], rtol=0, atol=2e-3 * float(weight.abs().max()))
        else:
            assert torch.equal(weight, others[name]), name
    assert model.initial_adapters.keys() == expected.initial_adapters.keys()
    for name, factors in model.initial_adapters.items():
        for factor, other in zip(factors, expected.initial_adapters[name], strict=True):
            if not (name.endswith(("o_proj", "down_proj")) and compensated):
                torch.testing.assert_close(factor, other)


BY_TEXT = CalibratedConfig(RoundingConfig(alpha=0.0), text=CalibrationConfig(16, 12))


def assembly_by_text(base: Path, sums: Path, config: CalibratedConfig, *, compensates: bool = True) -> Assembly:
    module, model = finetuner(base), whole(base)
    settings = LoftQSettings.of(module.lora, 1, 3)
    bank = fill(model.network, PRECISIONS, settings, device=CPU, text=BankText(config, {}, text_of(base)))
    plan = mixed(model.known_plan())
    return Assembly(model, plan, bank, settings, sums, compensates=compensates, by_text=config)


@pytest.mark.parametrize("compensates", [False, True])
def test_what_loses_columns_is_rounded_by_the_sums_of_the_inputs_that_stay(
    compensates: bool, tiny_llama: Path, sums: Path
) -> None:
    assemble = assembly_by_text(tiny_llama, sums, BY_TEXT, compensates=compensates)
    to_nearest = assembly(tiny_llama, sums if compensates else None, 0)
    plan = mixed(assemble.plan.keeping(KEPT))
    model, nearest = assemble(plan), to_nearest(plan)
    name, stay = "model.layers.0.mlp.down_proj", torch.tensor(KEPT[0][1])
    gram = load_file(sums_path(sums, 0))["down/decide/gram"].double()
    dense = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * 2, embedding=INT8, head=INT8)
    narrow: Any = assemble(dense).network.get_submodule(name)
    weight = narrow.weight.detach()
    whole_weight: Any = assemble.base.network.get_submodule(name).weight
    assert torch.equal(weight, whole_weight[:, stay]) is not compensates
    hessian = gram[stay][:, stay]
    number_format: Any = format_for(AFFINE)
    expected = round_weight(weight, number_format, AFFINE, hessian, BY_TEXT.rounding).values

    def error(values: Tensor) -> float:
        lost = (values - weight).double()
        return float(((lost @ hessian) * lost).sum())

    by_text, to_nearest_value = (packed(each, name) for each in (model, nearest))
    assert torch.equal(dequantize(by_text), expected)
    assert error(dequantize(by_text)) < 0.8 * error(dequantize(to_nearest_value))


def test_rows_and_starts_of_a_bank_that_text_rounded_are_taken(tiny_llama: Path, sums: Path) -> None:
    assemble = assembly_by_text(tiny_llama, sums, BY_TEXT)
    model = assemble(mixed(assemble.plan.keeping(KEPT)))
    name, stay = "model.layers.1.mlp.gate_proj", torch.arange(0, 48, 2)
    whole_rows = assemble.bank.linear(name, AFFINE)
    assert isinstance(whole_rows, PackedLinear)
    assert torch.equal(dequantize(packed(model, name)), dequantize(whole_rows)[stay])
    factors, in_bank = model.initial_adapters[name], assemble.bank.factors(name, AFFINE)
    assert in_bank is not None
    assert torch.equal(factors[0], in_bank[0]) and torch.equal(factors[1], in_bank[1][stay])


def test_what_was_rounded_once_is_there_for_other_trials(
    tiny_llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "sums"
    shutil.copytree(sums, mine, ignore=shutil.ignore_patterns("columns"))
    rounded: list[str] = []
    round_it = Packing.round
    monkeypatch.setattr(Packing, "round", lambda *args: rounded.append(args[1]) or round_it(*args))
    assemble = assembly_by_text(tiny_llama, mine, BY_TEXT)
    rounded.clear()  # those of the bank
    first = assemble(mixed(assemble.plan.keeping(KEPT)))
    columns = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]  # all groups of layer 1 stay
    assert rounded == columns  # and its down is dense
    again = assemble(mixed(assemble.plan.keeping([((1,), (*range(4, 30), 40)), (range(1), range(9))])))
    assert rounded == [*columns, "model.layers.1.self_attn.o_proj"]
    for name in columns:
        assert torch.equal(dequantize(packed(first, name)), dequantize(packed(again, name)))
        assert all(map(torch.equal, first.initial_adapters[name], again.initial_adapters[name]))
    other_bits = assemble.plan.keeping(KEPT).with_precision([dict.fromkeys(UNITS, INT8)] * 2, embedding=INT8, head=INT8)
    rounded.clear()
    assemble(other_bits)
    assert rounded == [*columns, "model.layers.1.mlp.down_proj"]  # in other bits they are others
    others = assembly_by_text(tiny_llama, mine, replace(BY_TEXT, adapters="weight"))
    rounded.clear()
    others(mixed(others.plan.keeping(KEPT)))
    assert rounded == columns
    keep_sums(mine, whole(tiny_llama).network, text_of(tiny_llama), "another text")
    assert not (mine / "columns").exists()


def test_columns_of_other_sums_are_not_taken_nor_damaged_ones(tiny_llama: Path, sums: Path, tmp_path: Path) -> None:
    mine = tmp_path / "sums"
    shutil.copytree(sums, mine, ignore=shutil.ignore_patterns("columns"))
    plan = mixed(whole(tiny_llama).known_plan().keeping(KEPT))
    name = "model.layers.0.mlp.down_proj"
    expected = dequantize(packed(assembly_by_text(tiny_llama, mine, BY_TEXT)(plan), name))
    files = sorted((mine / "columns").iterdir())
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(dequantize(packed(assembly_by_text(tiny_llama, mine, BY_TEXT)(plan), name)), expected)
    sums_of = load_file(sums_path(mine, 0))
    sums_of["down/decide/gram"] = torch.eye(48)
    save_file(sums_of, sums_path(mine, 0), {"made_from": "others"})
    assert not torch.equal(dequantize(packed(assembly_by_text(tiny_llama, mine, BY_TEXT)(plan), name)), expected)
    assert len(list((mine / "columns").iterdir())) == 2 * len(files)


def test_a_bias_that_makes_up_for_columns_is_kept_with_them(tiny_llama: Path, tmp_path: Path) -> None:
    base, folder, name = tmp_path / "base", tmp_path / "sums", "model.layers.0.mlp.down_proj"
    torch.manual_seed(1)
    network = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, attention_bias=True, mlp_bias=True))
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    network.save_pretrained(base)
    load_tokenizer(str(tiny_llama)).save_pretrained(base)
    keep_sums(folder, whole(base).network, text_of(base), "text")
    biases = []
    for _ in range(2):
        assemble = assembly(base, folder, 0)
        biases.append(packed(assemble(mixed(assemble.plan.keeping(KEPT))), name).bias)
        assert (folder / "columns").exists()  # which the second finds
    assert not torch.equal(biases[0], whole(base).network.get_submodule(name).bias)
    assert torch.equal(*biases)


def test_nf4_rows_start_where_the_bank_does(tiny_llama: Path, sums: Path) -> None:
    """Rows of blocks that cross them are not to be had and are quantized anew, to the nearest values."""
    assemble = assembly_by_text(tiny_llama, sums, BY_TEXT)
    plan = assemble.plan.keeping(KEPT).with_precision([dict.fromkeys(UNITS, NF4)] * 2, embedding=INT8, head=INT8)
    model = assemble(plan)
    name, stay = "model.layers.1.mlp.gate_proj", torch.arange(0, 48, 2)
    rows: Any = assemble.base.network.get_submodule(name).weight
    state = format_for(NF4).encode(rows.detach()[stay], NF4)
    assert all(torch.equal(tensor, packed(model, name).packed()[part]) for part, tensor in state.items())
    in_bank = assemble.bank.factors(name, NF4)
    assert in_bank is not None and torch.equal(model.initial_adapters[name][1], in_bank[1][stay])


def test_the_start_of_an_adapter_that_loses_columns_is_nearest_in_the_outputs(tiny_llama: Path, sums: Path) -> None:
    name, stay = "model.layers.0.mlp.down_proj", torch.tensor(KEPT[0][1])
    hessian = load_file(sums_path(sums, 0))["down/decide/gram"].double()[stay][:, stay]
    left = {}
    for adapters in ("weight", "calibrated"):
        assemble = assembly_by_text(tiny_llama, sums, replace(BY_TEXT, adapters=adapters), compensates=False)
        model = assemble(mixed(assemble.plan.keeping(KEPT)))
        weight: Any = assemble.base.network.get_submodule(name).weight
        a, b = model.initial_adapters[name]
        assert assemble.settings is not None
        held = dequantize(packed(model, name)) + assemble.settings.scale * b @ a
        lacking = (weight.detach()[:, stay] - held).double()
        left[adapters] = float(((lacking @ hessian) * lacking).sum()), float(lacking.square().sum())
    assert left["calibrated"][0] < left["weight"][0] and left["weight"][1] < left["calibrated"][1]


def test_the_dense_model_and_its_bank_stay_as_they_are(tiny_llama: Path, sums: Path) -> None:
    assemble = assembly(tiny_llama, sums, 1)
    before = {name: tensor.clone() for name, tensor in assemble.bank.tensors.items()}
    dense = {name: tensor.clone() for name, tensor in assemble.base.network.state_dict().items()}
    model = assemble(mixed(assemble.plan.keeping(KEPT)))
    model.attach(finetuner(tiny_llama).lora, seed=0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in assemble.bank.tensors.items())
    after = assemble.base.network.state_dict()
    assert dense.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in dense.items())


def test_a_part_that_stays_whole_is_the_banks(tiny_llama: Path, sums: Path) -> None:
    assemble = assembly(tiny_llama, sums, 1)
    model = assemble(mixed(assemble.plan.keeping(KEPT)))
    q = model.network.get_submodule("model.layers.1.self_attn.q_proj")
    bank = assemble.bank.linear("model.layers.1.self_attn.q_proj", NF4)
    assert all(torch.equal(tensor, bank.packed()[name]) for name, tensor in q.packed().items())


def test_sums_are_known_by_what_they_were_made_from(tiny_llama: Path, sums: Path, tmp_path: Path) -> None:
    assert has_sums(sums, range(2), "text") and not has_sums(sums, range(2), "another")
    assert not has_sums(sums, range(3), "text") and not has_sums(tmp_path, range(1), "text")
    sums_path(tmp_path, 0).write_bytes(sums_path(sums, 0).read_bytes()[:100])
    assert not has_sums(tmp_path, range(1), "text")
