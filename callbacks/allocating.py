"""Decides in a fit which bits a budget buys, and leaves what it found in the run folder."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig, Method, affordable, decide
from qpruner.allocation.items import Item, items_of
from qpruner.allocation.observation import layer_information
from qpruner.allocation.sensitivities import Rises, Sensitivities
from qpruner.allocation.sensitivity import first_order_rises, measured_rises
from qpruner.callbacks.calibration import calibration_of
from qpruner.callbacks.compression import Rehearsal
from qpruner.callbacks.processes import processes_of
from qpruner.datamodules.base import TokenDataModule
from qpruner.files import hash_json
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pricing import Price, price_narrowed
from qpruner.quantization.bank import Bank, fill, fill_folder
from qpruner.runs.folder import RunFolder
from qpruner.training.module import LoRAFinetuner


@dataclass(frozen=True)
class Allocator:
    """Decides on the bits of a fit.

    Args:
        method: what makes the costs.
        budget: what may be stored.
        config: how to decide.
        precisions: to choose from.
        loftq_iterations: with which linears are quantized.
    """

    method: Method
    budget: Budget
    config: DecidingConfig
    precisions: Sequence[Precision]
    loftq_iterations: int

    def check(self, rehearsal: Rehearsal, tables: Mapping[str, Precision]) -> None:
        """Finds, before any work, that the budget is too small or that no layers are left to decide on.

        Raises:
            UserError: it is, or there are none.
        """
        plan = rehearsal.plan
        items = self._items(plan)
        if rehearsal.exact:
            plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers), **tables)
            targets = rehearsal.lora.target_modules

            def price_of(plan: CompressionPlan) -> Price:
                return price_narrowed(rehearsal.model, plan, rank=rehearsal.lora.r, targets=targets)

            dense_size = rehearsal.model.dtype.itemsize
            affordable(plan, items, self.precisions, self.budget, dense_size=dense_size, price_of=price_of)

    def allocate(
        self, trainer: Trainer, module: LoRAFinetuner, plan: CompressionPlan, folder: RunFolder | None
    ) -> tuple[CompressionPlan, Bank | None]:
        """The plan that the budget buys, and the bank that sensitivities were measured with, if any.

        Args:
            trainer: of the fit.
            module: with its base pruned and dense.
            plan: of the base; its tables have their precision.
            folder: of the run, for what is found.

        Raises:
            UserError: the budget is below the cheapest plan, or too little calibration text.
        """
        items = self._items(plan)
        targets = module.lora.target_modules

        def price_of(plan: CompressionPlan) -> Price:
            return price_narrowed(module.model, plan, rank=module.lora.r, targets=targets)

        dense_size = module.model.dtype.itemsize
        affordable(plan, items, self.precisions, self.budget, dense_size=dense_size, price_of=price_of)
        sensitivities, bank = self._sensitivities(trainer, module, plan, items, folder)
        decided, allocation = decide(
            plan,
            items,
            self.precisions,
            self.budget,
            method=self.method,
            config=self.config,
            sensitivities=sensitivities,
            dense_size=dense_size,
            price_of=price_of,
        )
        if allocation.above_dearest:
            rank_zero_warn(f"The budget of {self.budget} is above the dearest plan, which is taken.")
        rank_zero_info(str(allocation))
        if folder is not None and trainer.is_global_zero:
            allocation.write(folder.allocation)
        return decided, bank

    def _items(self, plan: CompressionPlan) -> list[Item]:
        return items_of(plan.architecture.num_layers, self.config.granularity, self.config.leave_alone)

    def _sensitivities(
        self,
        trainer: Trainer,
        module: LoRAFinetuner,
        plan: CompressionPlan,
        items: Sequence[Item],
        folder: RunFolder | None,
    ) -> tuple[Sensitivities | None, Bank | None]:
        """Those that an earlier session of the run has found, else new ones; what rank zero has, on all ranks."""
        if self.method == "uniform":
            return None, None
        made_from = self._origin(trainer, module, plan)
        stored = None
        if folder is not None and trainer.is_global_zero and folder.sensitivities.exists():
            stored = Sensitivities.read(folder.sensitivities)
        stored = trainer.strategy.broadcast(stored)
        if stored is not None and hash_json(stored.made_from) == hash_json(made_from):
            rank_zero_info("The sensitivities that this run has found before are used again.")
            return stored, self.bank(trainer, module, plan, folder) if self.method == "sensitivity" else None
        bank = None
        data = trainer.datamodule  # type: ignore[attr-defined]
        calibration = calibration_of(
            module.model, data, self.config.calibration, processes_of(trainer), f"allocation: {self.method}"
        )
        if self.method == "mutual_information":
            information = layer_information(module.model, calibration, self.config.mutual_information)
            found = Sensitivities(made_from, mutual_information=tuple(information))
        else:
            bank = self.bank(trainer, module, plan, folder)
            precisions = [precision for precision in self.precisions if precision != DENSE]
            kl, loss = measured_rises(module.model, bank, items, precisions, calibration)
            first_order = first_order_rises(module.model, bank, items, precisions, calibration)
            rows = zip(items, kl.tolist(), loss.tolist(), first_order.tolist(), strict=True)
            rises = tuple(Rises(item, *map(tuple, row)) for item, *row in rows)
            found = Sensitivities(made_from, precisions=tuple(precisions), rises=rises)
        found = trainer.strategy.broadcast(found)
        if folder is not None and trainer.is_global_zero:
            found.write(folder.sensitivities)
        return found, bank

    def bank(self, trainer: Trainer, module: LoRAFinetuner, plan: CompressionPlan, folder: RunFolder | None) -> Bank:
        """Every unit that is decided on, in every width; in the folder of the run if there is one."""
        settings, device = module.loftq_settings(self.loftq_iterations), trainer.strategy.root_device
        layers = sorted({item.layer for item in self._items(plan)})
        if folder is None:
            return fill(module.model, self.precisions, settings, layers=layers, device=device)
        return fill_folder(
            folder.bank,
            module.model,
            self.precisions,
            settings,
            plan=plan,
            layers=layers,
            device=device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
        )

    def _origin(self, trainer: Trainer, module: LoRAFinetuner, plan: CompressionPlan) -> dict[str, Any]:
        """What sensitivities are found from."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loftq = module.loftq_settings(self.loftq_iterations)
        kept = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers)).to_json()
        return {
            "method": self.method,
            "plan_sha256": hashlib.sha256(kept.encode()).hexdigest(),
            "text_sha256": data.fingerprint()["train"]["sha256"] if isinstance(data, TokenDataModule) else None,
            "text_seed": data.seed if isinstance(data, TokenDataModule) else None,
            "calibration": asdict(self.config.calibration),
            "mutual_information": asdict(self.config.mutual_information),
            "granularity": self.config.granularity,
            "leave_alone": list(self.config.leave_alone),
            "precisions": [asdict(precision) for precision in self.precisions],
            "loftq": None if loftq is None else asdict(loftq),
            "dtype": str(module.model.dtype),
            "computed_in": str(trainer.precision),
            "seed": module.seed,
        }


def drop_bank(folder: RunFolder | None) -> None:
    """Removes the bank of a run whose compressed base is kept: it is of no more use."""
    if folder is not None and folder.bank.exists():
        shutil.rmtree(folder.bank, ignore_errors=True)
