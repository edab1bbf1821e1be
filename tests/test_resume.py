"""A fit that is cut off anywhere and started again ends with the numbers of one that was not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import RunCheckpoint
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

EPOCHS, BATCHES = 3, 5


class PowerCut(Exception):
    pass


class Recorder(Callback):
    """Keeps the loss of every batch, under its number in the whole fit, and cuts the power at a given moment."""

    def __init__(self, cut: tuple[str, int] | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.validated = 0
        self.cut = cut

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        trainer.estimated_stepping_batches  # noqa: B018  # makes the loader before a checkpoint is restored

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        self.losses[number] = float(outputs["loss"])
        if self.cut == ("batch", number):
            raise PowerCut

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            if self.cut == ("validation", self.validated):
                raise PowerCut
            self.validated += 1


def fit(
    base: Path, folder: Path, recorder: Recorder, *, accumulate: int, optimizer: str, workers: int = 0
) -> LoRAFinetuner:
    checkpoint = RunCheckpoint(folder / "last.ckpt", every_n_steps=2)
    module = LoRAFinetuner(
        base=str(base),
        lora=LoRAConfig(r=2, dropout=0.3),
        optimizer=OptimizerConfig(name=optimizer, lr=1e-2, warmup_steps=2),  # type: ignore[arg-type]
        seed=3,
    )
    data = StoriesDataModule(
        tokenizer=str(base),
        max_length=24,
        num_train=22,
        num_validation=6,
        num_test=6,
        num_choices=0,
        loader=LoaderConfig(batch_size=4, num_workers=workers),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        val_check_interval=2,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[recorder, checkpoint],
    )
    path = checkpoint.path if checkpoint.path.exists() else None
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return module


def adapters(module: LoRAFinetuner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


CUTS = [("batch", number) for number in range(EPOCHS * BATCHES)] + [("validation", number) for number in range(6)]


@pytest.mark.parametrize(
    ("accumulate", "optimizer", "cuts"),
    [
        (1, "adamw", CUTS[::4]),
        pytest.param(2, "adamw", CUTS[::5], marks=pytest.mark.slow),
        pytest.param(1, "adamw_8bit", CUTS[3::5], marks=pytest.mark.slow),
        pytest.param(1, "adamw", CUTS, marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulated", "8bit", "everywhere"],
)
def test_cut_off_anywhere_and_resumed_equals_uninterrupted(
    tiny_llama: Path, tmp_path: Path, accumulate: int, optimizer: str, cuts: list[tuple[str, int]]
) -> None:
    whole = Recorder()
    expected = adapters(fit(tiny_llama, tmp_path / "whole", whole, accumulate=accumulate, optimizer=optimizer))
    assert sorted(whole.losses) == list(range(EPOCHS * BATCHES))
    kept = torch.load(tmp_path / "whole/last.ckpt", weights_only=True)
    assert kept["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{}]  # the loops know where the fit is
    for cut in cuts:
        folder = tmp_path / f"{cut}"
        before, after = Recorder(cut), Recorder()
        with pytest.raises(PowerCut):
            fit(tiny_llama, folder, before, accumulate=accumulate, optimizer=optimizer)
        resumed = adapters(fit(tiny_llama, folder, after, accumulate=accumulate, optimizer=optimizer))
        assert before.losses | after.losses == whole.losses, cut
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], tensor), (cut, name)
