"""What callbacks that compress the base have in common."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.adapters.lora import LoRAConfig, target_linears
from qpruner.anatomy import architecture_of, decoder_layers
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.folder_manifest import Step
from qpruner.memory import num_parameters
from qpruner.plan import CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.pruning.mixtures import first
from qpruner.pruning.selection import SelectionConfig, Supply, local_widths
from qpruner.pruning.supplies import round_to, supplies_for
from qpruner.pruning.surgery import first_units, narrow_
from qpruner.records.folder import RunFolder
from qpruner.training.holding import HoldsModel, expect_holder
from qpruner.training.preflight import check_callbacks
from qpruner.training.processes import processes_of


@dataclass
class Rehearsal:
    """A dry run of a fit, without weights, in which callbacks detect impossible options before any work is done.

    Args:
        model: model on the meta device, as the callbacks so far would leave it.
        lora: options of the adapters that the model is going to have.
        exact: whether the model's widths are those of the fit; they are not if they depend on scores.
        precisions: precisions that the model's linears may get; empty as long as nothing quantizes.
        decides_on_widths: whether the widths of layers are decided later, together with bits.
        least_rank: lowest rank that the adapters of a layer may get, where ranks are decided later; None where all get
            that of ``lora``.

    Attributes:
        plan: plan of the model, entirely dense; its choice of the units to keep is a placeholder.

    Raises:
        UserError: there is no linear for the adapters.
    """

    model: Any
    lora: LoRAConfig
    exact: bool = True
    precisions: frozenset[Precision] = frozenset()
    decides_on_widths: bool = False
    least_rank: int | None = None

    def __post_init__(self) -> None:
        target_linears(self.model, self.lora.target_modules)
        self.exact = self.exact and not self.decides_on_widths
        self._dense = CompressionPlan.dense(architecture_of(self.model.config), None)

    @property
    def plan(self) -> CompressionPlan:
        return self._dense.keeping(first_units(self._dense.architecture, architecture_of(self.model.config)))

    def rank_adapters(self, ranks: Iterable[int | None]) -> None:
        """Sets the rank of the adapters of each layer; None for the rank common to all adapters."""
        self._dense = self._dense.with_ranks(ranks)

    def prune(self, ratio: float, selection: SelectionConfig) -> list[Supply]:
        """Narrows the model as pruning would, if that does not depend on scores.

        Returns:
            What could be removed from each layer.

        Raises:
            UserError: the ratio cannot be reached by any legal widths, or removes nothing.
        """
        is_start = self.decides_on_widths
        offers = supplies_for(ratio, self.model, selection, self._dense.architecture, is_start=is_start)
        if selection.scope == "local":
            removed = round(num_parameters(self.model) * ratio)
            widths = local_widths(offers, removed, round_to(self.model, selection))
            narrow_(self.model, first(widths, decoder_layers(self.model), selection.mixtures))
        else:
            self.exact = False
        return offers


@dataclass(frozen=True)
class CompressionJob:
    """What a callback compresses, and what it may use for that; the same with a Trainer and without one.

    Args:
        model: model without adapters, in the memory of the CPU or of the device.
        data: data module that calibration text comes from; None if there is none.
        processes: processes that work on the model together.
        lora: options of the adapters that the model is going to have.
        seed: seed of all random draws.
        folder: folder of the run, for measurements; None without a run.
        keep_in: folder in which the run saves the base, even one that is still to be compressed further.
    """

    model: CompressedModel
    data: TokenDataModule | None
    processes: Processes
    lora: LoRAConfig
    seed: int
    folder: RunFolder | None = None
    keep_in: Path | None = None

    def keep(self) -> None:
        """Saves a base that was changed in its folder, so that measurements made on it can refer to it."""
        if self.model.identity is None and (folder := self.keep_in) is not None:
            tokenizer = getattr(self.data, "tokenizer", None)
            self.processes.of_first(lambda: self.model.keep(folder, tokenizer=tokenizer))
            self.model.is_kept_in(folder)


class Compression(Callback):
    """Compresses the model of a LightningModule at the start of a fit or during it."""

    folder: RunFolder | None = None
    """Folder of the run, in which the callback leaves its measurements; None to leave none."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options of the callback as plain data."""

    @abstractmethod
    def check(self, rehearsal: Rehearsal) -> None:
        """Checks that the options can be satisfied, and gives the model the widths that the fit would give it.

        Raises:
            UserError: an option cannot be satisfied.
        """

    def check_text(self, data: TokenDataModule) -> None:  # most need none
        """Checks, before any work with the model, that there are enough data.

        Raises:
            UserError: there are too few.
        """

    def check_steps(self, num_steps: float) -> None:  # most need none
        """Checks, before any work with the model, that the fit is long enough.

        Args:
            num_steps: number of optimizer steps of the fit.

        Raises:
            UserError: the fit is too short.
        """

    @property
    def step(self) -> Step:
        """What the callback does, as an entry in the recipe of the model."""
        return Step(name=type(self).__name__, options=self.options)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> HoldsModel:
        """The module with its base loaded, after checking that the callbacks of the fit can compress it."""
        module = expect_holder(pl_module)
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        module.load_base()
        return module

    def check_unadapted(self, model: CompressedModel) -> None:
        """Makes sure that the base has no adapters yet.

        Raises:
            UserError: it has adapters already.
        """
        if model.state is State.ADAPTED:
            raise UserError(
                f"{type(self).__name__} compresses a base before it gets adapters, and this module has them already. "
                f"Make a new LoRAFinetuner for the fit."
            )

    def __str__(self) -> str:
        return told(type(self).__name__, self.options)


