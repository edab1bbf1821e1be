"""Decides in a fit which bits a budget buys, and leaves its findings in the run folder."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig, Method, affordable, decide, in_order
from qpruner.allocation.items import Item, items_of
from qpruner.allocation.marginal import marginal_rises
from qpruner.allocation.observation import layer_information
from qpruner.allocation.rises import first_order_rises, measured_rises
from qpruner.allocation.sensitivities import Marginals, Rises, Sensitivities
from qpruner.callbacks.calibration import calibration_of
from qpruner.callbacks.compression import CompressionJob, Rehearsal
from qpruner.errors import UserError
from qpruner.files import hash_json
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pricing import Price, price_narrowed
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import Bank, fill, fill_folder
from qpruner.quantization.calibrated_bank import BankText, TextRounding
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.records.folder import RunFolder

CALIBRATED = "MixedPrecisionQuantization.calibrated"
DECIDING = "MixedPrecisionQuantization.deciding.calibration"


@dataclass(frozen=True)
class Allocator:
    """Decides on the bits of a fit.

    Args:
        method: method that determines the costs.
        budget: limit on what is stored.
        config: how to decide.
        precisions: precisions to choose from.
        loftq_iterations: number of LoftQ iterations with which linears are quantized.
        calibrated: how the linears of the bank are rounded with calibration text; None to round to the nearest values.
        for_trials: whether plans are fitted with the linears of the bank and the initial adapters in it; otherwise a
            plan with calibrated rounding is rounded afresh once it is decided on, which also gives the initial
            adapters.

    Raises:
        UserError: method ``marginal`` with measure ``first_order``.
    """

    method: Method
    budget: Budget
    config: DecidingConfig
    precisions: Sequence[Precision]
    loftq_iterations: int
    calibrated: CalibratedConfig | None = None
    for_trials: bool = False

    def __post_init__(self) -> None:
        if self.method == "marginal" and self.config.measure == "first_order":
            raise UserError(
                "allocation is 'marginal' and deciding.measure is 'first_order', which estimates each item alone. Set "
                "deciding.measure to loss or kl, or allocation to sensitivity."
            )

    def check(self, rehearsal: Rehearsal, tables: Mapping[str, Precision]) -> None:
        """Checks, before any work, that the budget is large enough and that there are layers to decide on.

        Raises:
            UserError: it is not, or there are none; or the budget limits multiply-adds, which bits do not change.
        """
        if not rehearsal.decides_on_widths:
            self._check_multiply_adds()
        plan = rehearsal.plan
        self.items(plan)  # refuses layers that do not exist, whatever the widths
        if rehearsal.exact:
            plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers), **tables)
            self._affordable(rehearsal.model, plan, rehearsal.lora, rehearsal.least_rank)

    def affordable(
        self, job: CompressionJob, plan: CompressionPlan, least_rank: int | None = None
    ) -> tuple[int, Price, Price]:
        """The bytes that the budget leaves for the weights in the decoder linears, and the cheapest and dearest price.

        Args:
            job: job with the model, pruned and dense.
            plan: plan of the pruned model, with the precisions of embedding and head already set.
            least_rank: lowest rank that adapters may have, at which plans are priced; None where all have that of the
                job.

        Raises:
            UserError: the budget is below the cheapest plan.
        """
        return self._affordable(job.model.network, plan, job.lora, least_rank)

    def allocate(
        self, job: CompressionJob, plan: CompressionPlan, rank: int | None = None
    ) -> tuple[CompressionPlan, Bank | None]:
        """The plan that the budget buys, and the bank that sensitivities were measured with, if any.

        Args:
            job: job with the model, pruned and dense, and what may be used for it.
            plan: plan of the pruned model, with the precisions of embedding and head already set.
            rank: rank of the adapters that the budget pays for, where it is not that of the job; None if it is.

        Raises:
            UserError: the budget is below the cheapest plan or limits multiply-adds, or there is too little calibration
                text.
        """
        self._check_multiply_adds()
        items, network = self.items(plan), job.model.network
        self.affordable(job, plan, rank)  # checked before slow work
        sensitivities, bank = self.measure(job, plan)
        decided, allocation = decide(
            plan,
            items,
            self.precisions,
            self.budget,
            method=self.method,
            config=self.config,
            sensitivities=sensitivities,
            dense_size=network.dtype.itemsize,
            price_of=_price_of(network, job.lora, rank),
        )
        if allocation.above_dearest:
            rank_zero_warn(f"The budget of {self.budget} is above the dearest plan, which is taken.")
        rank_zero_info(str(allocation))
        if job.folder is not None and job.processes.is_first:
            allocation.write(job.folder.allocation)
        return decided, bank

    def measure(self, job: CompressionJob, plan: CompressionPlan) -> tuple[Sensitivities | None, Bank | None]:
        """The sensitivities behind the costs of the method, None for ``uniform``; and the bank used to measure them.

        Args:
            job: job with the model, pruned or not, and dense, and what may be used for it.
            plan: plan of the model, with the precisions of embedding and head already set.

        Raises:
            UserError: there is too little calibration text.
        """
        return self._sensitivities(job, plan, self.items(plan))

    def items(self, plan: CompressionPlan) -> list[Item]:
        """The items that each get a number of bits of their own.

        Raises:
            UserError: a layer that is to be left alone does not exist, or all layers are to be left alone.
        """
        return items_of(plan.architecture.num_layers, self.config.granularity, self.config.leave_alone)

    def _affordable(
        self, network: Any, plan: CompressionPlan, lora: LoRAConfig, least_rank: int | None
    ) -> tuple[int, Price, Price]:
        return affordable(
            plan,
            self.items(plan),
            self.precisions,
            self.budget,
            dense_size=network.dtype.itemsize,
            price_of=_price_of(network, lora, least_rank),
            least_rank=least_rank,
        )

    def _check_multiply_adds(self) -> None:
        """Makes sure that the budget asks for nothing that bits cannot provide.

        Raises:
            UserError: the budget limits multiply-adds.
        """
        if self.budget.multiply_adds is not None:
            raise UserError(
                f"budget.multiply_adds is {self.budget.multiply_adds:g}, and MixedPrecisionQuantization decides on "
                f"bits alone, which change no multiply-adds. Leave it out and prune with StructuredPruning, or have "
                f"`qpruner search` decide on the widths of layers, too, with --search.structure.least 0.5."
            )

    def _sensitivities(
        self, job: CompressionJob, plan: CompressionPlan, items: Sequence[Item]
    ) -> tuple[Sensitivities | None, Bank | None]:
        """The sensitivities that an earlier session of the run measured, or new ones; all ranks get those of rank 0."""
        if self.method == "uniform":
            return None, None
        job.keep()
        made_from = self._origin(job)
        processes, folder, network = job.processes, job.folder, job.model.network
        path = None if folder is None else folder.sensitivities
        stored = processes.of_first(lambda: Sensitivities.read(path) if path is not None and path.exists() else None)
        if stored is not None and hash_json(stored.made_from) == hash_json(made_from):
            rank_zero_info("The sensitivities that this run has found before are used again.")
            serves_the_plan = self.method != "mutual_information" and self.calibrated is None
            return stored, self.bank(job, plan) if serves_the_plan else None
        bank = None
        calibration = calibration_of(network, job.data, self.config.calibration, processes, DECIDING)
        if self.method == "mutual_information":
            information = layer_information(network, calibration, self.config.mutual_information)
            measured = Sensitivities(made_from, mutual_information=tuple(information))
        elif self.method == "marginal":
            bank = self.bank(job, plan)
            precisions = in_order(plan, items, self.precisions, network.dtype.itemsize)
            among = marginal_rises(
                network, bank, items, precisions, calibration, num_contexts=self.config.contexts, seed=job.seed
            )
            table = zip(items, *(values.tolist() for values in among), strict=True)
            marginals = tuple(Marginals(item, *map(tuple, row)) for item, *row in table)
            measured = Sensitivities(made_from, precisions=tuple(precisions), marginals=marginals)
            rank_zero_info(str(among))
        else:
            bank = self.bank(job, plan)
            precisions = [precision for precision in self.precisions if precision != DENSE]
            kl, loss = measured_rises(network, bank, items, precisions, calibration)
            first_order = first_order_rises(network, bank, items, precisions, calibration)
            rows = zip(items, kl.tolist(), loss.tolist(), first_order.tolist(), strict=True)
            rises = tuple(Rises(item, *map(tuple, row)) for item, *row in rows)
            measured = Sensitivities(made_from, precisions=tuple(precisions), rises=rises)
        measured = processes.broadcast(measured)
        if folder is not None and processes.is_first:
            measured.write(folder.sensitivities)
        return measured, bank

    def bank(self, job: CompressionJob, plan: CompressionPlan) -> Bank:
        """Every unit that is decided on, in every width; in the folder of the run if there is one.

        Raises:
            UserError: there is too little calibration text.
        """
        settings, network, processes = self._loftq(job), job.model.network, job.processes
        layers = sorted({item.layer for item in self.items(plan)})
        text = self._text(job)
        if job.folder is None:
            return fill(network, self.precisions, settings, layers=layers, device=processes.device, text=text)
        job.keep()
        return fill_folder(
            job.folder.bank,
            network,
            self.precisions,
            settings,
            base=job.model.identity,
            layers=layers,
            processes=processes,
            text=text,
        )

    def _loftq(self, job: CompressionJob) -> LoftQSettings | None:
        if self.calibrated is not None and not self.for_trials:
            return None
        return LoftQSettings.of(job.lora, self.loftq_iterations, job.seed)

    def rounding(self, job: CompressionJob) -> TextRounding | None:
        """How the linears of the bank are rounded with calibration text; None to round to the nearest values."""
        if self.calibrated is None:
            return None
        made_from = {
            "text_sha256": job.data and job.data.fingerprint()["train"]["sha256"],
            "text_seed": job.data and job.data.seed,
            "computed_in": job.processes.precision,
        }
        return TextRounding(self.calibrated, made_from)

    def _text(self, job: CompressionJob) -> BankText | None:
        """How the linears of the bank are rounded, together with the calibration text itself."""
        if (rounding := self.rounding(job)) is None:
            return None
        text = calibration_of(job.model.network, job.data, rounding.config.text, job.processes, CALIBRATED)
        return BankText(rounding.config, rounding.made_from, text)

    def _origin(self, job: CompressionJob) -> dict[str, Any]:
        """What sensitivities are measured on: the base, by the hash of the folder it is saved in, text, and options."""
        loftq = self._loftq(job)
        return {
            "method": self.method,
            "base": job.model.identity,
            "text_sha256": job.data and job.data.fingerprint()["train"]["sha256"],
            "text_seed": job.data and job.data.seed,
            "calibration": asdict(self.config.calibration),
            "mutual_information": asdict(self.config.mutual_information),
            **({"contexts": self.config.contexts} if self.method == "marginal" else {}),
            "granularity": self.config.granularity,
            "leave_alone": list(self.config.leave_alone),
            "precisions": [asdict(precision) for precision in self.precisions],
            "loftq": None if loftq is None else asdict(loftq),
            **self._rounding,
            "dtype": str(job.model.network.dtype),
            "computed_in": job.processes.precision,
            "seed": job.seed,
        }

    @property
    def _rounding(self) -> dict[str, Any]:
        """How the linears whose costs are measured are rounded; empty without any, or if to the nearest values."""
        if self.calibrated is None or self.method == "mutual_information":
            return {}
        return {"calibrated": asdict(self.calibrated)}


def _price_of(network: Any, lora: LoRAConfig, rank: int | None) -> Callable[[CompressionPlan], Price]:
    """What prices plans of a model with adapters of a rank; None for that of all adapters."""
    return partial(price_narrowed, network, rank=rank or lora.r, targets=lora.target_modules)


def drop_scaffolding(folder: RunFolder | None) -> None:
    """Removes intermediate results once the compressed base is saved: the bank and the layers rounded with text."""
    if folder is not None:
        for scaffolding in (folder.bank, folder.calibrated):
            shutil.rmtree(scaffolding, ignore_errors=True)
