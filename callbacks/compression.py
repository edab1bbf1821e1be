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
from qpruner.pruning.rounds import check_ratio, round_to, supplies
from qpruner.pruning.selection import SelectionConfig, local_widths
from qpruner.pruning.surgery import first_units, narrow_
from qpruner.records.folder import RunFolder
from qpruner.training.holding import HoldsModel, expect_holder
from qpruner.training.preflight import check_callbacks
from qpruner.training.processes import processes_of


@dataclass
class Rehearsal:
    """A fit without weights, in which callbacks find what cannot be had before any work is done.

    Args:
        model: model on the meta device, as the callbacks so far would leave it.
        lora: the adapters that it is going to have.
        exact: whether its widths are those of the fit; they are not where they depend on scores.
        precisions: precisions that its linears may get; none as long as nothing quantizes.
        decides_on_widths: whether the widths of layers are decided later, together with bits.

    Attributes:
        plan: plan of the model, all of it dense; which units are kept is made up.

    Raises:
        UserError: the adapters have no linear to be on.
    """

    model: Any
    lora: LoRAConfig
    exact: bool = True
    precisions: frozenset[Precision] = frozenset()
    decides_on_widths: bool = False

    def __post_init__(self) -> None:
        target_linears(self.model, self.lora.target_modules)
        self.exact = self.exact and not self.decides_on_widths
        self._dense = CompressionPlan.dense(architecture_of(self.model.config), None)

    @property
    def plan(self) -> CompressionPlan:
        return self._dense.keeping(first_units(self._dense.architecture, architecture_of(self.model.config)))

    def rank_adapters(self, ranks: Iterable[int | None]) -> None:
        """Says the rank of the adapters of each layer; None for that of all adapters."""
        self._dense = self._dense.with_ranks(ranks)

    def prune(self, ratio: float, selection: SelectionConfig) -> None:
        """Narrows the model as pruning would, where that does not depend on scores.

        Raises:
            UserError: a ratio that no legal widths reach.
        """
        offers, total = supplies(self.model, selection), num_parameters(self.model)
        check_ratio(ratio, offers, total)
        if selection.scope == "local":
            widths = local_widths(offers, round(total * ratio), round_to(self.model, selection))
            narrow_(self.model, first(widths, decoder_layers(self.model), selection.mixtures))
        else:
            self.exact = False


@dataclass(frozen=True)
class CompressionJob:
    """What a callback compresses, and what it may use for that; the same from a Trainer and without one.

    Args:
        model: the model, without adapters, in the memory of the CPU or of the device.
        data: data module that calibration text comes from; None where there is none.
        processes: processes that work on the model together.
        lora: the adapters that the model is going to have.
        seed: seed of all random draws.
        folder: folder of the run, for what is measured; None where there is no run.
        keep_in: folder of the run that keeps the base, also one whose compression has further to go.
    """

    model: CompressedModel
    data: TokenDataModule | None
    processes: Processes
    lora: LoRAConfig
    seed: int
    folder: RunFolder | None = None
    keep_in: Path | None = None

    def keep(self) -> None:
        """Writes a base that was changed to the folder that keeps it, so that what is measured on it can name it."""
        if self.model.identity is None and (folder := self.keep_in) is not None:
            tokenizer = getattr(self.data, "tokenizer", None)
            self.processes.of_first(lambda: self.model.keep(folder, tokenizer=tokenizer))
            self.model.is_kept_in(folder)


