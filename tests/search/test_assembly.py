"""Models that are put together without text, against the dense model that is pruned, compensated and quantized."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.searches import finetuner, stories_of
from torch import Tensor

from qpruner.calibration.text import Calibration
from qpruner.compressed import CompressedModel
from qpruner.memory import tensor_bytes
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.pruning.compensation import shared_copy
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import fill
from qpruner.quantization.formats import dequantize, precision_of
from qpruner.quantization.packed import PackedLinear
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
    return Assembly(model, mixed(model.known_plan()), bank, settings, sums)


def by_hand(base: Path, compensated: bool, iterations: int) -> CompressedModel:
    model = whole(base)
    before, dense = model.known_plan(), shared_copy(model.network)
    model.prune([(list(groups), list(channels)) for groups, channels in KEPT])
    if compensated:
        model.compensate(dense, before, text_of(base), "local")
    model.quantize(mixed(model.known_plan()), LoftQSettings.of(finetuner(base).lora, iterations, 3), device=CPU)
    return model


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
