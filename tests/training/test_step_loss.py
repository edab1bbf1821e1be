"""One batch, micro-batches and ranks make the same optimizer step of the same rows."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients_of_a_step import finetuner, ragged_rows, write_gradients

SCRIPT = Path(__file__).with_name("gradients_of_a_step.py")
WAYS = {"one batch": (1, 16, 1), "accumulated": (1, 4, 4), "uneven micro-batches": (1, 5, 4), "two ranks": (2, 4, 2)}
"""Ranks, rows of a micro-batch, micro-batches."""


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Any:
    """The mean loss over all scored tokens of the 16 rows, and its gradients."""
    module, rows = finetuner(str(tiny_llama)), ragged_rows()
    loss = F.cross_entropy(module(rows)[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
    loss.backward()
    return {"loss": loss.detach(), "gradients": {n: p.grad for n, p in module.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_weighs_all_its_tokens_alike(way: str, expected: Any, tiny_llama: Path, tmp_path: Path) -> None:
    ranks, size, num = WAYS[way]
    output = str(tmp_path / "gradients.pt")
    if ranks == 1:
        write_gradients(str(tiny_llama), output, ranks, size, num)
    else:  # of which Lightning starts the second
        command = [sys.executable, str(SCRIPT), str(tiny_llama), output, *map(str, (ranks, size, num))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    step = torch.load(output, weights_only=True)
    assert float(step["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, gradient in expected["gradients"].items():
        assert gradient.any()
        torch.testing.assert_close(step["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
