"""When the checkpoint of a run is written, and that it is whole at any moment."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.fits import finetuner, fit, trainer

from qpruner.callbacks import RunCheckpoint
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimizer steps after which checkpoints are written."""
    steps: list[int] = []
    save = Trainer.save_checkpoint

    def counted(self: Trainer, *args: Any, **options: Any) -> None:
        steps.append(self.global_step)
        save(self, *args, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", counted)
    return steps


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5, 5]), (9, [5])])
def test_it_is_written_every_few_steps_and_at_the_end(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, saved: list[int], every: int, expected: list[int]
) -> None:
    checkpoint = RunCheckpoint(tmp_path / "deep" / "last.ckpt", every_n_steps=every)
    fit(finetuner(tiny_llama), stories, checkpoint, steps=5)
    assert saved == expected
    assert torch.load(checkpoint.path, weights_only=True)["global_step"] == 5
    assert [*checkpoint.path.parent.iterdir()] == [checkpoint.path]


def test_micro_batches_of_one_step_write_it_once(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, saved: list[int]
) -> None:
    running = trainer(RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2), steps=3)
    running.accumulate_grad_batches = 2
    running.fit(finetuner(tiny_llama), datamodule=stories)
    assert saved == [2, 3]


def test_writing_that_is_cut_off_leaves_the_one_before(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Trainer.save_checkpoint

    def half(self: Trainer, path: Path, **options: Any) -> None:
        if self.global_step < 4:
            return save(self, path, **options)
        path.write_bytes(b"PK half a checkpoint")
        raise InterruptedError

    monkeypatch.setattr(Trainer, "save_checkpoint", half)
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    with pytest.raises(InterruptedError):
        fit(finetuner(tiny_llama), stories, checkpoint, steps=5)
    assert torch.load(checkpoint.path, weights_only=True)["global_step"] == 2
    monkeypatch.undo()
    running = trainer(checkpoint, steps=5)
    running.fit(finetuner(tiny_llama), datamodule=stories, ckpt_path=checkpoint.path, weights_only=True)
    assert torch.load(checkpoint.path, weights_only=True)["global_step"] == 5
    assert [*tmp_path.iterdir()] == [checkpoint.path]  # the half one is gone, too


def test_fewer_steps_than_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every 0 steps; it must be at least 1"):
        RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=0)


@pytest.mark.parametrize(
    ("options", "at", "validated"),
    [
        ({"max_steps": 4, "val_check_interval": 2}, 2, [2, 4]),
        ({"max_steps": 4, "val_check_interval": 2}, 4, [2, 4]),
        ({"max_epochs": 2, "val_check_interval": 1.0}, 5, [5, 10]),
        ({"max_epochs": 2, "val_check_interval": 1.0}, 10, [5, 10]),
    ],
    ids=["steps", "last step", "epoch", "last epoch"],
)
def test_a_fit_that_is_killed_in_a_validation_validates_again(
    options: dict[str, Any], at: int, validated: list[int], tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    """What was logged of it is nowhere, and a fit that goes on from the step before it does not validate."""
    path = tmp_path / "last.ckpt"
    seen: list[int] = []
    killed = True

    class Watching(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if killed and trainer.global_step == at:
                raise InterruptedError
            if not trainer.sanity_checking:
                seen.append(trainer.global_step)

    def fitting(ckpt_path: Path | None) -> None:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [Watching(), RunCheckpoint(path, every_n_steps=1)]
        Trainer(
            accelerator="cpu",
            limit_val_batches=1,
            use_distributed_sampler=False,
            callbacks=callbacks,
            **quiet,
            **options,
        ).fit(finetuner(tiny_llama), datamodule=stories, ckpt_path=ckpt_path, weights_only=True)

    with pytest.raises(InterruptedError):
        fitting(None)
    assert torch.load(path, weights_only=True)["global_step"] == at - 1
    killed = False
    fitting(path)
    assert [*dict.fromkeys(seen)] == validated  # on each of several loaders
    assert torch.load(path, weights_only=True)["global_step"] == validated[-1]


def test_a_fit_that_is_validated_after_each_step_has_checkpoints_too(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, saved: list[int]
) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    validates = {"limit_val_batches": 1, "val_check_interval": 1, "max_steps": 5}
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    running = Trainer(accelerator="cpu", use_distributed_sampler=False, callbacks=[checkpoint], **quiet, **validates)
    running.fit(finetuner(tiny_llama), datamodule=stories)
    assert saved == [3, 5, 5]
