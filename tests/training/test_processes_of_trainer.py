"""The processes of a Trainer: of one, and of two that gloo joins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from qpruner.errors import UserError
from qpruner.training.processes import processes_of

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
         "enable_model_summary": False, "use_distributed_sampler": False, "max_steps": 1}  # fmt: skip


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_trainer_of_one_process(precision: Any, dtype: torch.dtype) -> None:
    processes = processes_of(Trainer(**QUIET, precision=precision))
    assert (processes.device, processes.rank, processes.world_size) == (torch.device("cpu"), 0, 1)
    assert processes.is_first and processes.precision == precision
    tensor = torch.ones(2)
    assert torch.equal(processes.reduce(tensor), tensor) and processes.broadcast([3]) == [3]
    with processes.forward_context():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


class Asking(BoringModel):
    """Writes what each process has of the others."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, stage: str) -> None:
        processes = processes_of(self.trainer)
        total = processes.reduce(torch.tensor([processes.rank + 1, 2**40], dtype=torch.int64)).tolist()

        def fail() -> None:
            if processes.rank == 1:
                raise OSError(28, "No space left")

        try:
            processes.of_each(fail)
        except (OSError, UserError) as error:
            said = [type(error).__name__, str(error)]
        answer = [
            processes.world_size, total, processes.broadcast(f"rank {processes.rank}"), processes.of_first(lambda: 7),
            said, processes.of_each(lambda: processes.rank),
        ]  # fmt: skip
        (self.folder / f"{processes.rank}.json").write_text(json.dumps(answer))


def test_two_processes_that_gloo_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Trainer(**QUIET, devices=2, strategy="ddp_fork").fit(Asking(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    told = "[Errno 28] No space left"
    assert first == [2, [3, 2**41], "rank 0", 7, ["UserError", f"Process 1 failed: OSError: {told}"], 0]
    assert second == [2, [3, 2**41], "rank 0", 7, ["OSError", told], 1]
