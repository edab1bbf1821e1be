"""Fits of two ranks, to be compared by their strategies."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy.layers import decoder_blocks
from qpruner.callbacks import GridPolishing, KeepModel, MixedPrecisionQuantization, RunCheckpoint
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.likelihood import causal_model
from qpruner.training.distillation import DistillationConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

AFFINE = {"bits": 4, "group": 32, "formats": {4: "affine"}, "loftq_iterations": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "quantized": {"callback": {"bits": [8, 4]}, "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}},
    "dense": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "checkpointed": {"callback": {"bits": 4}, "module": {"gradient_checkpointing": True}},
    "bf16-mixed": {"callback": {"bits": 4}, "trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {"callback": {"bits": 4}, "trainer": {"precision": "bf16-true"}},
    "distilled": {"callback": {"bits": 4}, "module": {"distillation": DistillationConfig(hidden=0.5)}},
    "polished": {"callback": AFFINE, "polishes": True, "module": {"optimizer": OptimizerConfig(lr=0.003)}},
    "double": {"callback": {"bits": 3, "group": 32}},  # with parameters without dimensions
    "tables": {"callback": {"bits": 4, "embedding": 8, "head": 8}},
}


class Watch(Callback):
    """The loss of every training step, and what a rank holds of the layers, without what all ranks hold whole."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for block in decoder_blocks(causal_model(pl_module.model)):
            for parameter in block.parameters():
                part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                self.bytes += part.numel() * part.element_size() if part.ndim else 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(
    base: str, folder: Path, strategy: Any, variant: dict[str, Any], ckpt_path: Path | None = None
) -> dict[str, Any]:
    """A fit of four steps on two ranks, and what this one saw of it.

    Args:
        base: model that is fitted.
        folder: folder that gets the model and ``last.ckpt``.
        strategy: strategy of the Trainer.
        variant: options of the callback that quantizes, the module and the Trainer; see `VARIANTS`.
        ckpt_path: checkpoint that it goes on from.
    """
    options = {"lora": LoRAConfig(r=3, dropout=0.1), "optimizer": OptimizerConfig(lr=0.01, schedule="constant")}
    module = LoRAFinetuner(base=base, seed=3, **options | variant.get("module", {}))
    module.kept_in = folder / "model"
    data = StoriesDataModule(
        tokenizer=base, max_length=24, num_train=22, num_validation=7, num_test=1, num_choices=3,
        loader=LoaderConfig(batch_size=2, eval_tokens_per_batch=96),
    )  # fmt: skip
    watch = Watch()
    compressing: list[Callback] = [MixedPrecisionQuantization(**variant["callback"])] if "callback" in variant else []
    if variant.get("polishes"):
        compressing.append(GridPolishing())
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_steps": 4, "val_check_interval": 2,
           "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
           "use_distributed_sampler": False, "default_root_dir": folder, **variant.get("trainer", {})},
        callbacks=[
            *compressing,
            KeepModel(module.kept_in, folder / "polished" if variant.get("polishes") else module.kept_in),
            RunCheckpoint(folder / "last.ckpt", 3),
            watch,
        ],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    inference = trainer.fit_loop.epoch_loop.val_loop.inference_mode, trainer.test_loop.inference_mode
    return {"losses": watch.losses, "bytes": watch.bytes, "metrics": metrics, "inference_mode": any(inference)}
