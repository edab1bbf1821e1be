from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import Precision

from qpruner.datamodules import StoriesDataModule
from qpruner.training.evaluation import evaluate
from qpruner.training.module import LoRAFinetuner


@pytest.mark.parametrize(("limit", "rows"), [(1.0, 6), (1, 4), (0.5, 4), (99, 6)])
def test_evaluation_equals_the_losses_of_the_rows(
    tiny_llama: Path, stories: StoriesDataModule, limit: int | float, rows: int
) -> None:
    module = LoRAFinetuner(base=str(tiny_llama))
    module.load_base()
    module.model.train()
    results = evaluate(
        module,
        stories.evaluation_loaders("test")[:1],
        limit=limit,
        device=torch.device("cpu"),
        precision=Precision(),
        title="",
        progress=False,
    )
    assert module.model.training  # left in the mode that it was in
    module.model.eval()
    batch = stories.examples("test").collate(range(rows))
    nll = F.cross_entropy(
        module(batch)[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert results["tokens"] == rows * 23
    assert results["loss"] == pytest.approx(float(nll) / (rows * 23), rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(
        float(nll) / float(torch.tensor(2.0).log()) / int(batch["num_bytes"].sum())
    )
    assert "accuracy" not in results
