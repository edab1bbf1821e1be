"""The LightningModule that fine-tunes LoRA adapters on a frozen base model."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from qpruner.adapters.lora import LoRAConfig
from qpruner.datamodules.choices import ChoiceBatch
from qpruner.datamodules.rows import Batch
from qpruner.errors import UserError
from qpruner.files import reading
from qpruner.likelihood import IGNORED, Head, Scored, token_nll
from qpruner.offload import OffloadChoice
from qpruner.pretrained import EMBEDDED, DType
from qpruner.seeds import derive_seed
from qpruner.training.answers import answers
from qpruner.training.checkpoint_file import REMEDY, read_checkpoint
from qpruner.training.checkpointed import CheckpointedModule
from qpruner.training.distillation import DistillationConfig, Losses, distillation_losses
from qpruner.training.evaluation import Measures
from qpruner.training.finite import LossWatch, all_finite, broken_names, not_finite, tensors_of
from qpruner.training.optimization import OptimizerConfig, make_optimizer, make_scheduler
from qpruner.training.processes import processes_of
from qpruner.training.recording import Recording
from qpruner.training.sharding import FSDP2, splits
from qpruner.training.teacher import Teacher, check_teacher, order_of_base
from qpruner.training.teaching import engage_teacher

SMALLEST_SCALE = 2.0**-14
"""Smallest loss scale under ``16-mixed`` that is tolerated. It starts at 2 to the 16 and is halved at each step whose
gradients overflow, so a scale this small means that no scale can prevent the overflow."""

OVERFLOW = re.compile(
    r"Function '(?P<operation>\w+)' returned nan values|cannot be converted to type \w+ without overflow"
)
"""What torch says about numbers that are not finite."""


class LoRAFinetuner(CheckpointedModule):
    """Recovers a causal language model by training LoRA adapters; the base never changes.

    If `GridPolishing` asks for it, a fit trains the scales and minima of the packed base in place of the adapters.

    Every random draw of training depends only on (seed, epoch, batch, rank), so a resumed fit repeats the numbers of an
    uninterrupted one. ``after_clipping`` holds functions that are called once the gradients of an optimizer step are
    unscaled and clipped, before the step, with whether they were finite: callbacks have no hook at that point.

    A fit whose numbers are no longer finite is stopped, on all ranks together: losses are checked every
    ``log_every_n_steps`` batches, before each validation, at the end of each epoch and before each checkpoint; adapters
    and the optimizer's state before each checkpoint, adapters also at the end of each epoch; the validation loss and
    accuracy whenever they are available. No checkpoint is ever written with adapters or an optimizer's state that are
    not finite, whatever callback asks for it, nor after a loss that was not. No step has to wait for the device.

    Args:
        base: model folder, hub name, or ``qpruner/stories`` for the model that comes with the package.
        dtype: number format of the base in memory: ``auto`` for bfloat16 where the base is stored in it, else float32;
            computation follows ``--trainer.precision``.
        trust_remote_code: whether code that comes with the model may run.
        gradient_checkpointing: whether activations are recomputed in the backward pass instead of stored.
        lora: options of the adapters.
        optimizer: how the adapters are trained.
        seed: seed of the adapters' initialisation and of dropout; on the command line ``--seed_everything``.
        distillation: what is learnt from the dense model in addition to the labels; None for the labels alone.
            Evaluation is the same either way, and so is ``train/loss``, the mean negative log-likelihood; ``train/kl``
            and ``train/hidden`` are logged next to it.
        offload: whether callbacks compress the base block by block, with the other blocks in files: ``always``,
            ``never``, or ``auto``, if the device has less than twice the memory of the dense weights. Results are the
            same.

    Raises:
        UserError: pooled adapters have an optimizer of 8 bits; in a fit, a loss, a gradient that no loss scale can
            mend, an adapter or a metric is not finite; or the teacher is unsuitable.
    """

    def __init__(
        self,
        base: str = EMBEDDED,
        dtype: DType = "auto",
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008  # frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        seed: int = 0,
        distillation: DistillationConfig | None = None,
        offload: OffloadChoice = "auto",
    ) -> None:
        # `load_from_checkpoint` passes the plain data that a checkpoint holds.
        lora = LoRAConfig(**lora) if isinstance(lora, dict) else lora
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        distillation = DistillationConfig(**distillation) if isinstance(distillation, dict) else distillation
        if lora.pooled and "8bit" in optimizer.name:
            raise UserError(
                f"--model.optimizer.name is {optimizer.name}, which rounds its state by blocks that may end within a "
                f"group, so that the columns of pooled adapters drift apart. Use adamw or paged_adamw, or leave "
                f"--model.lora.pooled out."
            )
        targets = lora.target_modules
        super().__init__(base, dtype, trust_remote_code, gradient_checkpointing, lora, seed, offload)
        self.save_hyperparameters(
            {
                "base": base,
                "dtype": dtype,
                "trust_remote_code": trust_remote_code,
                "gradient_checkpointing": gradient_checkpointing,
                "lora": {**asdict(lora), "target_modules": targets if isinstance(targets, str) else list(targets)},
                "optimizer": asdict(optimizer),
                "seed": seed,
                "distillation": distillation and asdict(distillation),
                "offload": offload,
            }
        )
        self.optimizer_config = optimizer
        self.distillation = distillation
        self.teacher: Teacher | None = None
        self.recorded_in: Path | None = None
        self.after_clipping: list[Callable[[bool], None]] = []
        self._losses = LossWatch()
        self.measures = Measures()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """The module with a checkpoint's options, plan and adapters.

        Args:
            checkpoint_path: path of the checkpoint.
            args: further arguments of Lightning's method.
            kwargs: options in place of those in the checkpoint, and further arguments of Lightning's method.

        Raises:
            UserError: the file is damaged, or its adapters do not fit the base.
        """
        read_checkpoint(Path(checkpoint_path))
        with reading(Path(checkpoint_path), REMEDY):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def forward(self, batch: Batch) -> Tensor:  # [B, T, V]
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits: Tensor = output.logits
        return logits

    # The teacher.

    def check_base(self) -> Any:
        config = super().check_base()
        if self.distillation is not None:
            check_teacher(self.distillation, self.base, config, trust_remote_code=self.trust_remote_code)
        return config

    def load_base(self) -> None:
        """Loads the base if it is not loaded yet, and in a fit its teacher, before any callback changes the base."""
        super().load_base()
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.distillation is not None and self.teacher is None and fits:
            self.teacher = engage_teacher(self.distillation, self, self.trainer, self.recorded_in)

    @cached_property
    def _order_of_base(self) -> tuple[int, ...] | None:
        """The channels of the teacher that those of the base are, before callbacks change it; see `order_of_base`."""
        assert self.distillation is not None
        return order_of_base(self.distillation, self.base)

    def release(self) -> None:
        super().release()
        self.teacher = None

    def teardown(self, stage: str) -> None:
        if isinstance(self.teacher, Recording):  # of the rows of this fit
            self.teacher = None

    # Training.

    def check_split(self) -> None:
        super().check_split()
        if self.optimizer_config.name != "adamw":
            raise UserError(
                f"--model.optimizer.name is {self.optimizer_config.name}, whose state is packed for whole tensors, and "
                f"--trainer.strategy {FSDP2} splits them among devices, their state with them. Use adamw."
            )

    def on_train_start(self) -> None:
        self._losses = LossWatch()
        if self.teacher is not None:
            processes_of(self.trainer).of_each(self.teacher.begin)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(derive_seed(self.seed, "batch", self.current_epoch, batch_idx, self.global_rank))

    def token_nll(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each token of a batch, in nats; 0 for tokens that are not scored."""  # [B, T - 1]
        return token_nll(self.model, batch["input_ids"], batch["labels"], batch["attention_mask"])

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the scored tokens of a batch, in nats; 0 if there are none."""  # []
        return self.token_nll(batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)

    def distilled(self, batch: Batch, teacher: Teacher) -> Losses:
        """Losses of the scored tokens of a batch relative to labels and teacher."""
        assert self.distillation is not None
        lesson = teacher.lesson(batch)
        for order in (self._order_of_base, None if self.plan is None else self.plan.hidden):
            lesson = lesson if order is None else lesson.ordered(order)
        scored = Scored.of(self.model, batch["input_ids"], batch["labels"], batch["attention_mask"])
        return distillation_losses(self.distillation, Head.of(self.model), scored, lesson)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        num_tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        if self.teacher is None:
            mean = self.loss(batch)
            parts = {"loss": mean}
        else:
            losses = self.distilled(batch, self.teacher)
            mean = losses.total.sum() / num_tokens.clamp(min=1)
            parts = {name: part.sum() / num_tokens.clamp(min=1) for name, part in losses.parts.items()}
        self._losses.see(mean, self.global_step + 1)
        for name, part in parts.items():
            self.log(f"train/{name}", part, prog_bar=name == "loss", batch_size=len(batch["input_ids"]))
        # The Trainer averages over micro-batches, its strategy over ranks. A mean of means would give tokens of
        # micro-batches with few tokens more weight than others.
        loss: Tensor = mean * num_tokens / batch.get("step_tokens", num_tokens.clamp(min=1))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            self.check_losses()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_losses()

    def on_train_epoch_end(self) -> None:
        self.check_losses()
        self._check_trained({"adapters": self._trained_tensors()})
        has_stepped = any(optimizer.state for optimizer in self.trainer.optimizers)
        if self.global_step and self._scaler is not None and not has_stepped:
            raise self._not_finite(f"The gradients of all {self.global_step} optimizer steps so far are")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._trainer is not None:  # else it has trained nothing
            self.check_losses()
        self._check_trained(
            {"adapters": checkpoint["state_dict"], "state of the optimizer": checkpoint.get("optimizer_states")}
        )

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
        finite = all_finite(gradients)  # clipping by value hides it
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for observe in self.after_clipping:
            observe(finite)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = make_optimizer(self.optimizer_config, self.parameters())
        scheduler = make_scheduler(self.optimizer_config, optimizer, lambda: self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # What is not finite.

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self._overflow_told():
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self._overflow_told():
            super().optimizer_step(*args, **kwargs)

    @contextmanager
    def _overflow_told(self) -> Iterator[None]:
        """Translates torch's own errors about numbers that are not finite: those of anomaly detection and of AdamW."""
        try:
            yield
        except RuntimeError as error:
            if (said := OVERFLOW.search(str(error))) is None:
                raise
            step = f"optimizer step {self.global_step + 1}"
            what = f"gradients of {said['operation']} in" if said["operation"] else "size of the update of"
            verb = "are" if said["operation"] else "is"
            raise self._not_finite(f"The {what} {step} {verb}") from error

    def _not_finite(self, what: str) -> UserError:
        return not_finite(self.model, what, later_phase=self.continues_from is not None)

    def check_losses(self) -> None:
        """Checks the losses so far, waiting for them; to be called on all ranks together.

        Raises:
            UserError: a loss was not finite, or the loss scale shows that gradients never are.
        """
        strategy = self.trainer.strategy
        step = self._losses.first_broken(self.device, lambda number: strategy.reduce(number, reduce_op="min"))
        if step is not None:
            raise self._not_finite(f"The training loss of optimizer step {step} is")
        if self._scaler is not None and self._scaler.get_scale() < SMALLEST_SCALE:
            raise self._not_finite(
                f"By optimizer step {self.global_step} the loss scale of 16-mixed has fallen to "
                f"{self._scaler.get_scale():.0e}, since gradients are still",
            )

    def check_results(self, whose: str, results: Mapping[str, float]) -> None:
        """Makes sure that an evaluation in a fit measured a working model; a perplexity may overflow.

        Args:
            whose: what the results are of, as named in the message.
            results: results of the metrics, by name.

        Raises:
            UserError: loss or accuracy is not finite.
        """
        for name in ("loss", "accuracy"):
            if not math.isfinite(results.get(name, 0.0)):
                raise self._not_finite(f"The {name} of {whose} is {results[name]},")

    @property
    def _scaler(self) -> Any:
        """The scaler of the loss under ``16-mixed``, else None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _trained_tensors(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _check_trained(self, states: Mapping[str, Any]) -> None:
        for what, state in states.items():
            tensors = list(tensors_of(state))
            number = 0 if all_finite(tensors) else len(broken_names((what, tensor) for tensor in tensors))
            if self._trainer is not None and splits(self.trainer.strategy):  # broken values may be on one device only
                count = torch.tensor([number, len(tensors)], device=self.device)
                number, total = self.trainer.strategy.reduce(count, reduce_op="max").tolist()
            else:
                total = len(tensors)
            if number:
                raise self._not_finite(
                    f"After optimizer step {self.global_step}, {number} of {total} tensors of the {what} are",
                )

    # Evaluation.

    def validation_step(self, batch: Batch | ChoiceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measures.add(self.model, batch)

    def test_step(self, batch: Batch | ChoiceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measures.add(self.model, batch)

    def on_validation_epoch_start(self) -> None:
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        self._reset_metrics()

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Batch | ChoiceBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One record for each row of text (its loss), or for each question of a task (the scores of its options)."""
        if "options" in batch:
            return answers(batch, self.measures.option_log_likelihoods(self.model, batch))
        labels = batch["labels"]
        nll = self.token_nll(batch)
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        return [
            {"row": int(row), "tokens": int(count), "nll": float(total)}
            for row, count, total in zip(batch["example"], tokens, nll.double().sum(1), strict=True)
            if row >= 0
        ]

    def _reset_metrics(self) -> None:
        """Resets before an evaluation rather than after it, because the previous one may have been interrupted."""
        self.measures = Measures(self.device)

    def _log_evaluation(self, stage: str) -> None:
        results = self.measures.results()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_results(f"the validation split at optimizer step {self.global_step}", results)
        # The metrics are already reduced over all ranks; `sync_dist` only avoids a warning of Lightning's.
        self.log_dict({f"{stage}/{name}": value for name, value in results.items()}, sync_dist=True)
