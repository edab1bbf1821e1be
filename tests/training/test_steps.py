"""One batch, micro-batches and ranks make the same optimizer step of the same rows."""

import json
import subprocess
import sys
from dataclasses import asdict
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
from qpruner.likelihood import hidden_states
from qpruner.pretrained import load_model
from qpruner.training.distillation import DistillationConfig

SCRIPT = TESTS / "support" / "gradients_of_a_step.py"
WAYS = {"one batch": (1, 16, 1), "accumulated": (1, 4, 4), "an epoch too short": (1, 4, 8), "two ranks": (2, 4, 2)}
SLOW = pytest.mark.slow  # of those that start a second process one stays, which has all losses
"""Ranks, rows of a micro-batch, micro-batches to a step."""


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all scored tokens of the 16 rows."""
    module, rows = finetuner(str(tiny_llama)), ragged_rows().collate(range(16))
    F.cross_entropy(module(rows)[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", [pytest.param(way, marks=SLOW if way == "two ranks" else ()) for way in WAYS])
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


DISTILLATION = {"logits": 0.6, "hidden": 0.5, "cross_entropy": 0.3, "temperature": 1.5, "top_k": 2047}


@pytest.fixture(scope="module")
def distilled(tiny_llama: Path) -> dict[str, torch.Tensor]:
    """Gradients of the mean of the three losses over all scored tokens of the 16 rows, from whole logits."""
    module, rows = finetuner(str(tiny_llama)), ragged_rows().collate(range(16))
    teacher = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False).requires_grad_(False)
    targets = rows["labels"][:, 1:]
    states = [hidden_states(one, rows["input_ids"], rows["attention_mask"])[:, :-1] for one in (module.model, teacher)]
    (logits, taught), scored = [(teacher.lm_head(one) / 1.5).log_softmax(-1) for one in states], targets != -100
    kl = (taught.exp() * (taught - logits)).sum(-1)[scored].mean()
    nll = F.cross_entropy(module(rows)[:, :-1].flatten(0, 1), targets.flatten())
    (0.3 * nll + 0.6 * 1.5**2 * kl + 0.5 * (states[0] - states[1]).square().mean(-1)[scored].mean()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("way", "teacher"),
    [
        ("one batch", "online"),
        ("accumulated", "online"),
        pytest.param("two ranks", "online", marks=SLOW),
        pytest.param("two ranks", "recorded", marks=SLOW),
    ],
)
def test_a_step_of_distillation_weighs_all_its_tokens_alike(
    way: str, teacher: str, distilled: dict[str, torch.Tensor], tiny_llama: Path, tmp_path: Path
) -> None:
    ranks, size, num = WAYS[way]
    config = DistillationConfig(**DISTILLATION, teacher=teacher)  # type: ignore[arg-type]
    output = str(tmp_path / "gradients.pt")
    if ranks == 1:
        write_gradients(str(tiny_llama), output, ranks, size, num, config)
    else:
        command = [sys.executable, str(SCRIPT), str(tiny_llama), output, *map(str, (ranks, size, num))]
        done = subprocess.run([*command, json.dumps(asdict(config))], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    gradients = torch.load(output, weights_only=True)
    assert gradients.keys() == distilled.keys()
    nearly = 1e-5 if teacher == "online" else 2e-3  # what is recorded is rounded to half floats
    for name, gradient in distilled.items():
        assert gradient.any()
        assert (gradients[name] - gradient).norm() <= nearly * gradient.norm(), name


def test_a_changing_number_of_micro_batches_is_refused(tiny_llama: Path, stories: StoriesDataModule) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})], use_distributed_sampler=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"GradientAccumulationScheduler .*--trainer.accumulate_grad_batches"):
        trainer.fit(finetuner(str(tiny_llama)), datamodule=stories)
