"""The LightningModule that fine-tunes LoRA adapters on a frozen base model."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from qpruner.adapters.lora import LoRAConfig
from qpruner.datamodules.rows import Batch
from qpruner.likelihood import IGNORED, token_nll
from qpruner.pretrained import EMBEDDED, DType
from qpruner.seeds import derive_seed
from qpruner.training.compressible import CompressibleModule
from qpruner.training.metrics import ChoiceAccuracy, Perplexity, choose
from qpruner.training.optimization import OptimizerConfig, make_optimizer, make_scheduler


class LoRAFinetuner(CompressibleModule):
    """Recovers a causal language model by training LoRA adapters; the base never changes.

    Every random draw of training depends on (seed, epoch, batch, rank) alone, so a resumed fit repeats the numbers of
    an uninterrupted one. ``after_clipping`` holds what is called once the gradients of an optimizer step are unscaled
    and clipped, before the step, with whether they were finite: no hook of a callback lies there.

    Args:
        base: model folder, hub name, or ``qpruner/stories`` for the model that comes with the package.
        dtype: number format of the base in memory; computation follows ``--trainer.precision``.
        trust_remote_code: whether code that comes with the model may run.
        gradient_checkpointing: whether activations are computed again in the backward pass instead of kept.
        lora: the adapters.
        optimizer: how they are trained.
        seed: of the adapters' start and of dropout; on the command line ``--seed_everything``.
    """

    def __init__(
        self,
        base: str = EMBEDDED,
        dtype: DType = "float32",
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        seed: int = 0,
    ) -> None:
        # `load_from_checkpoint` gives back the plain data that a checkpoint holds.
        lora = LoRAConfig(**lora) if isinstance(lora, dict) else lora
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        super().__init__(base, dtype, trust_remote_code, gradient_checkpointing, lora, seed)
        self.save_hyperparameters(
            {
                "base": base,
                "dtype": dtype,
                "trust_remote_code": trust_remote_code,
                "gradient_checkpointing": gradient_checkpointing,
                "lora": {**asdict(lora), "target_modules": list(lora.target_modules)},
                "optimizer": asdict(optimizer),
                "seed": seed,
            }
        )
        self.optimizer_config = optimizer
        self.after_clipping: list[Callable[[bool], None]] = []
        self.perplexity = Perplexity()
        self.accuracy = ChoiceAccuracy()

    def forward(self, batch: Batch) -> Tensor:  # [B, T, V]
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits: Tensor = output.logits
        return logits

    # Training.

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(derive_seed(self.seed, "batch", self.current_epoch, batch_idx, self.global_rank))

    def token_nll(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each token of a batch, in nats; 0 where it is not scored."""  # [B, T - 1]
        return token_nll(self.model, batch["input_ids"], batch["labels"], batch["attention_mask"])

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the scored tokens of a batch, in nats; 0 when there are none."""  # []
        return self.token_nll(batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total = self.token_nll(batch).sum()
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        self.log("train/loss", total.detach() / num_tokens, prog_bar=True, batch_size=len(batch["input_ids"]))
        # The Trainer takes the mean over micro-batches, its strategy that over ranks. A mean of means would give the
        # tokens of a micro-batch with few of them more weight than others have.
        loss: Tensor = total / batch.get("step_tokens", num_tokens)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if not self.after_clipping:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        finite = bool(torch.stack([one.isfinite().all() for one in gradients]).all())  # clipping by value hides it
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for observe in self.after_clipping:
            observe(finite)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = make_optimizer(self.optimizer_config, self.parameters())
        scheduler = make_scheduler(
            self.optimizer_config, optimizer, lambda: int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation.

    def evaluate(self, batch: Batch, perplexity: Perplexity, accuracy: ChoiceAccuracy) -> None:
        """Adds a batch to the metric that it is for."""
        labels = batch["labels"]
        nll = self.token_nll(batch)
        if "gold" in batch:
            accuracy.update(nll, labels, batch["example"], batch["option"], batch["gold"])
        else:
            perplexity.update(nll, labels, batch["num_bytes"])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, self.perplexity, self.accuracy)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, self.perplexity, self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One record for each row of text (its loss), or for each example of a choice task (the option chosen)."""
        labels = batch["labels"]
        nll = self.token_nll(batch)
        if "gold" in batch:
            real = batch["example"] >= 0
            rows = real.nonzero().flatten()[choose(nll[real], labels[real], batch["example"][real])]
            return [
                {
                    "example": int(batch["example"][row]),
                    "option": int(batch["option"][row]),
                    "gold": int(batch["gold"][row]),
                }
                for row in rows.tolist()
            ]
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        return [
            {"row": int(row), "tokens": int(count), "nll": float(total)}
            for row, count, total in zip(batch["example"], tokens, nll.double().sum(1), strict=True)
            if row >= 0
        ]

    def _log_evaluation(self, stage: str) -> None:
        results = evaluation_results(self.perplexity, self.accuracy)
        # The metrics have gathered all ranks already; `sync_dist` only spares Lightning a warning.
        self.log_dict({f"{stage}/{name}": value for name, value in results.items()}, sync_dist=True)
        self.perplexity.reset()
        self.accuracy.reset()


def evaluation_results(perplexity: Perplexity, accuracy: ChoiceAccuracy) -> dict[str, float]:
    """What the two metrics say over all ranks, leaving out what they saw nothing of."""
    results: dict[str, float] = {}
    if perplexity.update_called:
        results |= {name: float(value) for name, value in perplexity.compute().items()}
    if accuracy.update_called:
        results |= {name: float(value) for name, value in accuracy.compute().items()}
    return {name: value for name, value in results.items() if value == value}  # without nan: unknown bytes
