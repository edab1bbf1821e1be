"""A LightningModule around a model that callbacks compress and that is stored in a folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from qpruner.adapters.lora import LoRAConfig
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.base import TokenDataModule
from qpruner.dense_base import choose_offload
from qpruner.errors import UserError
from qpruner.folder_manifest import is_compressed, read_checked_manifest
from qpruner.model_folder import read_base_config
from qpruner.offload import Offload, OffloadChoice
from qpruner.plan import CompressionPlan
from qpruner.pretrained import DType, check_model, held_in, model_fingerprint, resolve
from qpruner.processes import of_first
from qpruner.training.kept_bases import keep_by_hash
from qpruner.training.sharding import FSDP2, ShardedStrategy, is_sharded, whole

T = TypeVar("T")

BASES = "compressed_bases"
"""Folder under the Trainer's ``default_root_dir`` for the bases of fits that have no folder of their own."""


class CompressibleModule(LightningModule):
    """Holds a `CompressedModel` for a fit: loads it, and writes its base to disk.

    `load_base` loads the base and `attach_adapters` adds the adapters, both at most once. `configure_model` calls both;
    a callback that compresses calls the first in its ``setup`` and acts before the second.

    The base is loaded from ``kept_in`` if that folder holds one, else from ``continues_from``, with its trained
    adapters, else it is the dense one. After callbacks have compressed it, `KeepModel` writes it to ``kept_in``; in a
    fit without that callback, it is written to a folder named by its hash under ``compressed_bases`` in the Trainer's
    ``default_root_dir``. Under a `ShardedStrategy` the model, adapters included, is sharded across devices at the end
    of `configure_model`.

    Args:
        base: model folder, hub name, or ``qpruner/stories``.
        dtype: number format of the base in memory.
        trust_remote_code: whether code that comes with the model may run.
        gradient_checkpointing: whether activations are recomputed in the backward pass rather than stored.
        lora: options of the adapters.
        seed: seed for initializing the adapters.
        offload: whether the decoder blocks of the dense model lie in files during compression, with one of them in
            memory at a time.

    Attributes:
        trains_grids: whether scales and minima of the packed base are trained in place of the adapters.
    """

    def __init__(
        self,
        base: str,
        dtype: DType,
        trust_remote_code: bool,
        gradient_checkpointing: bool,
        lora: LoRAConfig,
        seed: int,
        offload: OffloadChoice = "auto",
    ) -> None:
        super().__init__()
        self.base = base
        self.dtype_of_base: DType = dtype
        self.trust_remote_code = trust_remote_code
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora
        self.seed = seed
        self.offload: OffloadChoice = offload
        self.held: CompressedModel | None = None
        self.kept_in: Path | None = None
        self.continues_from: Path | None = None
        self.trains_grids = False
        self._keeps_base = True
        self.strict_loading = False  # checkpoints omit the base; see `on_load_checkpoint`

    @property
    def compressed(self) -> CompressedModel:
        """The model under compression.

        Raises:
            RuntimeError: it is not loaded yet.
        """
        if self.held is None:
            raise RuntimeError("No model is loaded. Call load_base() first; a fit does so in its setup.")
        return self.held

    @property
    def model(self) -> Any:
        """The transformers model, or the PEFT model around it; None before it is loaded."""
        return None if self.held is None else self.held.network

    @property
    def plan(self) -> CompressionPlan | None:
        """The plan of the model; None before it is loaded, and for families that cannot be compressed."""
        return None if self.held is None else self.held.plan

    def hold(self, compressed: CompressedModel) -> Self:
        """Adopts a model that the caller has loaded and stores itself; this module does not write its base anywhere."""
        self.held, self._keeps_base = compressed, False
        return self

    def release(self) -> None:
        """Drops the model; `load_base` loads it again."""
        self.held = None

    # Loading.

    def load_base(self) -> None:
        """Loads the base unless it is loaded: the stored one, else the one that an earlier fit left, else the dense
        one.

        Raises:
            UserError: there is no such base, or a token of the data has no embedding in it.
        """
        if self.held is None:
            if self.kept_in is not None and self._is_kept(self.kept_in):
                self.open_base(self.kept_in)
            elif self.continues_from is not None:
                self.open_base(self.continues_from)
            else:
                self.load_dense_base()
        data = self._trainer and self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TokenDataModule):
            data.check_model(self.model.config)

    def _is_kept(self, folder: Path) -> bool:
        """Whether a folder holds the compressed base, with the same answer on all processes.

        Raises:
            UserError: some processes see the base and others do not.
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
            Configuration of the base.

        Raises:
            UserError: it cannot be loaded.
        """
        if not is_compressed(Path(resolve(self.base))):
            check_model(self.base, trust_remote_code=self.trust_remote_code)
        return read_base_config(self.base, trust_remote_code=self.trust_remote_code)

    def load_dense_base(self) -> None:
        """Loads the dense base, replacing the current model and its adapters."""
        self.release()
        if is_compressed(folder := Path(resolve(self.base))):
            self._of_first(lambda: read_checked_manifest(folder))
        self.held = CompressedModel.load(
            self.base,
            check_hashes=False,
            dtype=self.dtype_of_base,
            trust_remote_code=self.trust_remote_code,
            say=rank_zero_info,
            fingerprint=lambda base: self._of_first(lambda: model_fingerprint(base)),
            offload=self._of_first(self._choose_offload),
        )

    def _choose_offload(self) -> Offload | None:
        """How decoder blocks are offloaded to files, in a fit, which may compress them; None otherwise."""
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return None
        return choose_offload(
            self.base,
            self.offload,
            dtype=self.dtype_of_base,
            trust_remote_code=self.trust_remote_code,
            device=self.trainer.strategy.root_device,
            num_processes=self.trainer.num_devices,
            folder=Path(self.trainer.default_root_dir) if self.kept_in is None else self.kept_in.parent,
            say=rank_zero_info,
        )

    def open_base(self, folder: Path) -> None:
        """Opens the compressed base of a folder, replacing the current model and its adapters.

        Only the first process hashes the files.

        Raises:
            UserError: there is no such folder, or it is damaged.
        """
        self.release()
        self._of_first(lambda: read_checked_manifest(folder))
        self.held = CompressedModel.open(
            folder, check_hashes=False, trained_adapters=folder == self.continues_from != self.kept_in
        )

    def _of_first(self, find: Callable[[], T]) -> T:
        """Calls a function on the first process alone and gives its result, or its error, to all processes."""
        if self._trainer is None or self.trainer.world_size == 1:
            return find()
        return of_first(find, is_first=self.trainer.is_global_zero, broadcast=self.trainer.strategy.broadcast)

    def merge_inherited(self) -> None:
        """Merges the base and adapters of an earlier fit into one dense base, to be compressed further."""
        folder = self.compressed.kept and self.compressed.kept.path
        if folder is not None and folder == self.continues_from and self.compressed.state is not State.ADAPTED:
            self.attach_adapters()
            self.compressed.merge(held_in(self.model.config, self.dtype_of_base))

    def attach_adapters(self) -> None:
        """Attaches adapters to the base unless it has them."""
        if self.compressed.state is not State.ADAPTED:
            self.compressed.attach(self.lora, seed=self.seed, gradient_checkpointing=self.gradient_checkpointing)
            if (plan := self.compressed.plan) is not None and any(experts := plan.widths.experts):
                rank_zero_info(f"The {sum(experts)} experts get no adapters; the other linears that are targets do.")

    def configure_model(self) -> None:
        self.load_base()
        self.attach_adapters()
        if self.trains_grids:
            self.compressed.loosen()
        self.model.train()
        # All processes map the base from one folder. DDP need not broadcast it, which would give each its own copy.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen
        strategy = self._trainer and self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):  # last, since no part of the model is whole after it
            self.check_split()
            strategy.shard_(self.model)
        elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(
                f"{type(strategy).__name__} does not say how a model with packed weights is split. Give the Trainer "
                f"`qpruner.training.sharding.ShardedStrategy()`, which does."
            )

    def check_split(self) -> None:
        """Makes sure that the adapters can be trained while the model is sharded across devices.

        Raises:
            UserError: they cannot be trained so.
        """
        if self.lora.pooled:
            raise UserError(
                f"--model.lora.pooled keeps the columns of whole adapters together, and --trainer.strategy {FSDP2} "
                f"splits them among devices. Use ddp, or leave pooled out."
            )

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Disables the adapters, if there are any, within the context."""
        if self.compressed.state is State.ADAPTED:
            with self.model.disable_adapter():
                yield
        else:
            yield

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the module as ever, but leaves buffers in their number formats.

        ``--trainer.precision bf16-true`` casts whole modules, and rotary frequencies of bfloat16 turn a position of
        some thousands by radians too much or too little; transformers keeps them in float32 in any model, too.
        """
        before = dict(self.named_buffers(remove_duplicate=False))  # one tensor may be two buffers, which then part
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(remove_duplicate=False):
            if buffer.dtype != before[name].dtype:
                owner, _, own = name.rpartition(".")
                self.get_submodule(owner)._buffers[own] = before[name].to(buffer.device)
        return self

    # Keeping.

    def setup(self, stage: str) -> None:
        """Writes the base as callbacks, whose ``setup`` ran earlier, have changed it, unless one of them wrote it."""
        if stage == "fit":
            self._keep_by_hash(trained=False)

    def on_fit_end(self) -> None:
        """Writes the base as callbacks have changed it during the fit, unless one of them wrote it."""
        self._keep_by_hash(trained=True)

    def keep_base(self, folder: Path, *, trained: bool = False) -> None:
        """Writes the base, and adapters unless they start from PEFT's initialization, to a folder; called on all ranks.

        Args:
            folder: folder to write.
            trained: whether a fit has trained the adapters.
        """
        if not self.compressed.starts_as_peft:  # the folder that they came from is not read again
            self.attach_adapters()
        self._of_first(lambda: self.compressed.keep(folder, tokenizer=self._tokenizer, trained=trained))
        self.compressed.is_kept_in(folder)
        if not trained:
            self._take_kept()

    def _take_kept(self) -> None:
        """With several processes, reopens the base from its folder on each, so that they share its pages."""
        folder = self.compressed.kept
        if folder is not None and self._trainer is not None and self.trainer.world_size > 1:
            self.held = CompressedModel.open(folder.path, check_hashes=False)

    def keep_adapters(self) -> None:
        """Writes the trained adapters into the folder of their base; called on all ranks."""
        self.unite()
        self._of_first(lambda: self.compressed.keep_adapters(trained=True))

    def unite(self) -> None:
        """Makes a model that is sharded across devices whole again, on the CPU; a collective call of all ranks.

        The base is reopened from its folder, whose pages the ranks share; the trained parameters are gathered.
        """
        if not is_sharded(self.model):
            return
        trained = {name: whole(p.detach()) for name, p in self.named_parameters() if p.requires_grad}
        kept = self.compressed.kept
        assert kept is not None, "a base is kept before it is split"
        self.held = CompressedModel.open(kept.path, check_hashes=False)
        self.attach_adapters()
        if self.trains_grids:
            self.compressed.loosen()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    parameter.data = trained[name]  # assigned rather than copied, to keep its dtype

    def _keep_by_hash(self, *, trained: bool) -> None:
        """Writes a base that is stored nowhere else to the folder named by its hash."""
        if self.held is None or not self._keeps_base or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.compressed.identity is not None or self.compressed.plan is None:
            return
        self.compressed.is_kept_in(self._of_first(self._write_by_hash))
        if self.compressed.initial_adapters:
            self.attach_adapters()
        if trained or self.compressed.initial_adapters:
            self._of_first(lambda: self.compressed.keep_adapters(trained=trained))
        if not trained:
            self._take_kept()

    def _write_by_hash(self) -> Path:
        bases = Path(self.trainer.default_root_dir) / BASES
        return keep_by_hash(bases, lambda folder: self.compressed.keep(folder, tokenizer=self._tokenizer))

    @property
    def _tokenizer(self) -> Any:
        data = self._trainer and self.trainer.datamodule  # type: ignore[attr-defined]
        return getattr(data, "tokenizer", None)
