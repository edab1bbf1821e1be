"""The fits of a run: which callbacks each has, where it begins, and what is left of one that ended badly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.fits import PRUNING, finetuner

from qpruner.callbacks import (
    KeepModel,
    LogInterval,
    LoRAGuidedPruning,
    MeasuredEnd,
    MeasuredStage,
    MixedPrecisionQuantization,
    RunCheckpoint,
    RunReport,
    StructuredPruning,
    Throughput,
)  # fmt: skip
from qpruner.callbacks.report import ResultNotFinite
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.records.folder import RunFolder
from qpruner.runs.checks import Preflight
from qpruner.runs.fitting import PhasedFit
from qpruner.runs.phases import PhaseConfig, phases_of
from qpruner.training.module import LoRAFinetuner

OPTIONS = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False,
           "enable_model_summary": False, "limit_val_batches": 0}  # fmt: skip


class Seen(Callback):
    """Notes with which checkpoint each fit begins, in which state it finds the model, and what it was trained to."""

    def __init__(self) -> None:
        self.fits: list[tuple[str | None, str, int]] = []

    def __deepcopy__(self, memo: Any) -> "Seen":
        return self  # one for all phases

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        path = trainer.ckpt_path
        self.fits.append((path and str(path), pl_module.compressed.base_state.value, trainer.global_step))


class PowerCut(Callback):
    """Comes after the second step, before its checkpoint is written."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise InterruptedError


class Useless(Callback):
    """Finds, when all was trained, that the result is of no use."""

    def on_train_end(self, *_: Any) -> None:
        raise ResultNotFinite("The result is nan", "nothing is kept", "Lower the rate", "fit again")


