"""One trial: a plan is assembled from the bank, fine-tuned for a few steps, and scored on the validation split."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.allocation.items import Item
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.splits import Split
from qpruner.errors import UserError
from qpruner.memory import freeing_cycles
from qpruner.plan import CompressionPlan, Precision
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import open_folder
from qpruner.quantization.calibrated_bank import TextRounding
from qpruner.search.assembly import Assembly
from qpruner.search.candidates import Candidates, Ranking
from qpruner.search.ledger import Key, Scores
from qpruner.search.parts import price_of_plan
from qpruner.search.ranks import Ranks
from qpruner.search.reference import Reference
from qpruner.search.trial_trainer import TrialTrainer
from qpruner.training.evaluation import evaluate
from qpruner.training.finite import NotFinite
from qpruner.training.module import LoRAFinetuner
from qpruner.training.processes import processes_of
from qpruner.training.teacher import OnlineTeacher


@dataclass(frozen=True)
class TrialWork:
    """What a worker needs to run trials; plain data, a data module and paths, so that it can be sent to others.

    Args:
        base: folder that holds the pruned base.
        bank: folder of the bank of the pruned base.
        reference: file of the dense model's predictions.
        options: arguments of the `LoRAFinetuner`.
        loftq_iterations: number of LoftQ iterations with which the bank was filled.
        data: text to fit on and to score with.
        items: items that get widths.
        precisions: precision that each choice of an item stands for.
        tables: precisions of embedding and head.
        trainer: how trials train.
        max_seconds: seconds after which the fit of a trial ends, whatever its steps; None for steps alone.
        recorded_in: folder of a teacher's recorded outputs on training rows, where trials learn from a teacher.
        ranking: which units stay, where widths are searched; None where the units of the base stay.
        ranks: ranks that adapters may have, where these are searched; None where they are not.
        rounding: how the linears of the bank were rounded using text; None where each weight was rounded to the nearest
            value.
        sums: folder of the sums of the dense model, with which trials account for removed units; None where they do
            without.
        compensates: whether the remaining weights compensate for removed units.
        split: split that trials are scored on; a search never changes it.
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
    recorded_in: Path | None = None
    ranking: Ranking | None = None
    ranks: Ranks | None = None
    rounding: TextRounding | None = None
    sums: Path | None = None
    compensates: bool = False
    split: Split = "validation"

    def prepare(self) -> "TrialRunner":
        return TrialRunner(self)


class TrialRunner:
    """Runs trials one after the other on one device; base, data and an online teacher are loaded once.

    Args:
        work: what trials need; it is not changed.
    """

    def __init__(self, work: TrialWork) -> None:
        self.work = work
        self.base = CompressedModel.open(work.base, check_hashes=False)
        network, plan = self.base.network, self.base.known_plan()
        self.plan = plan.with_precision([layer.precision for layer in plan.layers], **work.tables)
        self.candidates = Candidates(self.plan, work.items, work.precisions, work.ranking, work.ranks)
        self.config, self.dtype = network.config, network.dtype
        module = LoRAFinetuner(**work.options)  # with the seed of the search, which the bank was filled with, too
        self.loftq = LoftQSettings.of(module.lora, work.loftq_iterations, module.seed)
        self.bank = open_folder(work.bank, network, self.loftq, base=self.base.identity, text=work.rounding)
        self.reference = Reference.read(work.reference)
        self.data = work.data.for_another_trainer()
        self.data.check_model(network.config)
        self.data.choices(work.split)  # loads, together with the rows, what all trials share
        self.teacher: OnlineTeacher | None = None
        # Where widths are searched, each trial has its own model; otherwise all share one, whose linears change.
        self.assembly = None
        if work.ranking is not None:
            self.assembly = Assembly(
                self.base,
                self.plan,
                self.bank,
                self.loftq,
                work.sums,
                compensates=work.compensates,
                by_text=None if work.rounding is None else work.rounding.config,
            )

    def __call__(self, key: Key) -> Scores:
        """Evaluates one plan.

        Args:
            key: ``choices`` (for each item, the index of its precision), ``steps`` and ``seed``; where widths are
                searched, also ``units``: how many units of each part stay; where ranks are searched, also ``ranks``.

        Returns:
            Loss and kl (to the dense model) in nats per token, perplexity, accuracy where there is a choice task,
            bytes, average_bits, multiply_adds, steps, and the seconds spent on assembling, training, evaluating, and in
            total.
        """
        with freeing_cycles():
            return self._fitted(key)

    def _fitted(self, key: Key) -> Scores:
        since = time.perf_counter()
        plan = self.plan_of(key)
        model = self._assembled(plan)
        module = LoRAFinetuner(**{**self.work.options, "seed": key["seed"]}).hold(model)
        module.teacher, module.recorded_in = self.teacher, self.work.recorded_in
        try:
            return self._evaluate(module, plan, key, since)
        finally:  # after an error, such as out of memory, the next trial must also find the base without adapters
            module.to("cpu")
            if isinstance(module.teacher, OnlineTeacher):
                self.teacher = module.teacher
            if model.state is State.ADAPTED:
                model.detach()

    def plan_of(self, key: Key) -> CompressionPlan:
        return self.candidates.plan(key)

    def _assembled(self, plan: CompressionPlan) -> CompressedModel:
        """The model of a plan, without adapters."""
        if self.assembly is not None:
            return self.assembly(plan)
        self.base.quantize(plan, self.loftq, device=torch.device("cpu"), bank=self.bank)
        return self.base

    def _evaluate(self, module: LoRAFinetuner, plan: CompressionPlan, key: Key, since: float) -> Scores:
        work, assembled = self.work, time.perf_counter()
        price = price_of_plan(self.config, self.dtype, plan, module.lora)
        data = self.data.for_another_trainer(seed=key["seed"])
        training = TrainingTime()
        with quiet():
            trainer = work.trainer.trainer(key["steps"], work.max_seconds, [training])
            try:
                trainer.fit(module, datamodule=data)
            except NotFinite as error:  # there is no run here that could begin anew
                raise UserError(f"{error.problem}. {error.remedy}.") from error
        fitted = time.perf_counter()
        processes = processes_of(trainer)
        results = evaluate(
            module.model,
            data.evaluation_loaders(work.split),
            limit=work.trainer.limit_validation,
            device=processes.device,
            precision=trainer.precision_plugin,
            title="",
            progress=False,
        )
        scores: Scores = {name: value for name, value in results.items() if name not in ("tokens", "bits_per_byte")}
        scores["kl"] = self.reference.kl(module.compressed.network, processes)
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
            "multiply_adds": price.multiply_adds,
            "steps": trainer.global_step,
            "seconds": seconds,
        }


class TrainingTime(Callback):
    """Measures the seconds between the first batch of a fit and its end."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._since


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's messages at the start and the end of each fit; warnings are still shown."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
