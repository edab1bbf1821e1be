"""What is measured of a run, by which names, whatever it was cut off in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support.fits import PRUNING, finetuner, fit, trainer

from qpruner.callbacks import KeepModel, MixedPrecisionQuantization, StructuredPruning
from qpruner.compressed import CompressedModel
from qpruner.datamodules import StoriesDataModule
from qpruner.records.report import Summary
from qpruner.runs.evaluation import measure_stages
from qpruner.training.module import LoRAFinetuner

Measure = Callable[..., Summary]


@pytest.fixture
def measure(tiny_llama: Path, stories: StoriesDataModule) -> Measure:
    def of(kept: Path | None, *, trained: bool = False) -> Summary:
        module = finetuner(tiny_llama)
        module.continues_from = kept
        return measure_stages(trainer(), module, stories, "test", checkpoint=None, trained=trained, finished=True)

    return of


@pytest.fixture
def kept(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> Callable[..., LoRAFinetuner]:
    """A fit that keeps its result in a folder."""

    def by(*callbacks: Callback) -> LoRAFinetuner:
        folder = tmp_path / "model"
        return fit(finetuner(tiny_llama), stories, *callbacks, KeepModel(folder, folder))

    return by


def names(summary: Summary) -> list[str]:
    return [stage.name for stage in summary.stages]


def test_a_run_that_has_kept_nothing_has_a_dense_model_alone(measure: Measure) -> None:
    (stage,) = measure(None).stages
    assert stage.name == "dense" and stage.average_bits is None and stage.results["perplexity"] > 1


@pytest.mark.parametrize(
    ("callback", "name"), [(StructuredPruning(**PRUNING), "pruned"), (MixedPrecisionQuantization(4), "quantized")]
)
def test_the_stages_of_a_compressed_base(
    kept: Callable[..., LoRAFinetuner], measure: Measure, tmp_path: Path, callback: Callback, name: str
) -> None:
    kept(callback)
    assert names(measure(tmp_path / "model")) == ["dense", name]
    summary = measure(tmp_path / "model", trained=True)
    assert names(summary) == ["dense", name, "recovered"]
    dense, compressed, recovered = summary.stages
    assert compressed.tensor_bytes < dense.tensor_bytes
    assert recovered.tensor_bytes - compressed.tensor_bytes == 4 * (recovered.parameters - compressed.parameters) > 0
    assert compressed.average_bits == recovered.average_bits is not None
    assert len({stage.results["perplexity"] for stage in summary.stages}) == 3


def test_a_phase_that_was_cut_off_with_its_merged_base_kept(
    kept: Callable[..., LoRAFinetuner], measure: Measure, tmp_path: Path
) -> None:
    """Merged, to be quantized: what allocation measures on it names its folder, and so it is kept before."""
    model = kept(StructuredPruning(**PRUNING)).compressed
    model.merge(torch.float32)
    model.keep(tmp_path / "merged", tokenizer=None)
    summary = measure(tmp_path / "merged")
    assert names(summary) == ["dense", "merged"]
    assert summary.stages[1].parameters == sum(weight.numel() for weight in model.network.parameters())
    opened = CompressedModel.open(tmp_path / "merged")
    assert opened.base_state.value == "merged" and summary.stages[1].average_bits == opened.average_bits
