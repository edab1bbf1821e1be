"""A budget in a fit: refused before any work, within it after, found once, and what is left in the folder."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.fits import PRUNING, AtStart, adapters, finetuner, fit, logits

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import Allocation, DecidingConfig
from qpruner.allocation.items import items_of
from qpruner.allocation.mutual_information import MutualInformationConfig
from qpruner.allocation.rises import measured_rises
from qpruner.allocation.sensitivities import Sensitivities
from qpruner.anatomy import architecture_of
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.callbacks import MixedPrecisionQuantization, PlannedPruning, StructuredPruning
from qpruner.callbacks.compression import Compression, Rehearsal
from qpruner.compressed import CompressedModel
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.folder_manifest import read_manifest
from qpruner.memory import tensor_bytes
from qpruner.model_folder import build_skeleton, load_compressed, read_base_config
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.pruning.selection import SelectionConfig
from qpruner.quantization.bank import fill
from qpruner.quantization.calibrated_bank import BankText
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.formats import dequantize
from qpruner.quantization.rounding import RoundingConfig
from qpruner.records.folder import RunFolder
from qpruner.training.module import LoRAFinetuner

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
TEXT = CalibrationConfig(num_sequences=6, length=12, batch_size=4)
SIX_BITS = Budget(average_bits=7.2)
METHODS = pytest.mark.parametrize("method", ["mutual_information", "sensitivity", "marginal"])
MEASURES = ("measured_rises", "marginal_rises", "first_order_rises", "layer_information")


def allocating(
    method: Any = "sensitivity", budget: Budget = SIX_BITS, folder: Path | None = None, **options: Any
) -> MixedPrecisionQuantization:
    """Units of their own, eight or four bits."""
    loftq_iterations = options.pop("loftq_iterations", 1)
    config = DecidingConfig(**{"granularity": "unit", "calibration": TEXT} | options)
    callback = MixedPrecisionQuantization(
        allocation=method, budget=budget, deciding=config, loftq_iterations=loftq_iterations
    )
    callback.folder = None if folder is None else RunFolder(folder)
    return callback


def in_folder(base: Path, folder: Path) -> LoRAFinetuner:
    folder.mkdir(exist_ok=True)
    module = finetuner(base)
    module.kept_in = folder / "model"
    return module


def rehearsed(base: Path, *callbacks: Compression) -> Rehearsal:
    rehearsal = Rehearsal(build_skeleton(read_base_config(str(base))), LoRAConfig(r=2))
    for callback in callbacks:
        callback.check(rehearsal)
    return rehearsal


def without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MEASURES:
        monkeypatch.setattr(f"qpruner.callbacks.bits_under_budget.{name}", None)


# Before any work.


def test_bits_beside_a_budget_and_an_allocation_without_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"bits is 4 and budget is 6 bits per weight; the budget decides on the bits"):
        MixedPrecisionQuantization(bits=4, budget=Budget(average_bits=6))
    for method in ("mutual_information", "sensitivity", "marginal"):
        with pytest.raises(UserError, match=f"allocation is '{method}' and there is no budget"):
            MixedPrecisionQuantization(allocation=method)
        with pytest.raises(UserError, match="there is no budget"):
            MixedPrecisionQuantization(bits=8, allocation=method)
    with pytest.raises(UserError, match="widths asks for 7; choose from 1, 2, 3, 4, 5, 6, 8, 16"):
        allocating(widths=(4, 7))
    assert MixedPrecisionQuantization().allocator is None and MixedPrecisionQuantization().bits == 4


def test_marginal_costs_are_measured_in_pairs_of_contexts() -> None:
    with pytest.raises(UserError, match="allocation is 'marginal' and deciding.measure is 'first_order'"):
        allocating("marginal", measure="first_order")
    for contexts in (0, 3, 2.0):
        with pytest.raises(UserError, match=rf"deciding.contexts is {contexts}; .* even number of at least 2"):
            allocating("marginal", contexts=contexts)


def test_widths_are_in_the_format_asked_for() -> None:
    callback = MixedPrecisionQuantization(
        budget=SIX_BITS, formats={4: "fp4"}, group=32, deciding=DecidingConfig(widths=(16, 4))
    )
    assert callback.allocator is not None and callback.allocator.precisions == [DENSE, Precision("fp4", 4, 32)]
    assert "budget='7.2 bits per weight'" in str(callback) and "bits=4" not in str(callback)


@pytest.mark.parametrize("method", ["uniform", "mutual_information", "sensitivity", "marginal"])
@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(bytes=1000), "budget is 1,000 bytes in all, and the cheapest plan has"),
        (Budget(average_bits=4.4), r"4\.50 bits each, scales included"),
        (Budget(share=0.2), "20.0 % of the 16-bit bytes"),
    ],
    ids=str,
)
def test_a_budget_below_the_cheapest_plan_is_told_without_weights(
    tiny_llama: Path, method: Any, budget: Budget, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        rehearsed(tiny_llama, allocating(method, budget))
    rehearsed(tiny_llama, allocating(method, Budget(average_bits=4.5)))


@pytest.mark.parametrize("alone", [[0, 1], [0, -1], [2]])
def test_layers_that_cannot_be_left_alone_are_told_without_weights(tiny_llama: Path, alone: list[int]) -> None:
    for before in ([], [StructuredPruning(0.05, selection=SelectionConfig(scope="global"), compensation="none")]):
        with pytest.raises(UserError, match="deciding.leave_alone names"):
            rehearsed(tiny_llama, *before, allocating(leave_alone=alone))


@pytest.mark.parametrize("rounds", [1, 3])
def test_behind_local_pruning_the_rehearsal_has_the_widths_of_the_fit(
    tiny_llama: Path, stories: StoriesDataModule, rounds: int
) -> None:
    pruning = StructuredPruning(**PRUNING | {"ratio": 0.08}, rounds=rounds)
    rehearsal = rehearsed(tiny_llama, pruning)
    plan = fit(finetuner(tiny_llama), stories, pruning).plan
    assert plan is not None and plan.widths != plan.architecture
    assert architecture_of(rehearsal.model.config) == rehearsal.plan.widths == plan.widths and rehearsal.exact
    assert rehearsal.plan.architecture == plan.architecture
    assert all(parameter.is_meta for parameter in rehearsal.model.parameters())
    followed = rehearsed(tiny_llama, PlannedPruning(plan))
    assert architecture_of(followed.model.config) == plan.widths and followed.exact


@pytest.mark.parametrize("kind", ["bytes", "average_bits", "share"])
def test_behind_local_pruning_the_cheapest_plan_is_found_to_the_byte(
    tiny_llama: Path, stories: StoriesDataModule, kind: str
) -> None:
    """What the narrowed model can have is what the fit has: the smallest budget passes both, less passes neither."""
    pruning = StructuredPruning(**PRUNING | {"ratio": 0.08})
    module = fit(finetuner(tiny_llama), stories, pruning, MixedPrecisionQuantization(4))
    held = [one for name, one in module.model.named_modules() if getattr(one, "precision", None) == NF4]
    weights = sum(tensor.nbytes for linear in held for tensor in linear.packed().values())
    number = sum(linear.in_features * linear.out_features for linear in held)
    dense = 2 * 2 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)  # bytes of two layers in 16 bits

    def budget(less: int) -> Budget:
        return {
            "bytes": lambda: Budget(bytes=tensor_bytes(module.model) - less),
            "average_bits": lambda: Budget(average_bits=8 * (weights - less) / number),
            "share": lambda: Budget(share=(weights - less) / dense),
        }[kind]()

    rehearsed(tiny_llama, pruning, allocating("uniform", budget(0)))
    found = fit(finetuner(tiny_llama), stories, pruning, allocating("uniform", budget(0)))
    assert found.plan == module.plan
    with pytest.raises(UserError, match="the cheapest plan has"):
        rehearsed(tiny_llama, pruning, allocating("uniform", budget(1)))
    with pytest.raises(UserError, match="the cheapest plan has"):
        fit(finetuner(tiny_llama), stories, pruning, allocating("uniform", budget(1)))


def test_behind_global_pruning_nothing_is_claimed_before_the_fit(tiny_llama: Path, stories: StoriesDataModule) -> None:
    pruning = StructuredPruning(**PRUNING | {"selection": SelectionConfig(scope="global")})
    impossible = allocating("mutual_information", Budget(bytes=1000))
    rehearsal = rehearsed(tiny_llama, pruning, impossible)
    assert not rehearsal.exact and rehearsal.plan.widths == rehearsal.plan.architecture
    with pytest.raises(UserError, match="the cheapest plan has"):
        fit(finetuner(tiny_llama), stories, pruning, impossible)


@METHODS
def test_too_little_text_is_told_before_the_model_is_needed(
    tiny_llama: Path, stories: StoriesDataModule, method: Any
) -> None:
    stories.prepare_data()
    with pytest.raises(UserError, match="asks for 45 sequences of 12 tokens.* enough for 44"):
        allocating(method, calibration=CalibrationConfig(num_sequences=45, length=12)).check_text(stories)
    allocating("uniform", calibration=CalibrationConfig(num_sequences=45, length=12)).check_text(stories)
    MixedPrecisionQuantization(4).check_text(stories)
    allocating(method).check_text(stories)


# In a fit.


@METHODS
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_a_fit_holds_the_plan_that_its_budget_buys(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, method: Any, pruned: bool
) -> None:
    folder = RunFolder(tmp_path / "run")
    before = [StructuredPruning(**PRUNING)] if pruned else []
    seen = AtStart(lambda module: (folder.bank.exists(), logits(module.model), module.model.train())[:2])
    module = fit(in_folder(tiny_llama, folder.path), stories, *before, allocating(method, folder=folder.path), seen)
    allocation = Allocation.read(folder.allocation)
    assert (
        module.plan is not None and module.compressed.average_bits is not None and module.compressed.average_bits <= 7.2
    )
    assert module.compressed.average_bits == allocation.average_bits
    assert tensor_bytes(module.model) == allocation.total_bytes
    assert (allocation.method, allocation.above_dearest) == (method, False)
    for one in allocation.decisions:
        assert {module.plan.layers[one.item.layer].precision[unit] for unit in one.item.units} == {one.precision}
    assert {one.precision for one in allocation.decisions} == {NF4, INT8} and len(allocation.decisions) == 8
    # As if the bits had been given.
    bits = [{unit: one.bits for unit, one in layer.precision.items()} for layer in module.plan.layers]
    given = AtStart(lambda module: logits(module.model))
    fixed = fit(finetuner(tiny_llama), stories, *before, MixedPrecisionQuantization(bits), given)
    assert fixed.plan == module.plan
    bank_there, at_start = seen.seen  # type: ignore[misc]
    assert torch.equal(at_start, given.seen) and not bank_there and not folder.bank.exists()  # type: ignore[arg-type]
    assert CompressionPlan.read(folder.model / "plan.json") == module.plan
    assert torch.equal(logits(load_compressed(folder.model)), logits(module.model))


@METHODS
@pytest.mark.parametrize("loftq_iterations", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_with_a_folder_and_without_the_fit_is_the_same(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, method: Any, loftq_iterations: int
) -> None:
    options: Any = {"loftq_iterations": loftq_iterations}
    kept = fit(in_folder(tiny_llama, tmp_path), stories, allocating(method, folder=tmp_path, **options))
    free = fit(finetuner(tiny_llama), stories, allocating(method, **options))
    assert kept.plan == free.plan and bool(free.compressed.initial_adapters) == (loftq_iterations > 0)
    assert all(torch.equal(adapters(kept)[name], tensor) for name, tensor in adapters(free).items())


def test_tables_are_held_as_asked_beside_a_budget(tiny_llama: Path, stories: StoriesDataModule) -> None:
    callback = MixedPrecisionQuantization(budget=Budget(average_bits=5), embedding=8, head=8)
    rehearsed(tiny_llama, callback)
    module = fit(finetuner(tiny_llama), stories, callback)
    assert module.plan is not None and (module.plan.embedding, module.plan.head) == (
        INT8,
        INT8,
    )
    assert {one for layer in module.plan.layers for one in layer.precision.values()} == {NF4}
    table = module.model.get_base_model().lm_head
    assert table.precision == INT8 and dequantize(table).shape == (2048, 32)


class PowerCut(Callback):
    """Ends the fit when the base is about to be kept."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        raise InterruptedError


