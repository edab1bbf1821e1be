"""What a fit leaves on disk, and what a checkpoint makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.fits import PRUNING, adapters, finetuner, fit, logits, trainer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from qpruner.adapter_files import has_initial_adapters, has_trained_adapters
from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import KeepModel, MixedPrecisionQuantization, RunCheckpoint, StructuredPruning
from qpruner.compressed import State
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.folder_manifest import identity_of, is_compressed, read_checked_manifest, read_manifest
from qpruner.model_folder import load_compressed
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.training import compressible
from qpruner.training.module import LoRAFinetuner


class Folder(Callback):
    """What lies in a folder when training starts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.there = is_compressed(self.path)
        self.initial = self.there and has_initial_adapters(self.path)


@pytest.mark.parametrize("iterations", [0, 1])
def test_the_base_is_there_before_training_and_the_adapters_after(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, iterations: int
) -> None:
    folder, seen = tmp_path / "model", Folder(tmp_path / "model")
    compressing = StructuredPruning(**PRUNING), MixedPrecisionQuantization(4, loftq_iterations=iterations)
    module = fit(finetuner(tiny_llama), stories, *compressing, KeepModel(folder, folder), seen)
    assert seen.there and seen.initial == (iterations > 0) and has_trained_adapters(folder)
    assert [step["name"] for step in read_manifest(folder)["recipe"]] == [type(one).__name__ for one in compressing]
    assert read_manifest(folder)["recipe"][0]["options"]["ratio"] == PRUNING["ratio"]
    assert torch.equal(logits(load_compressed(folder)), logits(module.model))
    assert not any(Path(compressible.BASES).iterdir())  # kept once


def test_a_fit_that_compresses_nothing_leaves_its_model_too(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    folder, seen = tmp_path / "model", Folder(tmp_path / "model")
    module = fit(finetuner(tiny_llama), stories, KeepModel(folder, folder), seen)
    assert not seen.there and read_manifest(folder)["state"] == State.DENSE and has_trained_adapters(folder)
    assert torch.equal(logits(load_compressed(folder)), logits(module.model))


def test_a_checkpoint_on_a_dense_base_that_is_kept_by_now_loads(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    running = trainer(KeepModel(tmp_path / "model", tmp_path / "model"), steps=3)
    module = finetuner(tiny_llama)
    running.fit(module, datamodule=stories)
    running.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["base"]["folder"] is None
    loaded = LoRAFinetuner.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(logits(loaded.model), logits(module.model))


def test_of_a_family_that_cannot_be_compressed_nothing_is_kept(stories: StoriesDataModule, tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    load_tokenizer(EMBEDDED).save_pretrained(tmp_path / "base")
    folder = tmp_path / "model"
    lora = LoRAConfig(r=2, target_modules=["query_key_value"])
    module = fit(finetuner(tmp_path / "base", lora=lora), stories, KeepModel(folder, folder))
    assert module.plan is None and not folder.exists()


def test_a_rehearsal_keeps_nothing(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    running = Trainer(
        accelerator="cpu", fast_dev_run=True, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=tmp_path,
        callbacks=[MixedPrecisionQuantization(8), KeepModel(folder, folder)],
    )  # fmt: skip
    running.fit(finetuner(tiny_llama), datamodule=stories)
    assert [*tmp_path.iterdir()] == [] and not any(Path(compressible.BASES).iterdir())


# Without that callback: a folder named by the hash of the base.


def bases() -> list[Path]:
    return sorted(place for place in Path(compressible.BASES).iterdir() if place.is_dir())


def test_a_fit_without_a_folder_keeps_its_base_by_its_hash(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    module = fit(finetuner(tiny_llama), stories, MixedPrecisionQuantization(4), checkpoint)
    (folder,) = bases()
    assert identity_of(read_manifest(folder)) == module.compressed.identity
    assert str(module.compressed.identity).startswith(folder.name) and has_initial_adapters(folder)
    loaded = LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)
    assert torch.equal(logits(loaded.model), logits(module.model))
    # The same fit again is the same base, which stays where checkpoints find it, unless it is damaged.
    weights = folder / "model.safetensors"
    written = weights.stat().st_ino
    fit(finetuner(tiny_llama), stories, MixedPrecisionQuantization(4))
    assert bases() == [folder] and weights.stat().st_ino == written
    weights.write_bytes(weights.read_bytes()[:-1])
    fit(finetuner(tiny_llama), stories, MixedPrecisionQuantization(4))
    assert bases() == [folder] and read_checked_manifest(folder) == read_manifest(folder)


def test_a_dense_fit_keeps_no_base(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    module = fit(finetuner(tiny_llama), stories, checkpoint)
    assert bases() == []
    entry = torch.load(checkpoint.path, weights_only=True)["base"]
    assert entry == {
        "name": str(tiny_llama), "dense_sha256": module.compressed.base_sha256,
        "sha256": module.compressed.base_sha256, "folder": None,
    }  # fmt: skip


def test_weights_that_the_plan_does_not_tell_come_back_with_a_checkpoint(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    """Such as compensated ones: pruned by the same plan once more they would be others."""

    class Compensation(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            with torch.no_grad():
                pl_module.compressed.network.model.layers[0].mlp.down_proj.weight.add_(0.01)

    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    module = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), Compensation(), checkpoint)
    loaded = LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)
    assert torch.equal(logits(loaded.model), logits(module.model))
    # Also where the fit that goes on has made a base of its own by then, with the same plan.
    resumed = finetuner(tiny_llama)
    running = trainer(StructuredPruning(**PRUNING), steps=3)
    running.fit(resumed, datamodule=stories, ckpt_path=checkpoint.path, weights_only=True)
    assert resumed.compressed.identity == module.compressed.identity
    with resumed.adapters_disabled(), module.adapters_disabled():
        assert torch.equal(logits(resumed.model), logits(module.model))
    assert any(not torch.equal(adapters(resumed)[name], tensor) for name, tensor in adapters(module).items())


def test_a_base_compressed_by_another_plan_is_refused(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), checkpoint)
    running = trainer(MixedPrecisionQuantization(8), steps=3)
    with pytest.raises(UserError, match="on a base that was compressed by another plan. Compress it as"):
        running.fit(finetuner(tiny_llama), datamodule=stories, ckpt_path=checkpoint.path, weights_only=True)
