"""Fits of the families whose layers are not those of a Llama: what is compressed, trained, kept and opened again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.families import tiny_model
from support.fits import PRUNING, finetuner, fit, logits

from qpruner.anatomy import FAMILIES, architecture_of
from qpruner.callbacks import LoRAGuidedPruning, MixedPrecisionQuantization, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.model_folder import load_compressed
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.surgery import stated_by_weights
from qpruner.quantization.packed import PackedLinear

UNLIKE = ["gemma3_text", "olmo2", "phi3", "gpt2"]


@pytest.fixture(params=UNLIKE)
def base(request: Any, tmp_path: Path) -> Path:
    tiny_model(request.param, vocab_size=2048, initializer_range=0.1).save_pretrained(tmp_path / "base")
    load_tokenizer(EMBEDDED).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_pruned_quantized_and_trained_it_comes_back(base: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    module = finetuner(base)
    module.kept_in = tmp_path / "model"
    fit(module, stories, StructuredPruning(**PRUNING | {"ratio": 0.1}), MixedPrecisionQuantization(4))
    plan, model = module.plan, module.model.get_base_model()
    assert plan is not None and plan.widths != plan.architecture and plan.quantized
    assert stated_by_weights(model) == plan.widths == architecture_of(model.config)
    family = FAMILIES[plan.architecture.model_type]
    paths = {f"{family.layers}.{n}.{path}" for n in range(3) for path in family.projections.values()}
    assert {n for n, one in model.named_modules() if isinstance(one, PackedLinear)} == {
        f"{path}.base_layer" for path in paths
    }
    assert all(p.abs().max() > 0 for name, p in module.named_parameters() if p.requires_grad)  # LoftQ, and trained
    opened = load_compressed(tmp_path / "model")
    assert torch.equal(logits(opened), logits(module.model))


def test_what_lora_guided_pruning_masked_is_what_is_left(base: Path, stories: StoriesDataModule) -> None:
    seen: list[torch.Tensor] = []

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, module: Any) -> None:
            assert module.compressed.masks is not None
            seen.append(logits(module.model))
            module.model.train()

    pruning = LoRAGuidedPruning(ratio=0.2, schedule=CubicSchedule(warmup=0.1, cooldown=0.2, every_n_steps=2))
    module = fit(finetuner(base), stories, pruning, Look(), steps=10)
    assert module.plan is not None
    widths, dense = module.plan.widths, module.plan.architecture
    assert sum(widths.ffn_channels) < sum(dense.ffn_channels) and sum(widths.kv_groups) < sum(dense.kv_groups)
    torch.testing.assert_close(logits(module.model), seen[0], rtol=1e-4, atol=1e-4)
