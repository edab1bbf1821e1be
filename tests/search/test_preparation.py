"""What a search starts from: made once, in the order that the dense model allows, and found again by its hash."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.compensated import COMPENSATION, compensated, differing, sliced
from support.fits import PRUNING
from support.searches import TEXT, finetuner, predictions, pruning, quantization, stories_of

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import Allocation, DecidingConfig
from qpruner.anatomy import decoder_layers
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.callbacks.compression import CompressionInSetup
from qpruner.compressed import CompressedModel, State
from qpruner.errors import UserError
from qpruner.model_folder import read_plan
from qpruner.plan import DENSE
from qpruner.pretrained import load_model
from qpruner.processes import Processes
from qpruner.quantization.bank import Bank
from qpruner.quantization.formats import dequantize, quantize
from qpruner.records.folder import RunFolder
from qpruner.search.preparation import Preparation, prepare
from qpruner.search.reference import Reference
from qpruner.search.structured import part_of

METHODS = ("uniform", "mutual_information", "sensitivity")


def prepare_in(
    folder: Path,
    base: Path,
    prunes: tuple[CompressionInSetup, ...] = (),
    quantizes: MixedPrecisionQuantization | None = None,
) -> Preparation:
    data = stories_of(base)
    return prepare(finetuner(base), data, prunes, quantizes or quantization(), Processes.alone(), RunFolder(folder))


def files_of(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Preparation]:
    folder = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return folder, prepare_in(folder, tiny_llama, (pruning(),))


def test_the_base_is_pruned_and_what_is_told_of_it_names_its_folder(
    pruned: tuple[Path, Preparation], tiny_llama: Path
) -> None:
    path, prepared = pruned
    folder = RunFolder(path)
    base = CompressedModel.open(folder.base)
    dense = CompressedModel.load(str(tiny_llama), dtype="float32")
    assert base.state is State.PRUNED and [step["name"] for step in base.recipe] == ["StructuredPruning"]
    assert base.base_sha256 == dense.base_sha256 == prepared.base_sha256
    assert base.identity not in (None, dense.identity)
    assert base.identity == prepared.kept_sha256
    assert prepared.base.widths == read_plan(folder.base).widths != dense.known_plan().widths
    assert {precision for layer in prepared.base.layers for precision in layer.precision.values()} == {DENSE}
    for method in METHODS:
        part = part_of(folder, method)
        assert Allocation.read(part.allocation).method == method
        if method != "uniform":
            assert json.loads(part.sensitivities.read_text())["made_from"]["base"] == base.identity
    assert prepared.prior == Allocation.read(part_of(folder, "sensitivity").allocation)
    assert [precision.bits for precision in prepared.precisions] == [4, 8]
    assert len(list(part_of(folder, "sensitivity").bank.iterdir())) == len(prepared.base.layers)


def test_a_base_that_makes_up_for_what_went_is_the_one_that_is_kept_and_banked(
    tiny_llama: Path, tmp_path: Path
) -> None:
    quantizes = MixedPrecisionQuantization(
        budget=Budget(average_bits=6.2), deciding=DecidingConfig(calibration=TEXT), loftq_iterations=0
    )
    prepared = prepare_in(tmp_path, tiny_llama, (StructuredPruning(**PRUNING | COMPENSATION),), quantizes)
    base = CompressedModel.open(RunFolder(tmp_path).base)
    expected = compensated(tiny_llama, [prepared.base], stories_of(tiny_llama))
    assert base.identity == prepared.kept_sha256
    assert differing(base.network, sliced(tiny_llama, prepared.base)) and not differing(base.network, expected)
    files = sorted(part_of(RunFolder(tmp_path), "uniform").bank.iterdir())
    bank = Bank(base.network, {name: tensor for file in files for name, tensor in load_file(file).items()})
    for number, layer in enumerate(decoder_layers(expected)):
        for linear, name in ((layer.o, "self_attn.o_proj"), (layer.down, "mlp.down_proj")):
            for precision in prepared.precisions:
                weight = bank.weight(f"model.layers.{number}.{name}", precision, torch.device("cpu"))
                assert torch.equal(weight, dequantize(quantize(linear, precision)))


@torch.no_grad()
def test_the_reference_is_of_the_dense_model_not_of_the_pruned(
    pruned: tuple[Path, Preparation], tiny_llama: Path
) -> None:
    reference = Reference.read(RunFolder(pruned[0]).reference)
    dense = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    assert torch.equal(reference.log_probabilities, predictions(dense, stories_of(tiny_llama)).half())


def test_what_is_there_is_not_made_again(
    pruned: tuple[Path, Preparation], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model is not loaded, and nothing is scored; allocations are decided again from what is kept."""
    path, prepared = pruned
    before = files_of(path)
    monkeypatch.setattr(CompressedModel, "load", None)
    monkeypatch.setattr(StructuredPruning, "compress", None)
    monkeypatch.setattr("qpruner.callbacks.bits_under_budget.measured_rises", None)
    monkeypatch.setattr("qpruner.callbacks.bits_under_budget.layer_information", None)
    assert prepare_in(path, tiny_llama, (pruning(),)) == prepared
    changed = {name for name, written in files_of(path).items() if before.get(name) != written}
    assert changed <= {f"prior/{method}/allocation.json" for method in METHODS}


