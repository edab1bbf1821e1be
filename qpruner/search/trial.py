"""One trial: a plan is assembled from the bank, fitted for a few steps, and scored on the validation split."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.allocation.decision import with_choices
from qpruner.allocation.items import Item
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.splits import Split
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton
from qpruner.plan import CompressionPlan, Precision
from qpruner.pricing import price_narrowed
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import open_folder
from qpruner.search.ledger import Key, Scores
from qpruner.search.reference import Reference
from qpruner.training.evaluation import evaluate
from qpruner.training.finite import NotFinite
from qpruner.training.module import LoRAFinetuner


@dataclass(frozen=True)
class TrialTrainer:
    """How a trial trains and evaluates: what of the Trainer's options matters to it, as plain data.

    Args:
        accelerator: kind of the one device.
        precision: of computation.
        accumulate: batches to an optimizer step.
        clip: gradient norm or value; None for no clipping.
        clip_by: ``norm`` or ``value``.
        limit_validation: batches of the validation split, as a number or a share.
    """

    accelerator: str
    precision: Any
    accumulate: int
    clip: float | None
    clip_by: str | None
    limit_validation: int | float

    @classmethod
    def of(cls, trainer: Trainer) -> "TrialTrainer":
        return cls(
            accelerator=trainer.strategy.root_device.type,
            precision=trainer.precision,
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            clip_by=trainer.gradient_clip_algorithm,
            limit_validation=trainer.limit_val_batches,
        )

    def trainer(self, steps: int, max_seconds: float | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
        """A Trainer that leaves nothing behind."""
        return Trainer(
            accelerator=self.accelerator,
            devices=1,
            precision=self.precision,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=self.clip,
            gradient_clip_algorithm=self.clip_by,
            max_steps=steps,
            max_time=None if max_seconds is None else timedelta(seconds=max_seconds),
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
        )


@dataclass(frozen=True)
class TrialWork:
    """What a worker needs to run trials; plain data, a data module and paths, so that it can be sent to others.

    Args:
        base: folder of the pruned base.
        bank: folder of its bank.
        reference: file of the dense model's predictions.
        options: of the `LoRAFinetuner`.
        loftq_iterations: with which the bank was filled.
        data: of the search.
        items: that get widths.
        precisions: of each choice of an item.
        tables: precisions of embedding and head.
        trainer: how trials train.
        max_seconds: after which a fit ends, whatever its steps; None for steps alone.
        split: that scores; a search never changes it.
    """

    base: Path
    bank: Path
    reference: Path
    options: dict[str, Any]
    loftq_iterations: int
    data: TokenDataModule
    items: tuple[Item, ...]
    precisions: tuple[Precision, ...]
    tables: dict[str, Precision]
    trainer: TrialTrainer
    max_seconds: float | None = None
    split: Split = "validation"

    def prepare(self) -> "TrialRunner":
        return TrialRunner(self)


class TrialRunner:
    """Runs trials one after the other on one device; the base is loaded once.

    Args:
        work: what to run them on.
    """

    def __init__(self, work: TrialWork) -> None:
        self.work = work
        self.compressed = CompressedModel.open(work.base, check_hashes=False)
        network, plan = self.compressed.network, self.compressed.known_plan()
        self.plan = plan.with_precision([layer.precision for layer in plan.layers], **work.tables)
        self.skeleton = build_skeleton(network.config).to(network.dtype)  # stays dense
        module = LoRAFinetuner(**work.options)
        # The bank has the search's seed.
        self.loftq = LoftQSettings.of(module.lora, work.loftq_iterations, module.seed)
        self.bank = open_folder(work.bank, network, self.loftq, base=self.compressed.identity)
        self.reference = Reference.read(work.reference)

    def __call__(self, key: Key) -> Scores:
        """Evaluates one plan.

        Args:
            key: ``choices`` (for each item, the place of its precision), ``steps`` and ``seed``.

        Returns:
            loss, perplexity and kl (to the dense model) in nats per token, accuracy where there is a choice task,
            bytes, average_bits, steps, and the seconds of assembling, training, evaluating, and of all together.
        """
        module = self._module(key["seed"])
        module.hold(self.compressed)
        try:
            return self._evaluate(module, key)
        finally:  # also after an error, such as one of memory, the next trial finds the base without adapters
            module.to("cpu")
            if self.compressed.state is State.ADAPTED:
                self.compressed.detach()

    def _evaluate(self, module: LoRAFinetuner, key: Key) -> Scores:
        work, since = self.work, time.perf_counter()
        plan = self.plan_of(key["choices"])
        self.compressed.quantize(plan, self.loftq, device=torch.device("cpu"), bank=self.bank)
        price = price_narrowed(self.skeleton, plan, rank=module.lora.r, targets=module.lora.target_modules)
        assembled = time.perf_counter()
        work.data.seed = key["seed"]
        training = TrainingTime()
        with quiet():
            trainer = work.trainer.trainer(key["steps"], work.max_seconds, [training])
            try:
                trainer.fit(module, datamodule=work.data)
            except NotFinite as error:  # no run that could begin anew
                raise UserError(f"{error.problem}. {error.remedy}.") from error
        fitted = time.perf_counter()
        device = trainer.strategy.root_device
        results = evaluate(
            module,
            work.data.evaluation_loaders(work.split),
            limit=work.trainer.limit_validation,
            device=device,
            precision=trainer.precision_plugin,
            title="",
            progress=False,
        )
        scores: Scores = {name: results[name] for name in ("loss", "perplexity", "accuracy") if name in results}
        scores["kl"] = self.reference.kl(module, device, trainer.precision_plugin)
        ended = time.perf_counter()
        seconds = {
            "assemble": assembled - since,
            "train": training.seconds,
            "evaluate": ended - fitted,
            "all": ended - since,
        }
        return {
            **scores,
            "bytes": price.total,
            "average_bits": price.average_bits,
            "steps": trainer.global_step,
            "seconds": seconds,
        }

    def plan_of(self, choices: Sequence[int]) -> CompressionPlan:
        return with_choices(self.plan, self.work.items, [self.work.precisions[choice] for choice in choices])

    def _module(self, seed: int) -> LoRAFinetuner:
        return LoRAFinetuner(**{**self.work.options, "seed": seed})


class TrainingTime(Callback):
    """Seconds between the first batch of a fit and its end."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._since


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says at the start and the end of each fit; warnings are still heard."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
