"""One batch, micro-batches and ranks make the same optimizer step of the same rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support import TESTS
from support.gradients_of_a_step import finetuner, ragged_rows, write_gradients

from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError

SCRIPT = TESTS / "support" / "gradients_of_a_step.py"
WAYS = {"one batch": (1, 16, 1), "accumulated": (1, 4, 4), "an epoch too short": (1, 4, 8), "two ranks": (2, 4, 2)}
"""Ranks, rows of a micro-batch, micro-batches to a step."""


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all scored tokens of the 16 rows."""
    module, rows = finetuner(str(tiny_llama)), ragged_rows().collate(range(16))
    F.cross_entropy(module(rows)[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_weighs_all_its_tokens_alike(
    way: str, expected: dict[str, torch.Tensor], tiny_llama: Path, tmp_path: Path
) -> None:
    ranks, size, num = WAYS[way]
    output = str(tmp_path / "gradients.pt")
    if ranks == 1:
        write_gradients(str(tiny_llama), output, ranks, size, num)
    else:  # of which Lightning starts the second
        command = [sys.executable, str(SCRIPT), str(tiny_llama), output, *map(str, (ranks, size, num))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    gradients = torch.load(output, weights_only=True)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_changing_number_of_micro_batches_is_refused(tiny_llama: Path, stories: StoriesDataModule) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})], use_distributed_sampler=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"GradientAccumulationScheduler .*--trainer.accumulate_grad_batches"):
        trainer.fit(finetuner(str(tiny_llama)), datamodule=stories)
