"""What a search needs before its first trial, by the callbacks of a fit: pruned base, sensitivities and bank."""

from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.allocation.decision import Method
from qpruner.callbacks.allocating import Allocator
from qpruner.callbacks.compression import CompressionInSetup, CompressionJob, Rehearsal
from qpruner.callbacks.quantization import MixedPrecisionQuantization
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS
from qpruner.runs.folder import RunFolder
from qpruner.search.reference import Reference
from qpruner.training.module import LoRAFinetuner


class DenseReference(Callback):
    """Keeps what the dense model predicts, before other callbacks change it.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LoRAFinetuner)
        pl_module.load_base()
        if not self.folder.reference.exists():
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            device = trainer.strategy.root_device
            Reference.of(pl_module, data, device, trainer.precision_plugin).write(self.folder.reference)


class SearchPreparation(CompressionInSetup):
    """Stands in the place of `MixedPrecisionQuantization` and leaves the base dense, with what a search starts from.

    Args:
        quantization: that it stands for; it has a budget.

    Raises:
        UserError: it has none.
    """

    leaves = State.QUANTIZED

    def __init__(self, quantization: MixedPrecisionQuantization) -> None:
        if quantization.allocator is None:
            raise UserError(
                "A search spends a budget, and MixedPrecisionQuantization has none. Give it one, such as "
                "budget: {average_bits: 6}."
            )
        self.quantization = quantization
        self.allocator: Allocator = quantization.allocator
        self.folder = quantization.folder

    @property
    def options(self) -> dict[str, Any]:
        return self.quantization.options

    def check(self, rehearsal: Rehearsal) -> None:
        self.quantization.check(rehearsal)

    def check_text(self, data: TokenDataModule) -> None:
        config = self.allocator.config  # mutual information is found whatever the method
        config.mutual_information.check_samples(config.calibration.num_sequences * config.calibration.length)
        data.calibration(config.calibration.num_sequences, config.calibration.length)

    def is_done(self, model: CompressedModel) -> bool:
        return False

    def compress(self, job: CompressionJob) -> None:
        assert self.folder is not None
        plan = job.model.known_plan()
        plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers), **self.quantization.tables)
        if job.keep_in is not None:  # trials start from there, also where nothing was pruned
            job.model.keep(job.keep_in, tokenizer=getattr(job.data, "tokenizer", None))
        for method in dict.fromkeys(("uniform", "mutual_information", self.allocator.method)):
            place = part_of(self.folder, method)
            place.path.mkdir(parents=True, exist_ok=True)
            allocator = replace(self.allocator, method=method)
            allocator.allocate(replace(job, folder=place), plan)
        self.allocator.bank(replace(job, folder=part_of(self.folder, self.allocator.method)), plan)


def part_of(folder: RunFolder, method: Method) -> RunFolder:
    """Where a search keeps what one method of allocation found."""
    return RunFolder(folder.prior / method)
