"""A language model under compression: what it is now, what was done to it, and the folder that keeps it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from qpruner import adapter_files, model_folder
from qpruner.adapters.lora import LoRAConfig, attach_adapters, detach_adapters, set_factors_
from qpruner.anatomy import architecture_of, is_compressible
from qpruner.calibration.regression import Fit
from qpruner.calibration.text import Calibration
from qpruner.dense_base import load_dense_base
from qpruner.errors import UserError
from qpruner.files import replacing_folder
from qpruner.folder_manifest import Step, identity_of, read_manifest
from qpruner.offload import Offload, offload_, offload_of
from qpruner.plan import DENSE, UNITS, CompressionPlan, describe_differences
from qpruner.pretrained import DType, model_fingerprint
from qpruner.pricing import average_bits
from qpruner.pruning.compensation import How, compensate_, places_among
from qpruner.pruning.masks import UnitMasks
from qpruner.pruning.order import reorder_hidden_
from qpruner.pruning.rounds import Size
from qpruner.pruning.selection import Kept
from qpruner.pruning.surgery import narrow_, narrow_factors, stated_by_weights
from qpruner.quantization.apply import Factors, LoftQSettings, adapter_ranks, quantize_
from qpruner.quantization.bank import Bank
from qpruner.quantization.calibrated import Calibrated, calibrate_
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.calibrated_layers import CalibratedLayers
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.merging import merge_
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.polishing import linears_with_grids, loosen_, settle_
from qpruner.quantization.pooled import pool_


class State(StrEnum):
    """How far the compression of a model has come."""

    DENSE = "dense"
    """As its base came, whatever that holds."""
    PRUNED = "pruned"
    """Narrower, or in another order; the weights that are left are those of the base."""
    QUANTIZED = "quantized"
    """Held as the plan says, pruned or not."""
    ADAPTED = "adapted"
    """With LoRA adapters on it, whatever it is below them."""
    MERGED = "merged"
    """Dense again, with what were its adapters in its weights."""


NARROWABLE = frozenset({State.DENSE, State.PRUNED, State.MERGED, State.ADAPTED})
PACKABLE = frozenset({State.DENSE, State.PRUNED, State.MERGED})
BARE = frozenset({State.DENSE, State.PRUNED, State.QUANTIZED, State.MERGED})
ADAPTED = frozenset({State.ADAPTED})


NO_GRIDS = (
    "no linear in a number format whose scales and minima can be trained while its codes stay, as affine and "
    "symmetric, -double or not. Quantize before polishing, at 4 and 8 bits with formats such as {4: affine}, or leave "
    "polishing out."
)


@dataclass(frozen=True)
class KeptFolder:
    """The folder that keeps a compressed base.

    Args:
        path: folder that holds the base.
        sha256: hash of what the folder's manifest says of the base, by which the base is known.
    """

    path: Path
    sha256: str


class CompressedModel(nn.Module):
    """A causal language model, its plan, where its weights come from, and one method for each thing done to it.

    dense --`prune`, `reorder`--> pruned --`quantize`--> quantized --`attach`--> adapted --`merge`--> merged

    Steps may be left out; an adapted model may be narrowed, and a merged one quantized. Nothing but these methods
    changes a model. What they leave depends on text as well as on the plan, so that no model is ever made again from a
    plan and its dense base: `keep` writes it to a folder, `open` takes it from there, and the hash of that folder is
    what a checkpoint or a bank knows it by.

    Args:
        network: the model of transformers, frozen and without adapters.
        base: name of the dense model that all began with.
        base_sha256: fingerprint of the dense model; None where its files are not at hand.
        plan: units of the dense model that ``network`` holds, and how; by default all of them, dense. Left out for
            families that cannot be pruned or quantized.
        state: how far the compression of ``network`` has come.
        recipe: what was done to the dense model, in order.
        kept: folder that the network was taken from; None for none.

    Attributes:
        base_state: how far the compression of the base below adapters has come.
        masks: units that act as if they were gone; None as long as nothing was masked.
        initial_adapters: factors A [r, in] and B [out, r] that adapters start from, by the name of their linear;
            adapters of other linears start as PEFT has it.
    """

    def __init__(
        self,
        network: Any,
        *,
        base: str = "",
        base_sha256: str | None = None,
        plan: CompressionPlan | None = None,
        state: State = State.DENSE,
        recipe: tuple[Step, ...] = (),
        kept: KeptFolder | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.base = base
        self.base_sha256 = base_sha256
        if plan is None and is_compressible(network.config):
            plan = CompressionPlan.dense(architecture_of(network.config), base_sha256)
        self.plan = plan
        self.base_state = state
        self.recipe = recipe
        self.kept = kept
        self.masks: UnitMasks | None = None
        self.initial_adapters: dict[str, Factors] = {}
        self._adapter_files: Path | None = None
        self._lora: tuple[LoRAConfig, int] | None = None  # of the adapters that are on it, and their seed
        self._resting: list[nn.Parameter] = []  # factors of adapters, while the grids of the base train

    # Where it comes from.

    @classmethod
    def load(
        cls,
        base: str,
        *,
        dtype: DType,
        trust_remote_code: bool = False,
        say: Callable[[str], None] = print,
        fingerprint: Callable[[str], str | None] = model_fingerprint,
        check_hashes: bool = True,
        offload: Offload | None = None,
    ) -> Self:
        """The dense model of a folder or of the hub; of a folder that keeps a compressed one, that without adapters.

        Args:
            base: folder, hub name, or ``qpruner/stories``.
            dtype: number format of the weights in memory; see `held_in`.
            trust_remote_code: whether code that comes with the model may run.
            say: function that is told what a person should know of the model.
            fingerprint: function that tells a base from others; it reads all of the base's files.
            check_hashes: whether every file of a compressed base is compared with its hash, beside its size.
            offload: what puts decoder blocks into files until the model is quantized or gets adapters; None to hold
                them in memory.

        Raises:
            UserError: there is no such model, or it is damaged.
        """
        dense = load_dense_base(
            base,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            say=say,
            fingerprint=fingerprint,
            check_hashes=check_hashes,
            offload=offload,
        )
        return cls(dense.network, base=base, base_sha256=dense.sha256, plan=dense.plan)

    @classmethod
    def open(cls, folder: Path, *, check_hashes: bool = True, trained_adapters: bool = False) -> Self:
        """The compressed model that a folder keeps; `attach` then starts from the adapters that lie there.

        Args:
            folder: folder that `keep` wrote.
            check_hashes: whether every file is read and compared with its hash, beside its size.
            trained_adapters: whether adapters start from those in the folder even where a fit has trained these.

        Raises:
            UserError: no such folder, or it is damaged.
        """
        content = model_folder.load_base(folder, check_hashes=check_hashes)
        model = cls(
            content.network,
            base=content.base_name,
            base_sha256=content.base_sha256,
            plan=content.plan,
            state=State(content.state),
            recipe=content.recipe,
            kept=KeptFolder(folder, content.sha256),
        )
        if adapter_files.has_initial_adapters(folder) or (trained_adapters and adapter_files.has_adapters(folder)):
            model._adapter_files = folder
        return model

    # What it is.

    @property
    def state(self) -> State:
        return State.ADAPTED if self._lora is not None else self.base_state

    @property
    def identity(self) -> str | None:
        """Hash that tells the base from others; None where it was changed and is kept nowhere yet."""
        if self.base_state is State.DENSE:  # kept or not
            return self.base_sha256
        return None if self.kept is None else self.kept.sha256

    @property
    def offloaded(self) -> bool:
        """Whether decoder blocks lie in files and work one at a time; see `qpruner.offload`."""
        return offload_of(self.network) is not None

    @property
    def average_bits(self) -> float | None:
        """Bits per weight of the decoder linears, scales included; None where the base is as it came."""
        if self.plan is None or self.base_state is State.DENSE:
            return None
        return average_bits(self.plan, self.network.dtype.itemsize)

    @property
    def has_initial_adapters(self) -> bool:
        """Whether adapters start from what quantization left, rather than from zero."""
        return bool(self.initial_adapters) or (
            self._adapter_files is not None and adapter_files.has_initial_adapters(self._adapter_files)
        )

    @property
    def starts_as_peft(self) -> bool:
        """Whether adapters would start as PEFT has it: neither quantization nor an earlier fit has left them values."""
        return not self.initial_adapters and self._adapter_files is None

    def has_packed_weights(self) -> bool:
        """Whether linears hold codes rather than weights."""
        return any(isinstance(module, PackedLinear) for module in self.network.modules())

    def check_unpacked(self, what: str) -> None:
        """Makes sure that weights can be changed.

        Args:
            what: what is to be done to the model, as the message names it.

        Raises:
            UserError: linears hold codes.
        """
        if self.has_packed_weights():
            raise UserError(
                f"Packed weights cannot be {what}: the base {self.base!r} is quantized. Prune the dense base and "
                f"quantize it afterwards, or use compensation none."
            )

    def check_grids(self) -> None:
        """Makes sure that there are scales and minima that can be trained while codes stay.

        Raises:
            UserError: no linear of the layers is packed in a number format that has a grid.
        """
        if not linears_with_grids(self.network):
            raise UserError(f"The base {self.base!r} has {NO_GRIDS}")

    def known_plan(self) -> CompressionPlan:
        """The plan.

        Raises:
            UserError: the family cannot be compressed, and so has none.
        """
        if self.plan is None:
            architecture_of(self.network.config)  # says why
            raise AssertionError("a family that is known has a plan")
        return self.plan

    # What is done to it.

    def offload(self, offload: Offload | None) -> None:
        """Lets decoder blocks lie in files from here on, until the model is quantized or gets adapters.

        Args:
            offload: what puts them there; None to hold them in memory.
        """
        self._expect("put into files", PACKABLE)
        offload_(self.network, offload)

    def record(self, step: Step) -> None:
        """Writes a step into the recipe, once it is done."""
        self.recipe = (*self.recipe, step)

    def prune(self, kept: Kept) -> tuple[Size, dict[str, float]]:
        """Takes all units but some out of the base, and out of the adapters, which stay as they are in what is left.

        Args:
            kept: [layers], places of the KV groups and FFN channels that stay, in the order that they get, counted
                among those that are there.

        Returns:
            The size of the base, without adapters, and the relative change of each packed linear that had to be
            rounded anew, by ``layer.projection``.

        Raises:
            UserError: packed weights without adapters, or widths of the weights that are not those of the plan.
        """
        self._expect("pruned", NARROWABLE)
        plan = self.known_plan()
        # A uniform Llama may have been written as a Mistral.
        stated = replace(stated_by_weights(self._below()), model_type=plan.architecture.model_type)
        if differences := describe_differences(plan.widths, stated):
            raise UserError(f"The plan does not fit the model: {differences}.")
        plan = plan.keeping(kept)  # before anything changes: not every choice of units is one
        with self._without_adapters(kept):
            rounded = narrow_(self.network, kept)
            size = Size.of(self.network)
        self.plan, self.initial_adapters = plan, {}
        self._changed(self.base_state if self.base_state is State.QUANTIZED else State.PRUNED)
        return size, rounded

    def rank_adapters(self, ranks: Iterable[int | None]) -> None:
        """Says the rank of the adapters that each layer is going to have.

        Args:
            ranks: [layers], rank of a layer's adapters; None for that of all adapters.
        """
        self._expect("given the ranks of its adapters", BARE)
        self.plan = self.known_plan().with_ranks(ranks)

    def reorder(self, places: Sequence[int]) -> None:
        """Puts the channels of the residual stream into another order, in which the model computes the same.

        Args:
            places: [hidden_size], places of the channels among those that there are, in the order that they get.

        Raises:
            UserError: packed weights, adapters, or a family without such an order.
        """
        self._expect("reordered", PACKABLE)
        plan = self.known_plan().reordered(places)
        reorder_hidden_(self.network, places)
        self.plan, self.initial_adapters = plan, {}
        self._changed(State.PRUNED)

    def compensate(self, dense: Any, before: CompressionPlan, calibration: Calibration, how: How) -> dict[str, Fit]:
        """Changes the weights that are left so that they make up for those that are gone; see `compensate_`.

        Args:
            dense: network before it was pruned, on the same device.
            before: plan of that network.
            calibration: this process's share of the text.
            how: whether what earlier layers got wrong counts.

        Returns:
            What was done to each linear, by ``layer.projection``.

        Raises:
            UserError: packed weights.
        """
        self._expect("compensated", NARROWABLE)
        self.check_unpacked("compensated")
        assert before.hidden == self.known_plan().hidden, "hidden states are compared channel by channel"
        fits = compensate_(self.network, dense, places_among(before, self.known_plan()), calibration, how)
        self._changed(self.base_state)
        return fits

    def quantize(
        self,
        plan: CompressionPlan,
        loftq: LoftQSettings | None,
        *,
        device: torch.device,
        bank: Bank | None = None,
    ) -> None:
        """Holds the base as a plan says, and leaves what adapters start from.

        Args:
            plan: plan with the widths that the base has.
            loftq: how adapters start, by LoftQ; None to start them at zero.
            device: device that quantizes.
            bank: linears that are quantized already, with ``loftq``; with a bank, a base may be quantized again and
                again.

        Raises:
            UserError: no format offers a precision, or the rank of the adapters is above that of a linear.
        """
        self._expect("quantized", BARE if bank is not None else PACKABLE)
        if bank is None:
            self.initial_adapters = quantize_(self.network, plan, loftq, device=device)
        else:
            if self.base_state is not State.QUANTIZED:
                quantize_tables_(self.network, plan.embedding, plan.head, device=device)
            self.initial_adapters = bank.assemble_(self.network, plan)
        self._is_quantized(plan)

    def quantize_by_text(
        self,
        plan: CompressionPlan,
        config: CalibratedConfig,
        adapters: LoftQSettings | None,
        calibration: Calibration,
        layers: CalibratedLayers,
    ) -> Calibrated:
        """Holds the base as a plan says, with codes that are judged by text; see `calibrate_`.

        Args:
            plan: plan with the widths that the base has.
            config: options of the rounding.
            adapters: how adapters start; None to start them at zero.
            calibration: this process's share of the text.
            layers: place that keeps what is rounded already.

        Returns:
            What came of each linear.

        Raises:
            UserError: no format offers a precision, the rank of the adapters is above that of a linear, or what reaches
                a linear is not finite.
        """
        self._expect("quantized", PACKABLE)
        result = calibrate_(self.network, plan, config, adapters, calibration, layers)
        self.initial_adapters = result.factors
        self._is_quantized(plan)
        return result

    def attach(self, lora: LoRAConfig, *, seed: int, gradient_checkpointing: bool = False) -> None:
        """Puts adapters on the base, the only parameters that train.

        Args:
            lora: rank and place of the adapters; the plan may have another rank for a layer.
            seed: seed of the adapters that start at random.
            gradient_checkpointing: whether activations are computed again in the backward pass.

        Raises:
            UserError: a target matches no linear, or the adapters in the folder are of another kind.
        """
        self._expect("given adapters", BARE)
        offload_(self.network, None)  # all blocks train together
        if gradient_checkpointing:
            # Non-reentrant: the reentrant form loses gradients where no input of a block requires them.
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        if self._adapter_files is not None:
            adapter_files.check_adapters(self._adapter_files, rank=lora.r, alpha=lora.alpha)
        self._attach(lora, seed)
        self._lora = lora, seed
        if not lora.pooled:
            set_factors_(self.network, self.initial_adapters)
        if self._adapter_files is not None:
            adapter_files.load_adapters(self._adapter_files, self.network)
        if lora.pooled:
            pool_(self.network)

    def detach(self) -> None:
        """Takes the adapters off the base, unmerged and for good."""
        self._expect("freed of adapters", ADAPTED)
        self._drop_masks()
        self.network, _ = detach_adapters(self.network)
        self._lora, self.initial_adapters = None, {}

    def loosen(self) -> None:
        """Lets the scales and minima of packed linears train in place of the adapters, which act and stay as they are.

        Codes stay. Until `settle` nothing else is to be done to the model. Where they train already, nothing happens.

        Raises:
            UserError: no linear of the layers is packed in a format that has scales and minima to train.
        """
        self._expect("polished", ADAPTED)
        self.check_grids()
        if not self._resting:
            self._resting = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            self.network.requires_grad_(False)
            loosen_(self.network)

    def settle(self, *, polished: bool = True) -> None:
        """Holds the scales and minima that `loosen` let train as their formats store them, and lets adapters train.

        Args:
            polished: whether the base gets them as trained; otherwise it is what it was before.
        """
        settle_(self.network, polished=polished)
        for factor in self._resting:
            factor.requires_grad_(True)
        self._resting = []
        if polished:
            self._changed(State.QUANTIZED)

    def mask(self, kept: Kept) -> None:
        """Lets all units but some act as if they were gone, while every weight stays.

        Args:
            kept: [layers], places of the KV groups and FFN channels that stay alive.
        """
        self._expect("masked", ADAPTED)
        if self.masks is None:
            self.masks = UnitMasks(self._below())
        self.masks.keep(kept)

    def unmask(self) -> None:
        """Lets all units act again."""
        self._drop_masks()

    def merge(self, dtype: torch.dtype) -> None:
        """Makes one dense base of base and adapters.

        Args:
            dtype: number format of the dense base that results.
        """
        self._expect("merged", ADAPTED)
        self._drop_masks()
        self.network = merge_(self.network, dtype).requires_grad_(False)
        if self.plan is not None:
            self.plan = self.plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(self.plan.layers))
        self._lora, self.initial_adapters = None, {}
        self._changed(State.MERGED)
        self.record(Step(name="merge", options={"dtype": str(dtype).removeprefix("torch.")}))

    # Where it is kept.

    def keep(self, folder: Path, *, tokenizer: Any | None, trained: bool = False) -> None:
        """Writes the base, and its adapters if it has any, to a folder that appears whole or not at all.

        Args:
            folder: folder to write, whose present content goes. From now on the base is known by it.
            tokenizer: tokenizer to write beside the model; None for none.
            trained: whether a fit has trained the adapters; otherwise they are what a fit starts from.

        Raises:
            UserError: a family that cannot be compressed, or the disk has no room.
        """
        plan = self.known_plan()
        assert not self._resting, "grids that train are settled before they are kept"
        with replacing_folder(folder) as temporary:
            with self._without_adapters():
                model_folder.write_base(
                    temporary,
                    self.network,
                    plan,
                    base_name=self.base,
                    state=self.base_state.value,
                    recipe=self.recipe,
                    tokenizer=tokenizer,
                )
            if self.state is State.ADAPTED:
                adapter_files.save_adapters(temporary, self.network, trained=trained, place=folder)
        self.is_kept_in(folder)

    def is_kept_in(self, folder: Path) -> None:
        """Takes a folder that another process wrote for the one that keeps this base."""
        self.kept = KeptFolder(folder, identity_of(read_manifest(folder)))

    def keep_adapters(self, *, trained: bool) -> None:
        """Puts the adapters to the base in its folder.

        Args:
            trained: whether a fit has trained the adapters; otherwise they are what a fit starts from.
        """
        assert self.kept is not None
        self._expect("kept with its adapters", ADAPTED)
        adapter_files.save_adapters(self.kept.path, self.network, trained=trained)

    # Inside.

    def _below(self) -> Any:
        """The model of transformers, below adapters."""
        return self.network.get_base_model() if self.state is State.ADAPTED else self.network

    def _expect(self, what: str, states: frozenset[State]) -> None:
        if self.state not in states:
            raise UserError(
                f"A model that is {self.state} cannot be {what}; only one that is "
                f"{' or '.join(state for state in State if state in states)} can. Load the base anew for this."
            )

    def _is_quantized(self, plan: CompressionPlan) -> None:
        self.plan = plan
        offload_(self.network, None)  # small enough to be whole from here on
        self._changed(State.QUANTIZED)

    def _changed(self, state: State) -> None:
        self.base_state = state
        self.kept, self._adapter_files = None, None

    def _drop_masks(self) -> None:
        if self.masks is not None:
            self.masks.remove()  # linears without an adapter outlive it, hooks and all
            self.masks = None

    def _attach(self, lora: LoRAConfig, seed: int) -> None:
        ranks = {} if self.plan is None else adapter_ranks(self.network, self.plan)
        given = {name: rank for name, rank in ranks.items() if rank is not None}
        self.network = attach_adapters(self.network, lora, seed=seed, ranks=given)

    @contextmanager
    def _without_adapters(self, kept: Kept | None = None) -> Iterator[None]:
        """The base alone meanwhile; afterwards its adapters are on it again, in their dtype.

        Args:
            kept: [layers], places of the units that the adapters keep; by default all.
        """
        if self._lora is None:
            yield
            return
        self._drop_masks()
        lora, seed = self._lora
        self.network, factors = detach_adapters(self.network)
        held_in = next(iter(factors.values()))[0].dtype  # of less than float32 with --trainer.precision bf16-true
        if kept is not None:
            factors = narrow_factors(self.network, factors, kept)
        yield
        self._attach(lora, seed)
        set_factors_(self.network, factors)
        for factor in self.network.parameters():
            if factor.requires_grad:
                factor.data = factor.data.to(held_in)
        if lora.pooled:
            pool_(self.network)