@pytest.fixture
def fits(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> Any:
    (tmp_path / "run").mkdir()  # as by who locks it

    def of(*callbacks: Callback, phases: list[PhaseConfig] | None = None, rehearses: bool = False) -> PhasedFit:
        return PhasedFit(
            phases_of(RunFolder(tmp_path / "run"), callbacks, phases or []),
            finetuner(tiny_llama),
            stories,
            OPTIONS,
            checkpoint_every_n_steps=1,
            rehearses=rehearses,
        )

    return of


def run(fits: PhasedFit, number: int = 1, *, continues: bool = False, ckpt_path: str | None = None) -> LoRAFinetuner:
    module, trainer = fits.prepare(number, {**OPTIONS, "use_distributed_sampler": False})
    fits.run(number, module, trainer, continues=continues, ckpt_path=ckpt_path)
    return module


QUANTIZING = PhaseConfig(max_steps=1, callbacks=[MixedPrecisionQuantization(8)])


def ours(trainer: Trainer) -> list[str]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [type(one).__name__ for one in callbacks if type(one).__module__.startswith("qpruner.")]


def test_callbacks_stand_in_the_order_of_what_they_do(fits: Any, tmp_path: Path) -> None:
    pruning, quantization = StructuredPruning(**PRUNING), MixedPrecisionQuantization(8)
    module, trainer = fits(pruning, quantization).prepare(1, {**OPTIONS})
    assert ours(trainer) == [
        one.__name__
        for one in (
            LogInterval, Preflight, RunReport, StructuredPruning, MeasuredStage, MixedPrecisionQuantization,
            MeasuredStage, MeasuredEnd, KeepModel, Throughput, RunCheckpoint,
        )
    ]  # fmt: skip
    stages = [one.name for one in trainer.callbacks if isinstance(one, MeasuredStage)]
    assert stages == ["pruned", "quantized"]
    assert module.kept_in == tmp_path / "run" / "model"
    assert pruning.folder == quantization.folder == RunFolder(tmp_path / "run")
    guided = fits(LoRAGuidedPruning(0.05)).prepare(1, {**OPTIONS})[1]
    assert "MeasuredStage" not in ours(guided)  # it has no result before the end


def test_an_interval_of_the_log_that_is_given_stays(fits: Any) -> None:
    _, trainer = fits().prepare(1, {**OPTIONS, "log_every_n_steps": 7})
    assert "LogInterval" not in ours(trainer) and trainer.log_every_n_steps == 7


def test_each_phase_has_its_length_its_folder_and_what_the_last_one_left(fits: Any, tmp_path: Path) -> None:
    phased = fits(StructuredPruning(**PRUNING), phases=[QUANTIZING])
    first, trainer = phased.prepare(1, {**OPTIONS})
    assert (trainer.max_steps, first.kept_in) == (2, tmp_path / "run/phases/1/model") and first is phased.model
    second, trainer = phased.prepare(2, {**OPTIONS})
    assert (trainer.max_steps, second.kept_in) == (1, tmp_path / "run/model") and second is not first
    assert second.continues_from == first.kept_in


def test_a_rehearsal_has_the_callbacks_that_were_given_and_keeps_nothing(fits: Any, tmp_path: Path) -> None:
    pruning, seen = StructuredPruning(**PRUNING), Seen()
    phased = fits(pruning, seen, phases=[QUANTIZING], rehearses=True)
    module, trainer = phased.prepare(1, {**OPTIONS, "fast_dev_run": True})
    assert ours(trainer) == ["LogInterval", "StructuredPruning"] and module.kept_in is None and pruning.folder is None
    phased.run(1, module, trainer, continues=False, ckpt_path=None)
    assert [state for _, state, _ in seen.fits] == ["pruned"]  # the first phase alone
    assert not any((tmp_path / "run").iterdir())


def test_callbacks_of_a_later_phase_are_looked_at_before_the_first(fits: Any) -> None:
    unfit = PhaseConfig(max_steps=1, callbacks=[EMAWeightAveraging()])
    with pytest.raises(UserError, match="EMAWeightAveraging"):
        fits(StructuredPruning(**PRUNING), phases=[unfit]).prepare(1, {**OPTIONS})


def test_phases_follow_each_other_and_leave_what_the_next_needs(fits: Any, tmp_path: Path) -> None:
    seen = Seen()
    run(fits(StructuredPruning(**PRUNING), seen, phases=[QUANTIZING]))
    assert seen.fits == [(None, "pruned", 0), (None, "quantized", 0)]
    first, last = RunFolder(tmp_path / "run", 1), RunFolder(tmp_path / "run")
    assert last.finished and last.finished_phases == 1
    assert not first.checkpoint.exists() and last.checkpoint.exists() and first.model.exists()


def test_a_fit_that_was_cut_off_goes_on_from_the_checkpoint_of_its_phase(fits: Any, tmp_path: Path) -> None:
    seen, first = Seen(), RunFolder(tmp_path / "run", 1)
    with pytest.raises(InterruptedError):
        run(fits(StructuredPruning(**PRUNING), seen, PowerCut(), phases=[QUANTIZING]))
    assert first.checkpoint.exists() and first.finished_phases == 0
    # Whatever else it was to begin with.
    again = fits(StructuredPruning(**PRUNING), seen, phases=[QUANTIZING])
    run(again, continues=True, ckpt_path=str(tmp_path / "nothing.ckpt"))
    checkpoint = str(first.checkpoint)
    assert seen.fits == [(None, "pruned", 0), (checkpoint, "pruned", 1), (None, "quantized", 0)]


def test_a_run_is_not_called_over_before_its_model_has_a_card(
    fits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    card = folder.model / "README.md"

    def cut_off(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("qpruner.records.model_card.write_text", cut_off)
        with pytest.raises(InterruptedError):
            run(fits(StructuredPruning(**PRUNING)))
    assert not folder.finished
    run(fits(StructuredPruning(**PRUNING)), continues=True)
    assert folder.finished and card.read_text().count("StructuredPruning") == 1


def test_what_only_a_phase_that_is_over_needed_goes_in_the_next_session(fits: Any, tmp_path: Path) -> None:
    """Cut off between the two, the first phase could not drop it itself."""
    seen, first = Seen(), RunFolder(tmp_path / "run", 1)
    with pytest.raises(InterruptedError):
        run(fits(StructuredPruning(**PRUNING), PowerCut(), phases=[QUANTIZING]))
    run(fits(StructuredPruning(**PRUNING), phases=[QUANTIZING]), continues=True)
    first.checkpoint.touch()
    RunFolder(tmp_path / "run").checkpoint.unlink()
    run(fits(StructuredPruning(**PRUNING), seen, phases=[QUANTIZING]), 2, continues=True)
    assert not first.checkpoint.exists() and seen.fits == [(None, "quantized", 0)]


def test_a_checkpoint_that_is_damaged_is_told(fits: Any, tmp_path: Path) -> None:
    seen = Seen()
    run(fits(seen))
    checkpoint = RunFolder(tmp_path / "run").checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(UserError, match=r"last.ckpt'.*Copy the file again, or begin the fit anew"):
        run(fits(seen), continues=True)
    assert len(seen.fits) == 1


def test_a_checkpoint_that_is_given_is_where_the_first_phase_begins(fits: Any, tmp_path: Path) -> None:
    run(fits())
    folder, given, seen = RunFolder(tmp_path / "run"), tmp_path / "given.ckpt", Seen()
    folder.checkpoint.rename(given)
    folder.clear()
    longer = fits(seen)
    longer.trainer = {**OPTIONS, "max_steps": 3}
    module, trainer = longer.prepare(1, longer.trainer)
    longer.run(1, module, trainer, continues=False, ckpt_path=str(given))
    assert seen.fits == [(str(given), "dense", 2)]
    with pytest.raises(UserError, match="there is no such file"):
        run(fits(), ckpt_path=str(tmp_path / "nothing.ckpt"))
    content = torch.load(given, weights_only=True)
    torch.save(content | {"base": content["base"] | {"dense_sha256": "beef"}}, given)
    with pytest.raises(UserError, match="trained on another base model"):
        run(fits(), ckpt_path=str(given))


def test_a_result_of_no_use_is_set_aside_so_that_no_session_goes_on_from_it(fits: Any, tmp_path: Path) -> None:
    with pytest.raises(ResultNotFinite, match=r"does not go on from its checkpoint, which is now '.*not_finite.ckpt'"):
        run(fits(Useless()))
    folder = RunFolder(tmp_path / "run")
    assert not folder.checkpoint.exists() and folder.checkpoint.with_name("not_finite.ckpt").exists()
    assert not folder.finished
