from pathlib import Path

import pytest
from lightning.pytorch import Callback

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import (
    GridPolishing,
    LoRAGuidedPruning,
    MixedPrecisionQuantization,
    PlannedPruning,
    StructuredPruning,
)
from qpruner.errors import UserError
from qpruner.plan import UNITS, Architecture, CompressionPlan, Precision
from qpruner.records.folder import RunFolder
from qpruner.runs.phases import PhaseConfig, carrying_out, phases_of, renewed
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

QUANTIZING = PhaseConfig(max_steps=3, callbacks=[MixedPrecisionQuantization()])


class Shared(Callback):
    pass


def test_each_phase_has_its_folder_and_begins_with_what_the_last_left(tmp_path: Path) -> None:
    shared = Shared()
    first, second, third = phases_of(
        RunFolder(tmp_path), [StructuredPruning(0.1), shared], [PhaseConfig(max_epochs=2), QUANTIZING]
    )
    assert [phase.number for phase in (first, second, third)] == [1, 2, 3]
    assert [phase.folder for phase in (first, second, third)] == [
        RunFolder(tmp_path, 1), RunFolder(tmp_path, 2), RunFolder(tmp_path)
    ]  # fmt: skip
    assert [phase.continues_from for phase in (first, second, third)] == [None, first.folder.model, second.folder.model]
    assert [phase.length for phase in (first, second, third)] == [
        {}, {"max_epochs": 2, "max_steps": -1}, {"max_epochs": None, "max_steps": 3}
    ]  # fmt: skip
    # What does not compress acts in all phases; what it has seen in one is nothing to the next.
    assert first.callbacks[1] is shared
    assert [type(callback) for callback in third.callbacks] == [Shared, MixedPrecisionQuantization]
    assert third.callbacks[0] is not shared and second.callbacks[0] is not third.callbacks[0]
    assert third.compressing == QUANTIZING.callbacks


def test_a_base_that_is_pruned_in_training_is_kept_beside_the_result(tmp_path: Path) -> None:
    first, last = phases_of(RunFolder(tmp_path), [LoRAGuidedPruning(0.1)], [QUANTIZING])
    assert (first.compresses_in_training, first.kept_in) == (True, tmp_path / "phases/1/base")
    assert (last.compresses_in_training, last.kept_in) == (False, tmp_path / "model")


def test_any_phase_may_polish_what_is_quantized(tmp_path: Path) -> None:
    polishing = PhaseConfig(1, callbacks=[MixedPrecisionQuantization(2), GridPolishing()])
    first, second, last = phases_of(
        RunFolder(tmp_path), [StructuredPruning(0.1)], [polishing, PhaseConfig(1, callbacks=[GridPolishing()])]
    )
    assert [phase.compresses_in_training for phase in (first, second, last)] == [False, True, True]
    assert last.kept_in == tmp_path / "base" and last.continues_from == second.folder.model


def test_a_plan_that_is_carried_out_is_polished_all_the_same() -> None:
    plan = CompressionPlan.dense(Architecture("llama", 32, 8, 2, (2,), (48,)), None)
    plan = plan.with_precision([dict.fromkeys(UNITS, Precision("affine", 2, 32))])
    given = [StructuredPruning(0.1), MixedPrecisionQuantization(8), GridPolishing(), Shared()]
    kinds = [PlannedPruning, MixedPrecisionQuantization, GridPolishing, Shared]
    assert [type(callback) for callback in carrying_out(given, plan)] == kinds


def test_later_modules_differ_in_their_optimizer_alone(tmp_path: Path) -> None:
    described = LoRAFinetuner(lora=LoRAConfig(r=3), optimizer=OptimizerConfig(lr=0.1), seed=4)
    slower = PhaseConfig(max_steps=1, optimizer=OptimizerConfig(lr=0.01))
    first, second, third = phases_of(RunFolder(tmp_path), [StructuredPruning(0.1)], [slower, PhaseConfig(max_steps=1)])
    assert first.module(described) is described and described.continues_from is None
    later = [phase.module(described) for phase in (second, third)]
    assert [module.optimizer_config.lr for module in later] == [0.01, 0.1]
    assert [(module.lora.r, module.seed) for module in later] == [(3, 4), (3, 4)]
    assert [module.continues_from for module in later] == [first.folder.model, second.folder.model]
    assert renewed(described).hparams == described.hparams


def test_what_only_training_needed_goes_with_the_end_of_a_phase(tmp_path: Path) -> None:
    first, last = phases_of(RunFolder(tmp_path), [LoRAGuidedPruning(0.1)], [QUANTIZING])
    for phase in (first, last):
        phase.folder.checkpoints.mkdir(parents=True)
        phase.folder.checkpoint.touch()
        phase.folder.base.mkdir()
    first.end()
    assert first.folder.finished_phases == 1
    assert not first.folder.checkpoint.exists() and not first.folder.base.exists()
    last.end()
    assert last.folder.finished_phases == 1 and last.folder.checkpoint.exists()


@pytest.mark.parametrize(
    ("first", "later", "said"),
    [
        ([MixedPrecisionQuantization(), StructuredPruning(0.1)], [], "Reorder or drop"),
        ([StructuredPruning(0.1)], [PhaseConfig(1, callbacks=[StructuredPruning(0.1)])], "Phase 2 has Struct"),
        ([StructuredPruning(0.1)], [PhaseConfig(1, callbacks=[LoRAGuidedPruning(0.1)])], "Phase 2 has LoRAG"),
        ([Shared()], [QUANTIZING], "its first compresses nothing"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be_had(tmp_path: Path, first: list[Callback], later: list[PhaseConfig], said: str) -> None:
    with pytest.raises(UserError, match=said):
        phases_of(RunFolder(tmp_path), first, later)


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "would have no end"), ({"max_epochs": 0}, "would have no end"), ({"max_steps": -2}, "neither is below -1")],
)
def test_a_phase_has_an_end(options: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PhaseConfig(**options)