@METHODS
def test_what_was_found_is_not_found_again(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    whole = fit(finetuner(tiny_llama), stories, allocating(method))
    with pytest.raises(InterruptedError):
        fit(in_folder(tiny_llama, tmp_path), stories, allocating(method, folder=tmp_path), PowerCut())
    assert folder.sensitivities.exists()
    # What was measured names the pruned base, which is kept until the quantized one is.
    assert not folder.model.exists() or read_manifest(folder.model)["state"] == "pruned"
    assert folder.bank.exists() == (method != "mutual_information")
    written = folder.sensitivities.read_bytes()
    without_measuring(monkeypatch)
    again = fit(in_folder(tiny_llama, tmp_path), stories, allocating(method, folder=tmp_path))
    assert again.plan == whole.plan and not folder.bank.exists()
    assert folder.sensitivities.read_bytes() == written
    assert all(torch.equal(adapters(again)[name], tensor) for name, tensor in adapters(whole).items())


OTHERS: dict[str, Callable[[], MixedPrecisionQuantization]] = {
    "text": lambda: allocating(calibration=CalibrationConfig(num_sequences=5, length=12, batch_size=4)),
    "batches": lambda: allocating(calibration=CalibrationConfig(num_sequences=6, length=12)),
    "method": lambda: allocating("mutual_information"),
    "widths": lambda: allocating(widths=(4, 16)),
    "granularity": lambda: allocating(granularity="block"),
    "layers": lambda: allocating(leave_alone=[0], budget=Budget(share=5.0)),
    "LoftQ": lambda: allocating(loftq_iterations=2),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_was_found_otherwise_is_found_again(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(InterruptedError):
        fit(finetuner(tiny_llama), stories, allocating(folder=tmp_path), PowerCut())
    before = Sensitivities.read(folder.sensitivities)
    # Another budget, solver or measure needs nothing new.
    same = allocating(folder=tmp_path, budget=Budget(share=0.4), solver="greedy", measure="loss")
    with monkeypatch.context() as patch:
        without_measuring(patch)
        with pytest.raises(InterruptedError):
            fit(finetuner(tiny_llama), stories, same, PowerCut())
    changed = OTHERS[other]()
    changed.folder = RunFolder(tmp_path / other)
    changed.folder.path.mkdir()
    before.write(changed.folder.sensitivities)
    with pytest.raises(InterruptedError):
        fit(finetuner(tiny_llama), stories, changed, PowerCut())
    after = Sensitivities.read(changed.folder.sensitivities)
    assert after.made_from != before.made_from and after != before


def test_more_contexts_are_other_costs(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    found = []
    for contexts in (2, 4):
        with pytest.raises(InterruptedError):
            fit(finetuner(tiny_llama), stories, allocating("marginal", folder=tmp_path, contexts=contexts), PowerCut())
        found.append(Sensitivities.read(RunFolder(tmp_path).sensitivities))
    first, second = (sensitivities.marginals or () for sensitivities in found)
    assert found[0].precisions == found[1].precisions == (NF4, INT8) and len(first) == len(second) == 8
    assert first != second and all(one.loss[1] == one.kl[1] == one.kl_error[1] == 0 for one in (*first, *second))
    assert all(one.kl[0] > 0 and one.kl_error[0] > 0 for one in second)


@pytest.mark.parametrize("other", ["rank", "order of the text"])
def test_adapters_and_text_are_part_of_what_was_found(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, other: str
) -> None:
    """In several iterations of LoftQ the adapters have a say in what is rounded."""
    found = []
    for session in (0, 1):
        module = finetuner(tiny_llama, lora=LoRAConfig(r=2 + 2 * session * (other == "rank")))
        stories.seed = session * (other != "rank")
        with pytest.raises(InterruptedError):
            fit(module, stories, allocating(folder=tmp_path, loftq_iterations=2), PowerCut())
        found.append(Sensitivities.read(RunFolder(tmp_path).sensitivities))
        shutil.rmtree(RunFolder(tmp_path).bank)
    assert found[0].rises != found[1].rises


def test_another_estimate_of_mutual_information_is_made_anew(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    found = []
    for bins in (16, 4):
        config = MutualInformationConfig(bins=bins)
        with pytest.raises(InterruptedError):
            fit(
                finetuner(tiny_llama),
                stories,
                allocating("mutual_information", folder=tmp_path, mutual_information=config),
                PowerCut(),
            )
        found.append(Sensitivities.read(RunFolder(tmp_path).sensitivities).mutual_information)
    assert found[0] != found[1] and len(found[0] or ()) == 2


def test_a_budget_above_the_dearest_is_told(tiny_llama: Path, stories: StoriesDataModule) -> None:
    with pytest.warns(UserWarning, match="400.0 % of the 16-bit bytes of the dense decoder linears is above"):
        module = fit(finetuner(tiny_llama), stories, allocating("uniform", Budget(share=4.0)))
    assert module.plan is not None
    assert {one for layer in module.plan.layers for one in layer.precision.values()} == {INT8}


# Rounded by text.

BY_TEXT = CalibratedConfig(
    rounding=RoundingConfig(grid="minmax", refinements=0), text=CalibrationConfig(num_sequences=8, length=12)
)


def calibrated(
    folder: Path, method: Any = "sensitivity", config: CalibratedConfig | None = BY_TEXT
) -> MixedPrecisionQuantization:
    """Units of their own, two or four bits on a grid."""
    callback = MixedPrecisionQuantization(
        formats={2: "affine", 4: "affine"},
        group=32,
        allocation=method,
        budget=Budget(average_bits=4),
        deciding=DecidingConfig(widths=(2, 4), granularity="unit", calibration=TEXT),
        calibrated=config,
    )
    callback.folder = RunFolder(folder)
    return callback


def test_costs_are_those_of_linears_that_text_has_rounded(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    callback = calibrated(tmp_path)
    module = fit(in_folder(tiny_llama, tmp_path), stories, callback)
    measured = Sensitivities.read(RunFolder(tmp_path).sensitivities)
    alone, network = Processes.alone(), CompressedModel.load(str(tiny_llama), dtype="auto").network
    text = BankText(BY_TEXT, {}, Calibration.share(stories.calibration(8, 12), alone, 4096))
    bank = fill(network, measured.precisions, None, device=alone.device, text=text)
    items = items_of(2, "unit", ())
    deciding = Calibration.share(stories.calibration(6, 12), alone, 4)
    kl, loss = measured_rises(network, bank, items, measured.precisions, deciding)
    assert [one.item for one in measured.rises or ()] == items
    torch.testing.assert_close(torch.tensor([one.kl for one in measured.rises or ()], dtype=torch.float64), kl)
    torch.testing.assert_close(torch.tensor([one.loss for one in measured.rises or ()], dtype=torch.float64), loss)
    plain = fill(network, measured.precisions, None, device=alone.device)
    at_nearest, _ = measured_rises(network, plain, items, measured.precisions, deciding)
    assert kl[:, 0].sum() < 0.8 * at_nearest[:, 0].sum()
    # The plan is carried out by text as ever, and what led to it is gone.
    assert not RunFolder(tmp_path).bank.exists() and not RunFolder(tmp_path).calibrated.exists()
    assert module.compressed.average_bits is not None and module.compressed.average_bits <= 4


def test_other_rounding_is_measured_anew_and_the_same_is_not(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = RunFolder(tmp_path), []
    for config in (BY_TEXT, replace(BY_TEXT, tokens="equal"), None):
        with pytest.raises(InterruptedError):
            fit(finetuner(tiny_llama), stories, calibrated(tmp_path, config=config), PowerCut())
        found.append(Sensitivities.read(folder.sensitivities))
        shutil.rmtree(folder.bank)
        with monkeypatch.context() as patch:
            without_measuring(patch)
            with pytest.raises(InterruptedError):
                fit(finetuner(tiny_llama), stories, calibrated(tmp_path, config=config), PowerCut())
        assert folder.bank.exists() == (config is None)  # what text rounds is rounded anew as the plan says
        shutil.rmtree(folder.bank, ignore_errors=True)
    assert len({str(one.rises) for one in found}) == 3


def test_information_does_not_depend_on_rounding(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedError):
        fit(finetuner(tiny_llama), stories, calibrated(tmp_path, "mutual_information"), PowerCut())
    without_measuring(monkeypatch)
    other = calibrated(tmp_path, "mutual_information", replace(BY_TEXT, tokens="equal"))
    with pytest.raises(InterruptedError):
        fit(finetuner(tiny_llama), stories, other, PowerCut())
    assert not RunFolder(tmp_path).bank.exists()
