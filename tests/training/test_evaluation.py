from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import Precision

from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.choices import ChoiceExamples
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.rows import Row, TextExamples, TokenRows
from qpruner.training.evaluation import Measures, evaluate
from qpruner.training.module import LoRAFinetuner

HOW: Any = {"device": torch.device("cpu"), "precision": Precision(), "title": "", "progress": False}


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 2), (1, 1), (0.5, 1), (99, 2)])
def test_evaluation_equals_the_losses_of_the_rows(
    tiny_llama: Path, stories: StoriesDataModule, limit: int | float, batches: int
) -> None:
    module = LoRAFinetuner(base=str(tiny_llama))
    module.load_base()
    module.model.train()
    loader = stories.evaluation_loaders("test")[0]
    results = evaluate(module.model, [loader], limit=limit, **HOW)
    assert module.model.training  # left in the mode that it was in
    module.model.eval()
    rows = [row for batch in loader.batches()[:batches] for row in batch]
    assert len(rows) == 6 or batches == 1
    batch = stories.examples("test").collate(rows)
    nll = F.cross_entropy(
        module(batch)[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert results["tokens"] == len(rows) * 23
    assert results["loss"] == pytest.approx(float(nll) / (len(rows) * 23), rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(
        float(nll) / float(torch.tensor(2.0).log()) / int(batch["num_bytes"].sum())
    )
    assert "accuracy" not in results


def ragged_examples() -> tuple[TextExamples, ChoiceExamples]:
    """40 texts of 2 to 60 tokens, and 30 questions of two to four options of uneven length."""
    generator = np.random.default_rng(0)

    def row(length: int, unscored: int) -> Row:
        tokens = generator.integers(5, 2000, length).astype(np.int32)
        return Row(tokens, np.arange(length) >= unscored, np.full(length, 3, np.int32))

    texts = TextExamples(TokenRows.of(row(length, 0) for length in generator.integers(2, 61, 40)), pad_token=0)
    options = generator.integers(2, 5, 30)
    rows = [row(int(generator.integers(8, 50)), 4) for _ in range(options.sum())]
    first_option = torch.from_numpy(np.concatenate([[0], options.cumsum()]))
    gold = torch.from_numpy(generator.integers(0, options))
    lengths = torch.from_numpy(generator.integers(1, 20, options.sum()))
    return texts, ChoiceExamples("task", "acc", TokenRows.of(rows), first_option, gold, lengths, torch.arange(30), 0, 0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_tokens_per_batch_and_ranks_change_no_result(tiny_llama: Path, world_size: int) -> None:
    module = LoRAFinetuner(base=str(tiny_llama))
    module.load_base()
    module.model.double().eval()
    texts, choices = ragged_examples()

    def results(tokens: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        measures = Measures()
        records = []
        for examples in (texts, choices):
            for rank in range(world_size):
                for batch in EvaluationLoader(examples, tokens=tokens, rank=rank, world_size=world_size):
                    measures.add(module.model, batch)
                    records += module.predict_step(batch, 0)
        return measures.results(), records

    with torch.no_grad():
        # Row by row, which no loader has a part in.
        measures = Measures()
        for examples in (texts, choices):
            for number in range(len(examples)):
                measures.add(module.model, examples.collate([number]))
        expected = measures.results()
        assert expected["tokens"] == texts.rows.num_scored and expected["examples"] == 30
        assert 0 < expected["accuracy"] < 1
        for tokens in (1, 100, 10_000):
            found, records = results(tokens)
            assert found == pytest.approx(expected, rel=1e-9), tokens
            assert sorted(record["row"] for record in records if "row" in record) == list(range(40))
            assert sorted(record["example"] for record in records if "example" in record) == list(range(30))
            assert sum(record.get("nll", 0.0) for record in records) == pytest.approx(
                expected["loss"] * expected["tokens"], rel=1e-9
            )
