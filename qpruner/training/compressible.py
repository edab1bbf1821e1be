"""A LightningModule around a base model that callbacks compress and a run folder keeps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner import checkpoint as model_folder
from qpruner.adapters.lora import LoRAConfig, attach_adapters, detach_adapters, set_factors_
from qpruner.anatomy import COMPRESSED, FAMILIES, architecture_of
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError, brief, listed
from qpruner.files import replacing_folder
from qpruner.folder_manifest import is_compressed
from qpruner.likelihood import check_head
from qpruner.plan import DENSE, UNITS, CompressionPlan
from qpruner.pretrained import DType, check_model, held_in, hold_in_, load_model, model_fingerprint, resolve
from qpruner.pricing import average_bits
from qpruner.pruning.masks import UnitMasks
from qpruner.pruning.rounds import Size
from qpruner.pruning.selection import Kept
from qpruner.pruning.surgery import apply_pruning_, narrow_, narrow_factors
from qpruner.quantization.apply import Factors, LoftQSettings, quantize_
from qpruner.quantization.bank import Bank
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.merging import merge_
from qpruner.quantization.packed import PackedLinear


class CompressibleModule(LightningModule):
    """Holds a frozen base with LoRA adapters, and everything that a plan does to it.

    The base is loaded by `load_base` and adapted by `attach_adapters`, both at most once; `configure_model` calls them,
    and a callback that compresses the base calls the first in its ``setup``, acts before the second and leaves its
    ``plan``. During a fit units may be masked (`mask`); at its end they are taken out (`narrow`). A checkpoint holds
    plan, masks and adapters, and not the base. Where ``kept_in`` names a folder, the compressed base is written there
    before training and taken from there by later sessions, and `keep_adapters` puts the trained adapters to it. Where
    ``follows`` names the folder that an earlier fit left, base and adapters begin as they are there.

    Args:
        base: model folder, hub name, or ``qpruner/stories``.
        dtype: number format of the base in memory.
        trust_remote_code: whether code that comes with the model may run.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        lora: the adapters.
        seed: of the adapters' start.
    """

    def __init__(
        self,
        base: str,
        dtype: DType,
        trust_remote_code: bool,
        gradient_checkpointing: bool,
        lora: LoRAConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.dtype_of_base: DType = dtype
        self.trust_remote_code = trust_remote_code
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora
        self.seed = seed
        self.model: Any = None
        self.plan: CompressionPlan | None = None
        self.masks: UnitMasks | None = None
        self.initial_adapters: dict[str, Factors] = {}
        self.loftq_iterations = 0
        self.plans_before: list[CompressionPlan] = []  # those of the base before each time that it was narrowed
        self.taken_from: Path | None = None  # the folder that the base was loaded from, when it is compressed
        self.kept_in: Path | None = None
        self.follows: Path | None = None
        self.adapted = False
        self.base_sha256: str | None = None
        self.strict_loading = False  # checkpoints leave the base out; see `on_load_checkpoint`

    def load_base(self) -> None:
        """Loads the base unless it is there: the one that is kept, else what an earlier fit left, else the dense.

        Raises:
            UserError: there is no such base, or it has no embedding for a token of the data.
        """
        if self.model is None:
            if self.kept_in is not None and self._is_kept(self.kept_in):
                self.load_kept_base(self.kept_in)
            elif self.follows is not None:
                self.load_kept_base(self.follows)
            else:
                self.load_dense_base()
        data = self._trainer and self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TokenDataModule):
            data.check_vocabulary(self.model.config.get_text_config().vocab_size)

    def _is_kept(self, folder: Path) -> bool:
        """Whether the compressed base is there, for all processes alike.

        Raises:
            UserError: some processes see it and others do not.
        """
        kept = is_compressed(folder)
        if self._trainer is not None and self.trainer.world_size > 1:
            seen = torch.tensor(float(kept), device=self.trainer.strategy.root_device)
            if 0 < float(self.trainer.strategy.all_gather(seen).mean()) < 1:
                raise UserError(
                    f"Some processes find the compressed base in {str(folder)!r} and others do not. Name a --run.dir "
                    f"on a disk that all machines share."
                )
        return kept

    def check_base(self) -> Any:
        """Makes sure that the dense base can be loaded, without reading its weights.

        Returns:
            Its configuration.

        Raises:
            UserError: it cannot.
        """
        if not is_compressed(Path(resolve(self.base))):
            check_model(self.base, trust_remote_code=self.trust_remote_code)
        return model_folder.read_base_config(self.base, trust_remote_code=self.trust_remote_code)

    def load_dense_base(self) -> None:
        """Loads the dense base in place of whatever is there, adapters included."""
        if is_compressed(folder := Path(resolve(self.base))):
            self.model = model_folder.load_base(folder).model
            if not any(isinstance(module, PackedLinear) for module in self.model.modules()):
                hold_in_(self.model, held_in(self.model.config, self.dtype_of_base))
            if model_folder.has_adapters(folder):
                rank_zero_warn(f"{self.base!r} is taken as the base without its adapters.")
        else:
            self.model = load_model(
                self.base, dtype=self.dtype_of_base, trust_remote_code=self.trust_remote_code, say=rank_zero_info
            )
        if self.model.config.model_type.removeprefix(COMPRESSED) not in FAMILIES:  # whose heads are known
            check_head(self.model)
        self.model.requires_grad_(False)
        self.base_sha256 = self._of_rank_zero(lambda: model_fingerprint(self.base))
        self.plan, self.plans_before = None, []
        self._forget_adapters(None)

    def _forget_adapters(self, taken_from: Path | None) -> None:
        if self.masks is not None:
            self.masks.remove()  # linears without an adapter outlive it, hooks and all
        self.adapted, self.taken_from, self.initial_adapters, self.masks = False, taken_from, {}, None

    def _of_rank_zero(self, find: Callable[[], str | None]) -> str | None:
        """What the first process finds; the others are spared the work."""
        if self._trainer is None or self.trainer.world_size == 1:
            return find()
        return self.trainer.strategy.broadcast(find() if self.trainer.is_global_zero else None)

    def load_kept_base(self, folder: Path) -> None:
        """Loads the compressed base of a folder in place of whatever is there, adapters included."""
        kept = model_folder.load_base(folder)
        self.model, self.plan, self.base_sha256 = kept.model, kept.plan, kept.base_sha256
        self.loftq_iterations, self.plans_before = kept.loftq_iterations, []
        self._forget_adapters(folder)

    def merge_inherited(self) -> None:
        """Makes one dense base of the base and the adapters that an earlier fit left, to be compressed further."""
        if self.follows is not None and self.taken_from == self.follows and not self.adapted:
            assert self.plan is not None
            self.attach_adapters()
            dtype = held_in(self.model.config, self.dtype_of_base)
            self.model = merge_(self.model, dtype).requires_grad_(False)
            self.plan = self.plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(self.plan.layers))
            self._forget_adapters(None)

    def prune(self, plan: CompressionPlan) -> None:
        """Narrows the dense base as a plan says; its precisions are left for `quantize`.

        Raises:
            UserError: the plan is for a model of another shape.
        """
        plan.check(architecture_of(self.model.config), self.base_sha256)
        apply_pruning_(self.model, plan)
        self.plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers))

    def loftq_settings(self, num_iterations: int) -> LoftQSettings | None:
        """How the adapters of quantized linears start; None, from zero, without iterations."""
        return LoftQSettings.of(self.lora, num_iterations, self.seed)

    def quantize(
        self, plan: CompressionPlan, loftq_iterations: int, *, device: torch.device, bank: Bank | None = None
    ) -> None:
        """Holds the narrowed base as a plan says, and starts the adapters from what rounding left.

        Args:
            plan: with the widths that the base has.
            loftq_iterations: of LoftQ; 0 starts the adapters from zero.
            device: that quantizes.
            bank: that has the linears already, quantized with as many iterations.

        Raises:
            UserError: no format offers a precision, or the rank of the adapters is above that of a linear.
        """
        loftq = self.loftq_settings(loftq_iterations)
        if bank is None:
            self.initial_adapters = quantize_(self.model, plan, loftq, device=device)
        else:
            quantize_tables_(self.model, plan.embedding, plan.head, device=device)
            self.initial_adapters = bank.assemble_(self.model, plan)
        self.loftq_iterations = loftq_iterations
        self.plan = plan

    @property
    def average_bits(self) -> float | None:
        """Bits per weight of the decoder linears, scales included; None where the base is as it came."""
        return None if self.plan is None else average_bits(self.plan, self.model.dtype.itemsize)

    @property
    def starts_from_loftq(self) -> bool:
        """Whether the adapters start from what quantization left."""
        kept = self.taken_from is not None and model_folder.has_initial_adapters(self.taken_from)
        return self.loftq_iterations > 0 and (kept or bool(self.initial_adapters))

    def attach_adapters(self) -> None:
        """Puts adapters on the base unless they are there."""
        if not self.adapted:
            if self.gradient_checkpointing:
                # Non-reentrant: the reentrant form loses gradients where no input of a block requires them.
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model = attach_adapters(self.model, self.lora, seed=self.seed)
            self.adapted = True
            set_factors_(self.model, self.initial_adapters)
            if (folder := self.taken_from) is not None and (
                # A fit begins anew with the adapters that it began with, even if it has been over already.
                model_folder.has_initial_adapters(folder)
                or (folder == self.follows and model_folder.has_adapters(folder))
            ):
                model_folder.load_adapters(folder, self.model)

    def mask(self, kept: Kept) -> None:
        """Lets all units but some act as if they were gone.

        Args:
            kept: [layers], places of the KV groups and FFN channels that stay alive.
        """
        if self.masks is None:
            self.masks = UnitMasks(self.model.get_base_model())
        self.masks.keep(kept)

    def narrow(self, kept: Kept, *, keep_in: Path | None) -> tuple[Size, dict[str, float]]:
        """Takes all units but some out of the base and its adapters, which stay as they are in what is left.

        Args:
            kept: [layers], places of the KV groups and FFN channels that stay.
            keep_in: folder to write the result to; from now on the one that the base is kept in.

        Returns:
            The size of the base, and the relative change of each packed linear that had to be rounded anew, by
            ``layer.projection``.
        """
        plan = self.plan or CompressionPlan.dense(architecture_of(self.model.config), self.base_sha256)
        self.model, factors = detach_adapters(self.model)
        self._forget_adapters(None)
        held_in = next(iter(factors.values()))[0].dtype  # of less than float32 with --trainer.precision bf16-true
        self.initial_adapters = narrow_factors(self.model, factors, kept)
        rounded = narrow_(self.model, kept)
        self.plans_before.append(plan)
        self.plan, size = plan.keeping(kept), Size.of(self.model)
        if keep_in is not None:
            self.kept_in = keep_in
            if self.trainer.is_global_zero:
                with replacing_folder(keep_in) as folder:
                    self._keep(folder, self.plan, trained=True)
            self.trainer.strategy.barrier("narrowed_base")
        self.attach_adapters()
        for factor in self.model.parameters():
            if factor.requires_grad:
                factor.data = factor.data.to(held_in)
        return size, rounded

    def setup(self, stage: str) -> None:
        """Keeps what the callbacks, whose ``setup`` comes before this one, made of the base."""
        if stage == "fit" and self.kept_in is not None and self.plan is not None:
            if self.trainer.is_global_zero and not is_compressed(self.kept_in):
                with replacing_folder(self.kept_in) as folder:  # base and adapters appear together
                    self._keep(folder, self.plan, trained=False)
            self.trainer.strategy.barrier("compressed_base")

    def _keep(self, folder: Path, plan: CompressionPlan, *, trained: bool) -> None:
        model_folder.save_base(
            folder,
            self.model,
            plan,
            base_name=self.base,
            tokenizer=getattr(self.trainer.datamodule, "tokenizer", None),  # type: ignore[attr-defined]
            loftq_iterations=self.loftq_iterations,
        )
        if self.initial_adapters or self.taken_from is not None:
            self.attach_adapters()
            model_folder.save_adapters(folder, self.model, trained=trained, place=self.kept_in)

    def keep_adapters(self) -> None:
        """Puts the trained adapters to the compressed base, where that is kept."""
        if self.kept_in is not None and self.plan is not None and self.trainer.is_global_zero:
            model_folder.save_adapters(self.kept_in, self.model, trained=True)

    def configure_model(self) -> None:
        self.load_base()
        self.attach_adapters()
        self.model.train()

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """The base alone, as if there were no adapters."""
        if self.adapted:
            with self.model.disable_adapter():
                yield
        else:
            yield

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        # Beside the hyper-parameters, which `load_from_checkpoint` overwrites with what it is given.
        checkpoint["base_sha256"] = self.base_sha256
        checkpoint["plan"] = self.plan and self.plan.to_json()
        checkpoint["plans_before"] = [plan.to_json() for plan in self.plans_before]
        checkpoint["loftq_iterations"] = self.loftq_iterations
        checkpoint["masks"] = self.masks and [
            tuple(torch.tensor(places) for places in layer) for layer in self.masks.kept
        ]
        checkpoint["kept_in"] = self.kept_in and str(self.kept_in.absolute())
        checkpoint["follows"] = self.follows and str(self.follows)
        checkpoint["lora"] = self.hparams["lora"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives the base the shapes of the checkpoint, and makes sure that its adapters were trained on it and fit.

        Raises:
            UserError: another base or plan, or adapters of another kind or shape.
        """
        self.load_base()
        self.check_trained_on(checkpoint, self.base_sha256)
        plan = CompressionPlan.from_json(checkpoint["plan"]) if checkpoint.get("plan") else None
        if plan != self.plan:
            if plan is None or self.plan is not None:
                how = "that was not compressed" if plan is None else "that was compressed by another plan"
                raise UserError(
                    f"The checkpoint's adapters were trained on a base {how}. Compress it as the run of the "
                    f"checkpoint did, or begin a new fit."
                )
            self._rebuild(plan, checkpoint)
        self.check_adapters(checkpoint)
        self.configure_model()
        self._check_state(checkpoint["state_dict"])
        if masks := checkpoint.get("masks"):
            self.mask([(groups.tolist(), channels.tolist()) for groups, channels in masks])

    def check_trained_on(self, checkpoint: dict[str, Any], base_sha256: str | None) -> None:
        """Makes sure that the adapters of a checkpoint were trained on a base.

        Raises:
            UserError: they were not.
        """
        if checkpoint.get("base_sha256") != base_sha256:
            raise UserError(
                f"The checkpoint's adapters were trained on another base model ({checkpoint.get('base_sha256')}) than "
                f"{self.base!r} ({base_sha256}). Give the base they were trained on as --model.base."
            )

    def check_adapters(self, checkpoint: dict[str, Any]) -> None:
        """Makes sure that the adapters of a checkpoint are of the kind of the module's.

        Raises:
            UserError: they are not.
        """
        stored, ours = checkpoint["lora"], self.hparams["lora"]
        if different := [key for key in ("r", "alpha", "target_modules") if stored[key] != ours[key]]:
            differences = ", ".join(f"{key} {brief(stored[key])} there, {brief(ours[key])} here" for key in different)
            raise UserError(
                f"The checkpoint's adapters are of another kind: {differences}. Use the --model.lora of its run."
            )

    def _check_state(self, state: dict[str, torch.Tensor]) -> None:
        """Makes sure that a checkpoint holds each adapter of the model, in its shape, and nothing else.

        Raises:
            UserError: it does not.
        """
        # What is missing would keep its start in silence, since the base is missing, too.
        trained = {name: factor for name, factor in self.named_parameters() if factor.requires_grad}
        fitting = {
            name
            for name, factor in trained.items()
            if name in state and state[name].shape == factor.shape and state[name].is_floating_point()
        }
        if wrong := sorted((trained.keys() | state.keys()) - fitting):
            raise UserError(
                f"The checkpoint's adapters are not those of the model: {listed(wrong)} are missing, of another shape "
                f"or too many. Copy the checkpoint again, or begin a new fit."
            )

    def _rebuild(self, plan: CompressionPlan, checkpoint: dict[str, Any]) -> None:
        """Compresses the base as it was for a checkpoint; adapters of other shapes may be on it by now."""
        if (kept := checkpoint["kept_in"]) and is_compressed(Path(kept)):
            self.load_kept_base(Path(kept))
            if self.plan == plan:
                return
        if (follows := checkpoint.get("follows")) is not None:
            raise UserError(
                f"The checkpoint was trained on the base in {kept!r}, which was made from what an earlier fit left in "
                f"{follows!r}; it is not there any more, and the dense model alone does not give it back. Put it back."
            )
        self.load_dense_base()
        first, *later = [*map(CompressionPlan.from_json, checkpoint.get("plans_before", [])), plan]
        self.prune(first)
        if first.quantized:
            self.quantize(first, checkpoint["loftq_iterations"], device=self.device)
        for before, after in zip([first, *later], later, strict=False):  # packed weights were narrowed as they were
            narrow_(self.model, after.places_in(before))
            self.plan, self.initial_adapters = after, {}
            self.plans_before.append(before)