def test_a_reference_of_another_model_is_made_again_and_the_base_stays(
    pruned: tuple[Path, Preparation], tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(pruned[0], tmp_path, dirs_exist_ok=True)
    folder = RunFolder(tmp_path)
    before = files_of(folder.base)
    right = Reference.read(folder.reference)
    Reference("another", right.batches, right.log_probabilities + 1).write(folder.reference)
    assert prepare_in(tmp_path, tiny_llama, (pruning(),)) == pruned[1]
    again = Reference.read(folder.reference)
    assert again.base == right.base and torch.equal(again.log_probabilities, right.log_probabilities)
    assert files_of(folder.base) == before


def test_a_reference_that_was_written_before_the_search_was_cut_off_stays(
    pruned: tuple[Path, Preparation], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(RunFolder(pruned[0]).reference, tmp_path)
    monkeypatch.setattr(Reference, "of", None)
    assert prepare_in(tmp_path, tiny_llama, (pruning(),)).base == pruned[1].base


def test_a_base_that_was_pruned_otherwise_or_is_of_another_model_is_refused(
    pruned: tuple[Path, Preparation], tiny_llama: Path, tmp_path: Path
) -> None:
    more = StructuredPruning(**PRUNING | {"ratio": 0.1})
    with pytest.raises(UserError, match=r"was made by .*\(ratio=0\.05, .*, and the search has .*\(ratio=0\.1, "):
        prepare_in(pruned[0], tiny_llama, (more,))
    with pytest.raises(UserError, match=r"was made by StructuredPruning\(.* and the search has nothing"):
        prepare_in(pruned[0], tiny_llama)
    shutil.copytree(tiny_llama, other := tmp_path / "other")
    model = load_model(str(other), dtype="float32", trust_remote_code=False)
    next(model.parameters()).data[0] += 1
    model.save_pretrained(other)
    before = files_of(pruned[0])
    with pytest.raises(UserError, match=r"was made of another model \(\w+\) than '.*other'"):
        prepare_in(pruned[0], other, (pruning(),))
    assert files_of(pruned[0]) == before  # the reference, too


def test_a_base_that_is_not_pruned_is_kept_for_the_trials_too(tiny_llama: Path, tmp_path: Path) -> None:
    budget = MixedPrecisionQuantization(budget=Budget(average_bits=6.2), deciding=DecidingConfig(calibration=TEXT))
    prepared = prepare_in(tmp_path, tiny_llama, (), budget)
    base = CompressedModel.open(RunFolder(tmp_path).base)
    assert base.state is State.DENSE and base.identity == prepared.base_sha256
    assert prepared.prior.method == "uniform"
    assert part_of(RunFolder(tmp_path), "uniform").bank.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 4}, "A search spends a budget, and MixedPrecisionQuantization has none"),
        (
            {
                "budget": Budget(average_bits=6),
                "deciding": DecidingConfig(calibration=replace(TEXT, num_sequences=73)),
            },
            "asks for 73 sequences",
        ),
    ],
)
def test_what_is_missing_is_told_before_any_work_with_the_model(
    options: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressedModel, "load", None)
    with pytest.raises(UserError, match=said):
        prepare_in(tmp_path, tiny_llama, (), MixedPrecisionQuantization(**options))
    assert not list(tmp_path.iterdir())
