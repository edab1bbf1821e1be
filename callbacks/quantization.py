"""Quantizes the base before the fit that recovers it, and starts the adapters from the rounding error."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any, Self

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qpruner.adapters.lora import ALL_LINEAR
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig, Method
from qpruner.anatomy import architecture_of, refuse_experts
from qpruner.callbacks.bits_under_budget import CALIBRATED, DECIDING, Allocator, drop_scaffolding
from qpruner.callbacks.calibration import calibration_of, text_of
from qpruner.callbacks.compression import CompressionInSetup, CompressionJob, Rehearsal
from qpruner.compressed import State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import tensor_bytes
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.quantization.apply import LoftQSettings, check_rank, linear_precisions, starts_of
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.calibrated_layers import CalibratedLayers
from qpruner.quantization.embedding import table_precisions
from qpruner.quantization.formats import DEFAULTS, FORMATS, GridFormat, format_for, precision_of
from qpruner.quantization.pooled import check_poolable

Bits = int | Sequence[int] | Mapping[str, int] | Sequence[Mapping[str, int]]


class MixedPrecisionQuantization(CompressionInSetup):
    """Quantizes each unit of the base to its number of bits, and initialises the adapters by LoftQ (arXiv 2310.08659).

    1, 2, 3, 4, 5, 6, 8 and 16 bits are available. 4 bits are NF4 in blocks that share a scale, 8 bits are integers with
    one scale per row, and 16 bits leave a unit as it is; the others are uniformly spaced values, with a scale and a
    minimum for each group of weights (``affine-double``). Units are the linears that serving engines fuse: ``qkv``,
    ``o``, ``gate_up``, ``down``. The embedding and the head stay as they are by default; LoftQ does not act on them.
    The callback comes after the one that prunes.

    ```yaml
    trainer:
      callbacks:
        - class_path: StructuredPruning
          init_args: {ratio: 0.2}
        - class_path: MixedPrecisionQuantization
          init_args: {allocation: mutual_information, budget: {average_bits: 6}}
    ```

    setup
        Decides on the bits if there is a budget, quantizes the base and stores the initial values of the adapters. This
        happens once: a base loaded quantized from the folder it was saved in stays as it is.
    on_fit_start
        Removes the bank that sensitivities were measured with and the layers that were rounded with calibration text;
        the quantized base has been saved by now.

    Args:
        bits: one number for all units; or a number for each layer; or one for each unit, as a mapping; or such a
            mapping for each layer. Default 4. Only without a budget.
        formats: number formats by their bits, such as ``{4: affine}``, to use instead of the default ones: ``nf4``,
            ``fp4`` (4 bits), ``int8`` (8 bits), ``affine`` (1 to 6 and 8 bits), ``symmetric`` (2 to 6 and 8 bits); the
            suffix ``-double`` on a name other than ``int8`` quantizes the scales, too.
        group: number of weights that share a scale: 32, 64 or 128; for ``nf4`` and ``fp4`` in 4 bits up to 1024; for
            ``affine`` and ``symmetric`` also -1, a whole row. ``int8`` always has one scale per row.
        loftq_iterations: number of alternating steps of LoftQ, at least 0; with 0 the adapters start from zero, as in
            plain LoRA. With ``calibrated``, whose ``adapters`` says how they start, only whether this is 0 matters.
        embedding: bits per weight of the token embedding.
        head: bits per weight of the language-model head; those of the embedding if the two are tied.
        allocation: how bits are allocated under a budget: ``uniform``, all units get the largest width that the budget
            allows for all; ``mutual_information``, by how much a layer's output tells about the prediction (QPruner,
            arXiv 2412.11629); ``sensitivity``, by the cost of quantizing each layer alone; ``marginal``, by the average
            of this cost while the others have random bits, too.
        budget: limit on what is stored; if given, the bits are decided here.
        deciding: how bits are decided under a budget.
        calibrated: how weights are rounded with calibration text, in formats that have a grid, which 4 bits then use by
            default; if omitted, each weight is rounded to its nearest value. ``sensitivity`` and ``marginal`` then
            measure the cost of linears rounded in this way, too, and the trials of a search use such linears.

    Raises:
        UserError: bits, formats or groups that are not available, bits together with a budget or an allocation without
            one, different bits for a tied embedding and head, a list whose length is not the number of layers, a budget
            below the cheapest plan, calibrated rounding without any format that has a grid, too little calibration
            text, a callback that prunes after this one, or a LoRA rank above that of a linear.
    """

    leaves = State.QUANTIZED

    def __init__(
        self,
        bits: Bits | None = None,
        formats: Mapping[int, str] | None = None,
        group: int = 64,
        loftq_iterations: int = 1,
        embedding: int = 16,
        head: int = 16,
        allocation: Method = "uniform",
        budget: Budget | None = None,
        deciding: DecidingConfig = DecidingConfig(),  # noqa: B008  # frozen
        calibrated: CalibratedConfig | None = None,
    ) -> None:
        # NF4 has no grid that calibrated rounding could use.
        self.formats = ({} if calibrated is None else {4: "affine-double"}) | dict(formats or {})
        self.group = group
        for width in self.formats:
            if width not in DEFAULTS:
                raise UserError(f"formats names one for {width} bits; there are {', '.join(map(str, DEFAULTS))}.")
            self._offered("formats", width)
        if loftq_iterations < 0:
            raise UserError(f"loftq_iterations is {loftq_iterations}; it is at least 0, which leaves LoftQ out.")
        if budget is not None and bits is not None:
            raise UserError(
                f"bits is {bits!r} and budget is {budget}; the budget decides on the bits. Give one of the two."
            )
        if budget is None and allocation != "uniform":
            raise UserError(
                f"allocation is {allocation!r} and there is no budget; give one, such as {{average_bits: 6}}."
            )
        if allocation != "uniform" and len(deciding.widths) < 2:
            raise UserError(
                f"allocation is {allocation!r} and deciding.widths is {list(deciding.widths)}; there is nothing to "
                f"decide. Name at least two, or give bits."
            )
        fewest = 4 if budget is None else min(deciding.widths)
        self.bits: Bits = fewest if bits is None else bits
        self.loftq_iterations = loftq_iterations
        self.calibrated = calibrated
        self.embedding, self.head = embedding, head
        self.plan: CompressionPlan | None = None
        self._offered("embedding", embedding)
        self._offered("head", head)
        precisions = [] if budget is None else [self._offered("deciding.widths", width) for width in deciding.widths]
        for entry in self.bits if isinstance(self.bits, Sequence) else (self.bits,):
            self._units(entry)
        if group not in (groups := sorted({size for one in FORMATS for size in one.groups if size is not None})):
            raise UserError(f"group is {group}; number formats offer {', '.join(map(str, groups))} (-1: a whole row).")
        self.allocator = (
            None
            if budget is None
            else Allocator(allocation, budget, deciding, precisions, loftq_iterations, calibrated)
        )

    @classmethod
    def of_plan(cls, plan: CompressionPlan, configured: "MixedPrecisionQuantization | None") -> Self:
        """Quantizes to the precisions of a plan, with the LoftQ and calibration options configured, if any."""
        callback = cls()
        if configured is not None:
            callback = cls(loftq_iterations=configured.loftq_iterations, calibrated=configured.calibrated)
        callback.plan = plan
        return callback

    def check(self, rehearsal: Rehearsal) -> None:
        """Checks, before any work, that the options can be satisfied.

        Raises:
            UserError: a list of bits whose length is not the number of layers, different bits for a tied embedding and
                head, a budget below the cheapest plan, a LoRA rank above that of a linear, a precision of a plan that
                no format offers, or calibrated rounding without a format that has a grid or with less text than the
                widest linear needs.
        """
        config = rehearsal.model.config
        table_precisions(config, **self.tables)
        plan = rehearsal.plan.with_precision(self.precision(architecture_of(config).num_layers), **self.tables)
        units = [precision for layer in plan.layers for precision in layer.precision.values()]
        for precision in {*units, *self.tables.values()} - {DENSE}:
            format_for(precision)
        rehearsal.precisions = frozenset(units if self.allocator is None else self.allocator.precisions)
        if rehearsal.lora.pooled:
            everywhere = rehearsal.lora.target_modules == ALL_LINEAR
            for precision in rehearsal.precisions if everywhere else rehearsal.precisions - {DENSE}:
                check_poolable("A linear with an adapter", precision)
        if self.allocator is not None:
            self.allocator.check(rehearsal, self.tables)
        elif rehearsal.exact:
            settings = LoftQSettings.of(rehearsal.lora, self.loftq_iterations, seed=0)  # nothing is drawn
            check_rank(rehearsal.model, starts_of(rehearsal.model, plan, settings))
        if self.calibrated is not None:
            refuse_experts(rehearsal.model.config, CALIBRATED, "the nearest values: leave calibrated out")
            if self.plan is None:  # a plan names its formats itself, and only some have a grid
                _check_grids({*units} if self.allocator is None else {*self.allocator.precisions})
            self.calibrated.check_text(_widest_input(rehearsal.model, plan))

    def check_text(self, data: TokenDataModule) -> None:
        if self.calibrated is not None:
            text_of(data, self.calibrated.text, CALIBRATED)
        if self.allocator is not None and self.allocator.method != "uniform":
            calibration = self.allocator.config.calibration
            if self.allocator.method == "mutual_information":
                self.allocator.config.mutual_information.check_samples(calibration.num_sequences * calibration.length)
            text_of(data, calibration, DECIDING)

    def precision(self, num_layers: int) -> list[dict[str, Precision]]:
        """The precision of each unit of each layer.

        Raises:
            UserError: the list of bits is for another number of layers.
        """
        if self.plan is not None:
            return [dict(layer.precision) for layer in self.plan.layers]
        if not isinstance(self.bits, Sequence):
            return [self._units(self.bits)] * num_layers
        if len(self.bits) != num_layers:
            raise UserError(f"bits has {len(self.bits)} entries; the model has {num_layers} layers.")
        return [self._units(entry) for entry in self.bits]

    def _units(self, entry: int | Mapping[str, int]) -> dict[str, Precision]:
        """The precision of each unit of one layer."""
        bits = dict.fromkeys(UNITS, entry) if isinstance(entry, int) else dict(entry)
        if bits.keys() != set(UNITS):
            raise UserError(f"bits names {', '.join(bits)}; it must name each unit of a layer: {', '.join(UNITS)}.")
        return {unit: self._offered("bits", value) for unit, value in bits.items()}

    def _offered(self, option: str, bits: int) -> Precision:
        """The precision of a number of bits."""
        if bits == DENSE.bits:
            return DENSE
        if bits not in DEFAULTS:
            offered = ", ".join(map(str, (*DEFAULTS, DENSE.bits)))
            raise UserError(f"{option} asks for {bits}; choose from {offered}.")
        return precision_of(bits, self.group, self.formats)

    @property
    def tables(self) -> dict[str, Precision]:
        """The precisions of the embedding and the head, by the names ``embedding`` and ``head``."""
        if self.plan is not None:
            return {"embedding": self.plan.embedding, "head": self.plan.head}
        return {name: self._offered(name, getattr(self, name)) for name in ("embedding", "head")}

    @property
    def start_of_adapters(self) -> str:
        """What adapters start from, if not from zero."""
        return "LoftQ" if self.calibrated is None else "adapters"

    @property
    def options(self) -> dict[str, Any]:
        calibrated = {} if self.calibrated is None else {"calibrated": asdict(self.calibrated)}
        if self.plan is not None:
            return {"bits": "as the plan says", "loftq_iterations": self.loftq_iterations, **calibrated}
        if self.allocator is None:
            bits: dict[str, Any] = {"bits": list(self.bits) if isinstance(self.bits, Sequence) else self.bits}
        else:
            allocator = self.allocator
            bits = {
                "allocation": allocator.method,
                "budget": str(allocator.budget),
                "deciding": asdict(allocator.config),
            }
        return {
            **bits,
            "embedding": self.embedding,
            "head": self.head,
            "formats": self.formats,
            "group": self.group,
            "loftq_iterations": self.loftq_iterations,
            **calibrated,
        }

    @property
    def shares_work(self) -> bool:
        return self.calibrated is not None or (self.allocator is not None and self.allocator.method != "uniform")

    def compress(self, job: CompressionJob) -> None:
        model, device = job.model, job.processes.device
        plan, bank = model.known_plan(), None
        before = tensor_bytes(model.network)
        if self.allocator is None:
            plan = plan.with_precision(self.precision(plan.architecture.num_layers), **self.tables)
        else:
            plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers), **self.tables)
            plan, bank = self.allocator.allocate(job, plan)
        loftq = LoftQSettings.of(job.lora, self.loftq_iterations, job.seed)
        if self.calibrated is None:
            model.quantize(plan, loftq, device=device, bank=bank)
        else:
            self._quantize_by_text(job, plan, self.calibrated, loftq)
        alone = ["norms", *(name for name, precision in self.tables.items() if precision == DENSE)]
        if any(DENSE in layer.precision.values() for layer in plan.layers):
            alone.append("units of 16 bits")
        rank_zero_info(
            f"Quantized {before:,} to {tensor_bytes(model.network):,} bytes, {model.average_bits:.2f} bits per weight "
            f"of the decoder linears with scales. Left alone: {', '.join(alone)}."
        )

    def _quantize_by_text(
        self, job: CompressionJob, plan: CompressionPlan, config: CalibratedConfig, adapters: LoftQSettings | None
    ) -> None:
        network = job.model.network
        config.check_text(_widest_input(network, plan))
        job.keep()  # the rounded layers name the base that they are made from
        calibration = calibration_of(network, job.data, config.text, job.processes, CALIBRATED)
        made_from = {
            "base": job.model.identity,
            "plan": plan.to_json(),
            "options": asdict(config),
            "adapters": None if adapters is None else asdict(adapters),
            "text_sha256": job.data and job.data.fingerprint()["train"]["sha256"],
            "text_seed": job.data and job.data.seed,
            "dtype": str(network.dtype),
            "computed_in": job.processes.precision,
        }
        layers = CalibratedLayers(None if job.folder is None else job.folder.calibrated, made_from)
        rank_zero_info(str(job.model.quantize_by_text(plan, config, adapters, calibration, layers)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:  # the compressed base has been saved by now
            drop_scaffolding(self.folder)


def _check_grids(precisions: Set[Precision]) -> None:
    """Makes sure that there is something for calibrated rounding to do.

    Raises:
        UserError: none of the formats has a grid.
    """
    formats = {precision.format: format_for(precision) for precision in precisions if precision != DENSE}
    if not any(isinstance(number_format, GridFormat) for number_format in formats.values()):
        grids = ", ".join(number_format.name for number_format in FORMATS if isinstance(number_format, GridFormat))
        raise UserError(
            f"calibrated rounds by text what is held in a format with a grid, and units are held in "
            f"{' and '.join(sorted(formats)) or DENSE.format} alone. Give formats of {grids}, such as formats: "
            f"{{4: affine-double}}, or leave calibrated out."
        )


def _widest_input(model: Any, plan: CompressionPlan) -> int:
    """The largest number of inputs of any linear that a plan packs; 0 if it packs none."""
    packed = [name for name, precision in linear_precisions(model, plan).items() if precision != DENSE]
    return max((model.get_submodule(name).in_features for name in packed), default=0)