class Compression(Callback):
    """Compresses the model of a LightningModule at the start of a fit or in its course."""

    folder: RunFolder | None = None
    """Folder of the run, where it leaves what it measured; nowhere when there is none."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What it was asked for, as plain data."""

    @abstractmethod
    def check(self, rehearsal: Rehearsal) -> None:
        """Finds what the options ask and cannot be had, and leaves the model's widths as the fit would.

        Raises:
            UserError: something cannot be had.
        """

    def check_text(self, data: TokenDataModule) -> None:  # most need none
        """Finds, before any work with the model, that the data are too few.

        Raises:
            UserError: they are.
        """

    def check_steps(self, num_steps: float) -> None:  # most need none
        """Finds, before any work with the model, that the fit is too short.

        Args:
            num_steps: optimizer steps of the fit.

        Raises:
            UserError: it is.
        """

    @property
    def step(self) -> Step:
        """What it does, as the recipe of the model tells it."""
        return Step(name=type(self).__name__, options=self.options)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> HoldsModel:
        """The module, with its base loaded, found to be one that the callbacks of the fit can compress."""
        module = expect_holder(pl_module)
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        module.load_base()
        return module

    def check_unadapted(self, model: CompressedModel) -> None:
        """Makes sure that the base has no adapters yet.

        Raises:
            UserError: it has.
        """
        if model.state is State.ADAPTED:
            raise UserError(
                f"{type(self).__name__} compresses a base before it gets adapters, and this module has them already. "
                f"Make a new LoRAFinetuner for the fit."
            )

    def __str__(self) -> str:
        return told(type(self).__name__, self.options)


def told(name: str, options: Mapping[str, Any]) -> str:
    """A callback and what it was asked for, for a person."""
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})"


class CompressionInSetup(Compression):
    """Compresses the base in ``setup`` of a fit, before adapters and optimizers exist.

    Does so once: where the base comes compressed from the folder that it is kept in, nothing is done. What an earlier
    fit of the run left is made one dense base before. Of several processes of a run, the first does alone what all
    would do alike, and the others take what it keeps.
    """

    leaves: ClassVar[State]
    """State in which it leaves the model."""

    @property
    def shares_work(self) -> bool:
        """Whether processes work together, each on its part of the text; else all would do the same."""
        return True

    @abstractmethod
    def compress(self, job: CompressionJob) -> None:
        """Compresses the model, the same on all processes."""

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
            else:  # the others take what the first one keeps
                alone = replace(job, processes=job.processes.first_alone())
                job.processes.of_first(lambda: self._carry_out(alone))
                module.keep_base(job.keep_in)

    def _carry_out(self, job: CompressionJob) -> None:
        self.compress(job)
        job.model.record(self.step)

    def is_done(self, model: CompressedModel) -> bool:
        """Whether the base is already as this callback would leave it, or further."""
        return ORDER.index(model.base_state) >= ORDER.index(self.leaves)


ORDER = [State.DENSE, State.MERGED, State.PRUNED, State.QUANTIZED]


class CompressionInTraining(Compression):
    """Compresses the base in the course of a fit, at whose end the base is another one."""

    leaves: ClassVar[str]
    """What the base is at the end of the fit, as its stage is named."""
    needs_whole_model: ClassVar[str | None] = None
    """Why the model must not be split among devices; None where it may be."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> HoldsModel:
        check_callbacks(trainer, [self])  # a fit without a run has not done so before
        return super().begin(trainer, pl_module)

    @property
    def needs_dense_base(self) -> bool:
        """Whether it changes weights of the base, which must not be packed then."""
        return False


def check_order(callbacks: Sequence[Callback]) -> None:
    """Makes sure that a fit prunes, then quantizes, then prunes or polishes in training, each at most once.

    Raises:
        UserError: it does not, or it packs weights that are to be changed at its end.
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
    """The place of a callback among those of a fit."""
    return 2 if isinstance(callback, CompressionInTraining) else [State.PRUNED, State.QUANTIZED].index(callback.leaves)


def data_of(trainer: Trainer) -> TokenDataModule | None:
    """The data module of a fit; None where it has none that gives text."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, TokenDataModule) else None


def check_dense(model: CompressedModel) -> None:
    """Makes sure that the weights of the base are not packed.

    Raises:
        UserError: they are.
    """
    if model.has_packed_weights():
        raise UserError(
            f"The base {model.base!r} is quantized already; packed weights can be neither scored nor quantized again. "
            f"Give the model that it was made from, or `qpruner merge` its run first."
        )
