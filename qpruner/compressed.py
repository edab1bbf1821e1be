"""A language model under compression: its present state, what was done to it, and the folder that holds it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from qpruner.plan import CompressionPlan, describe_differences
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
    """Unchanged since it was loaded, whatever its base holds."""
    PRUNED = "pruned"
    """Narrower, or reordered; the remaining weights are those of the base."""
    QUANTIZED = "quantized"
    """In the precisions of the plan, pruned or not."""
    ADAPTED = "adapted"
    """With LoRA adapters, on a base in any state."""
    MERGED = "merged"
    """Dense again, with its former adapters merged into its weights."""


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
    """The folder that holds a compressed base.

    Args:
        path: folder that holds the base.
        sha256: hash of the base's entries in the folder's manifest, which identifies the base.
    """

    path: Path
    sha256: str


class CompressedModel(nn.Module):
    """A causal language model, its plan, the origin of its weights, and one method for each compression step.

    dense --`prune`, `reorder`--> pruned --`quantize`--> quantized --`attach`--> adapted --`merge`--> merged

    Steps may be left out; an adapted model may be narrowed, and a merged one quantized. Nothing but these methods
    changes a model. Their result depends on text as well as on the plan, so a model is never rebuilt from a plan and
    its dense base: `keep` writes it to a folder, `open` loads it from there, and checkpoints and banks identify it by
    the hash of that folder.

    Args:
        network: the transformers model, frozen and without adapters.
        base: name of the original dense model.
        base_sha256: fingerprint of the dense model; None where its files are not available locally.
        plan: units of the dense model that ``network`` holds, and their precisions; by default all of them, dense. Left
            out for families that cannot be pruned or quantized.
        state: how far the compression of ``network`` has come.
        recipe: what was done to the dense model, in order.
        kept: folder that the network was loaded from; None for none.

    Attributes:
        base_state: how far the compression of the base below adapters has come.
        masks: units that act as if they were removed; None as long as nothing is masked.
        initial_adapters: factors A [r, in] and B [out, r] that adapters start from, by the name of their linear;
            adapters of other linears start as PEFT initializes them.
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
        """Loads the dense model of a folder or of the hub; from a compressed folder, its model without adapters.

        Args:
            base: folder, hub name, or ``qpruner/stories``.
            dtype: number format of the weights in memory; see `held_in`.
            trust_remote_code: whether code that comes with the model may run.
            say: function that receives messages for the user about the model.
            fingerprint: function that computes the fingerprint of a base; it reads all of the base's files.
            check_hashes: whether the hash of every file of a compressed base is checked, beside its size.
            offload: holder of decoder blocks in files until the model is quantized or gets adapters; None to hold them
                in memory.

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
        """Opens the compressed model of a folder; `attach` then starts from the adapters in that folder.

        Args:
            folder: folder that `keep` wrote.
            check_hashes: whether the hash of every file is checked, beside its size.
            trained_adapters: whether adapters start from those in the folder even if a fit has trained these.

        Raises:
            UserError: there is no such folder, or it is damaged.
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
        """Hash that identifies the base; None where it was changed and is not stored yet."""
        if self.base_state is State.DENSE:  # kept or not
            return self.base_sha256
        return None if self.kept is None else self.kept.sha256

    @property
    def offloaded(self) -> bool:
        """Whether decoder blocks lie in files and run one at a time; see `qpruner.offload`."""
        return offload_of(self.network) is not None

    @property
    def average_bits(self) -> float | None:
        """Bits per weight of the decoder linears, scales included; None where the base is unchanged."""
        if self.plan is None or self.base_state is State.DENSE:
            return None
        return average_bits(self.plan, self.network.dtype.itemsize)

    @property
    def has_initial_adapters(self) -> bool:
        """Whether adapters start from the quantization error, rather than from zero."""
        return bool(self.initial_adapters) or (
            self._adapter_files is not None and adapter_files.has_initial_adapters(self._adapter_files)
        )

    @property
    def starts_as_peft(self) -> bool:
        """Whether adapters would start as PEFT initializes them, with no values from quantization or an earlier fit."""
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
        """Makes sure that there are scales and minima that can be trained while codes stay fixed.

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
        """Moves decoder blocks to files, until the model is quantized or gets adapters.

        Args:
            offload: holder of blocks in files; None to hold them in memory.
        """
        self._expect("put into files", PACKABLE)
        offload_(self.network, offload)

    def record(self, step: Step) -> None:
        """Adds a completed step to the recipe."""
        self.recipe = (*self.recipe, step)

    def prune(self, kept: Kept) -> tuple[Size, dict[str, float]]:
        """Removes all units except the given ones from the base and its adapters, whose remaining values do not change.

        Args:
            kept: [layers], indices of the KV groups and FFN channels that stay, in their new order, counted among the
                present ones.

        Returns:
            The size of the base, without adapters, and the relative change of each packed linear that had to be
            rounded anew, by ``layer.projection``.

        Raises:
            UserError: pooled adapters, or widths of the weights that are not those of the plan.
        """
        self._expect("pruned", NARROWABLE)
        if self._lora is not None and self._lora[0].pooled:
            raise UserError(
                "A model with pooled adapters cannot be pruned: they tie columns to the groups of the base, which are "
                "others once some are gone. Prune before adapters are attached, or leave --model.lora.pooled out."
            )
        plan = self.known_plan()
        # A uniform Llama may have been written as a Mistral.
        stated = replace(stated_by_weights(self._below()), model_type=plan.architecture.model_type)
        if differences := describe_differences(plan.widths, stated):
            raise UserError(f"The plan does not fit the model: {differences}.")
        plan = plan.keeping(kept)  # before anything changes, since not every choice of units is valid
        with self._without_adapters(kept):
            rounded = narrow_(self.network, kept)
            size = Size.of(self.network)
        self.plan, self.initial_adapters = plan, {}
        self._changed(self.base_state if self.base_state is State.QUANTIZED else State.PRUNED)
        return size, rounded

    def rank_adapters(self, ranks: Iterable[int | None]) -> None:
        """Sets the rank of the adapters that each layer will have.

        Args:
            ranks: [layers], rank of a layer's adapters; None for that of all adapters.
        """
        self._expect("given the ranks of its adapters", BARE)
        self.plan = self.known_plan().with_ranks(ranks)

    def reorder(self, places: Sequence[int]) -> None:
        """Permutes the channels of the residual stream, which does not change the model's outputs.

        Args:
            places: [hidden_size], present indices of the channels, in their new order.

        Raises:
            UserError: the model has packed weights or adapters, or its family does not allow a permutation.
        """
        self._expect("reordered", PACKABLE)
        plan = self.known_plan().reordered(places)
        reorder_hidden_(self.network, places)
        self.plan, self.initial_adapters = plan, {}
        self._changed(State.PRUNED)

    def compensate(self, dense: Any, before: CompressionPlan, calibration: Calibration, how: How) -> dict[str, Fit]:
        """Adjusts the remaining weights to compensate for the removed ones; see `compensate_`.

        Args:
            dense: network before it was pruned, on the same device.
            before: plan of that network.
            calibration: this process's share of the calibration text.
            how: whether errors of earlier layers are taken into account.

        Returns:
            Result of the compensation for each linear, by ``layer.projection``.

        Raises:
            UserError: the model has packed weights.
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
        """Quantizes the base by a plan, and sets the values that adapters start from.

        Args:
            plan: plan with the present widths of the base.
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
        """Quantizes the base by a plan, with codes that are chosen on calibration text; see `calibrate_`.

        Args:
            plan: plan with the present widths of the base.
            config: options of the rounding.
            adapters: how adapters start; None to start them at zero.
            calibration: this process's share of the text.
            layers: store of the layers that are rounded already.

        Returns:
            Result for each linear.

        Raises:
            UserError: no format offers a precision, the rank of the adapters is above that of a linear, or inputs of
                a linear are not finite.
        """
        self._expect("quantized", PACKABLE)
        result = calibrate_(self.network, plan, config, adapters, calibration, layers)
        self.initial_adapters = result.factors
        self._is_quantized(plan)
        return result

    def attach(self, lora: LoRAConfig, *, seed: int, gradient_checkpointing: bool = False) -> None:
        """Attaches adapters to the base, as the only parameters that train.

        Args:
            lora: rank and targets of the adapters; the plan may set another rank for a layer.
            seed: seed for adapters with random initialization.
            gradient_checkpointing: whether activations are recomputed in the backward pass.

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
        """Removes the adapters from the base for good, without merging them."""
        self._expect("freed of adapters", ADAPTED)
        self._drop_masks()
        self.network, _ = detach_adapters(self.network)
        self._lora, self.initial_adapters, self._adapter_files = None, {}, None

    def loosen(self) -> None:
        """Makes scales and minima of packed linears trainable in place of the adapters, which stay active but frozen.

        Codes stay fixed. Nothing else may be done to the model until `settle`. Does nothing where they train already.

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
        """Stores the scales and minima that `loosen` made trainable in their formats again, and makes adapters
        trainable.

        Args:
            polished: whether the base takes the trained values; otherwise it returns to the values before.
        """
        settle_(self.network, polished=polished)
        for factor in self._resting:
            factor.requires_grad_(True)
        self._resting = []
        if polished:
            self._changed(State.QUANTIZED)

    def mask(self, kept: Kept) -> None:
        """Makes all units except the given ones act as if they were removed, while every weight stays.

        Args:
            kept: [layers], indices of the KV groups and FFN channels that stay active.
        """
        self._expect("masked", ADAPTED)
        if self.masks is None:
            self.masks = UnitMasks(self._below())
        self.masks.keep(kept)

    def unmask(self) -> None:
        """Makes all units active again."""
        self._drop_masks()

    def merge(self, dtype: torch.dtype) -> None:
        """Merges base and adapters into one dense base.

        Args:
            dtype: number format of the dense base that results.
        """
        self._expect("merged", ADAPTED)
        self._drop_masks()
        self.network = merge_(self.network, dtype).requires_grad_(False)
        self.plan = None if self.plan is None else self.plan.merged()
        self._lora, self.initial_adapters = None, {}
        self._changed(State.MERGED)
        self.record(Step(name="merge", options={"dtype": str(dtype).removeprefix("torch.")}))

    # Where it is kept.

    def keep(self, folder: Path, *, tokenizer: Any | None, trained: bool = False) -> None:
        """Writes the base, and its adapters if it has any, to a folder that appears whole or not at all.

        Adapters then are new parameters of the same values, so that optimizers have to be made afterwards.

        Args:
            folder: folder to write, whose present content is removed. The base is identified by it from now on.
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
        """Registers a folder that another process wrote as the one that holds this base."""
        self.kept = KeptFolder(folder, identity_of(read_manifest(folder)))

    def keep_adapters(self, *, trained: bool) -> None:
        """Writes the adapters into the folder of their base.

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
        """Removes the adapters from the base within the context, and restores them, in their dtype, afterwards.

        Masks are restored, too, unless units went. After an error adapters and masks are restored whole, so that
        nothing that was trained is lost, such as to a full disk.

        Args:
            kept: [layers], indices of the units that the adapters keep; by default all.
        """
        if self._lora is None:
            yield
            return
        masked = None if self.masks is None else self.masks.kept
        self._drop_masks()
        (lora, seed), trains = self._lora, self.network.training
        self.network, factors = detach_adapters(self.network)
        held_in = next(iter(factors.values()))[0].dtype  # of less than float32 with --trainer.precision bf16-true
        narrowed = factors if kept is None else narrow_factors(self.network, factors, kept)
        try:
            yield
            factors, masked = narrowed, masked if kept is None else None
        finally:
            self._restore_adapters(lora, seed, factors, held_in)
            self.network.train(trains)
            if masked is not None:
                self.mask(masked)

    def _restore_adapters(
        self, lora: LoRAConfig, seed: int, factors: Mapping[str, Factors], held_in: torch.dtype
    ) -> None:
        self._attach(lora, seed)
        set_factors_(self.network, factors)
        for factor in self.network.parameters():
            if factor.requires_grad:
                factor.data = factor.data.to(held_in)
        if lora.pooled:
            pool_(self.network)