def told(name: str, options: Mapping[str, Any]) -> str:
    """A callback and its options in readable form."""
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})"


class CompressionInSetup(Compression):
    """Compresses the base in ``setup`` of a fit, before adapters and optimizers exist.

    This happens once: if the base is loaded from the folder it was saved in and is compressed already, nothing is done.
    The result of an earlier fit of the run is first merged into one dense base. Among several processes of a run, the
    first alone does work that would be identical on all of them, and the others load what it saves.
    """

    leaves: ClassVar[State]
    """State in which the callback leaves the model."""

    @property
    def shares_work(self) -> bool:
        """Whether processes share the work, each on its part of the text; otherwise all of them would do the same."""
        return True

    @abstractmethod
    def compress(self, job: CompressionJob) -> None:
        """Compresses the model, identically on all processes."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = self.begin(trainer, pl_module)
        module.merge_inherited()
        model = module.compressed
        if not self.is_done(model):
            self.check_unadapted(model)
            check_dense(model)
            job = CompressionJob(
                model,
                data_of(trainer),
                processes_of(trainer),
                module.lora,
                module.seed,
                folder=self.folder,
                keep_in=None if self.folder is None else module.kept_in,
            )
            if self.shares_work or job.processes.world_size == 1 or job.keep_in is None:
                self._carry_out(job)
            else:  # the others load what the first one saves
                alone = replace(job, processes=job.processes.first_alone())
                job.processes.of_first(lambda: self._carry_out(alone))
                module.keep_base(job.keep_in)

    def _carry_out(self, job: CompressionJob) -> None:
        self.compress(job)
        job.model.record(self.step)

    def is_done(self, model: CompressedModel) -> bool:
        """Whether the base is already as this callback would leave it, or compressed further."""
        return ORDER.index(model.base_state) >= ORDER.index(self.leaves)


ORDER = [State.DENSE, State.MERGED, State.PRUNED, State.QUANTIZED]


class CompressionInTraining(Compression):
    """Compresses the base during a fit, which therefore ends with a different base."""

    leaves: ClassVar[str]
    """What the base is at the end of the fit, as used in the name of its stage."""
    needs_whole_model: ClassVar[str | None] = None
    """Why the model must not be split among devices; None if it may be."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> HoldsModel:
        check_callbacks(trainer, [self])  # a fit without a run has not checked them before
        return super().begin(trainer, pl_module)

    @property
    def needs_dense_base(self) -> bool:
        """Whether the callback changes weights of the base, which must then not be packed."""
        return False


def check_order(callbacks: Sequence[Callback]) -> None:
    """Makes sure that a fit prunes, then quantizes, then prunes or polishes in training, each at most once.

    Raises:
        UserError: the fit does not, or it packs weights that are to be changed at its end.
    """
    compressing = [
        callback for callback in callbacks if isinstance(callback, CompressionInSetup | CompressionInTraining)
    ]
    places = [_place(callback) for callback in compressing]
    if places != sorted(set(places)):
        raise UserError(
            f"The callbacks leave the base {', then '.join(callback.leaves for callback in compressing)}; a fit prunes "
            f"at most once, then quantizes at most once, since packed weights cannot be scored, then prunes or "
            f"polishes at most once while it trains. Reorder or drop callbacks; to quantize what was pruned in "
            f"training, add a phase to the run (see phases)."
        )
    changing = [one for one in callbacks if isinstance(one, CompressionInTraining) and one.needs_dense_base]
    if changing and any(callback.leaves is State.QUANTIZED for callback in compressing):
        raise UserError(
            f"The callbacks quantize the base, and {type(changing[0]).__name__} is to compensate its weights at the "
            f"end of the fit, which packed ones cannot be. Quantize in a phase after this one (see phases), or use "
            f"compensation none."
        )


def _place(callback: CompressionInSetup | CompressionInTraining) -> int:
    """The position of a callback among those of a fit."""
    return 2 if isinstance(callback, CompressionInTraining) else [State.PRUNED, State.QUANTIZED].index(callback.leaves)


def data_of(trainer: Trainer) -> TokenDataModule | None:
    """The data module of a fit; None if it has none that supplies text."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, TokenDataModule) else None


def check_dense(model: CompressedModel) -> None:
    """Makes sure that the weights of the base are not packed.

    Raises:
        UserError: they are packed.
    """
    if model.has_packed_weights():
        raise UserError(
            f"The base {model.base!r} is quantized already; packed weights can be neither scored nor quantized again. "
            f"Give the model that it was made from, or `qpruner merge` its run first."
        )
