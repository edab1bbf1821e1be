"""A LightningModule whose checkpoints record the folder that holds the compressed base of their adapters."""

from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.trainer.states import TrainerFn

from qpruner.compressed import State
from qpruner.errors import UserError, brief, listed
from qpruner.folder_manifest import is_compressed
from qpruner.model_folder import read_plan
from qpruner.pretrained import is_reachable, model_fingerprint
from qpruner.training import compressible
from qpruner.training.compressible import CompressibleModule
from qpruner.training.kept_bases import identity_in, keeping_folder

LOADED_FROM = "loaded_from"
"""Key of the checkpoint's own path, which `load_from_checkpoint` adds to its options."""


class CheckpointedModule(CompressibleModule):
    """Locates the base that a checkpoint's adapters were trained on; they are of no use on any other.

    A checkpoint holds adapters and masks, and names the folder of the base with its hash; a compressed base is never
    rebuilt by repeating its compression. Arguments are those of `CompressibleModule`.
    """

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As in Lightning; the base is also looked for near the checkpoint, in case both were moved."""
        # Lightning adds these keywords to the checkpoint's options; `on_load_checkpoint` sees those, but not the path.
        kwargs[LOADED_FROM] = str(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        compressed = self.compressed
        dense = compressed.base_state is State.DENSE  # identified by its own files, whether a folder keeps it or not
        checkpoint["base"] = {
            "name": compressed.base,
            "dense_sha256": compressed.base_sha256,
            "sha256": compressed.identity,
            "folder": None if dense or compressed.kept is None else str(compressed.kept.path.absolute()),
        }
        checkpoint["trains_grids"] = self.trains_grids
        checkpoint["masks"] = compressed.masks and [
            tuple(torch.tensor(places) for places in layer) for layer in compressed.masks.kept
        ]
        # Apart from the hyper-parameters, which `load_from_checkpoint` overwrites with its keyword arguments.
        checkpoint["lora"] = self.hparams["lora"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the base that a checkpoint's adapters were trained on, and makes sure that the adapters fit.

        Raises:
            UserError: the checkpoint belongs to another base, its base no longer exists, its adapters have another kind
                or shape, or it holds scales and minima of the base where adapters are trained, or the reverse.
        """
        self._find_base(checkpoint)
        self.check_adapters(checkpoint)
        self._check_trained_parts(bool(checkpoint.get("trains_grids")))
        self.configure_model()
        self._check_state(checkpoint["state_dict"])
        if masks := checkpoint.get("masks"):
            self.compressed.mask([(groups.tolist(), channels.tolist()) for groups, channels in masks])

    def _find_base(self, checkpoint: dict[str, Any]) -> None:
        entry = checkpoint["base"]
        folder = self._folder_of(checkpoint)
        if self.held is None and folder is not None and (self.kept_in is None or not is_compressed(self.kept_in)):
            if is_reachable(self.base):
                self.check_trained_on(checkpoint, self._of_first(lambda: model_fingerprint(self.base)))
            self._open_kept(folder, entry["sha256"])
            return
        self.load_base()
        self.check_trained_on(checkpoint, self.compressed.base_sha256)
        if self.compressed.identity == entry["sha256"]:
            return
        if folder is None:
            raise _other_base("that was not compressed")
        if self.compressed.base_state is not State.DENSE and (
            not is_compressed(folder) or read_plan(folder) != self.compressed.plan
        ):
            raise _other_base("that was compressed by another plan")
        self._open_kept(folder, entry["sha256"])

    def _folder_of(self, checkpoint: dict[str, Any]) -> Path | None:
        """The folder that holds the base of a checkpoint: the one that it names, else a nearby one with the same base.

        None for a dense base.
        """
        entry = checkpoint["base"]
        if entry["folder"] is None:
            return None
        path = checkpoint["hyper_parameters"].get(LOADED_FROM) or (self._trainer and self.trainer.ckpt_path)
        roots = [] if self._trainer is None else [Path(self.trainer.default_root_dir)]
        return keeping_folder(
            Path(entry["folder"]), entry["sha256"], Path(path) if path else None, roots, compressible.BASES
        )

    def _open_kept(self, folder: Path, sha256: str) -> None:
        """Opens the compressed base of a checkpoint.

        Raises:
            UserError: the folder no longer holds that base.
        """
        there = identity_in(folder)
        if there != sha256:
            what = "is not there any more" if there is None else f"is another one by now (SHA-256 {there})"
            raise UserError(
                f"The checkpoint was trained on the compressed base in {str(folder)!r} (SHA-256 {sha256}), which "
                f"{what}. Put that folder back; the base cannot be made again from its plan."
            )
        self.open_base(folder)

    def check_trained_on(self, checkpoint: dict[str, Any], base_sha256: str | None) -> None:
        """Makes sure that the adapters of a checkpoint were trained on the base with a given fingerprint.

        Raises:
            UserError: they were not.
        """
        trained_on = checkpoint["base"]["dense_sha256"]
        if trained_on != base_sha256:
            raise UserError(
                f"The checkpoint's adapters were trained on another base model ({trained_on}) than {self.base!r} "
                f"({base_sha256}). Give the base they were trained on as --model.base."
            )

    def check_adapters(self, checkpoint: dict[str, Any]) -> None:
        """Makes sure that the adapters of a checkpoint have the rank, alpha and target modules of this module's.

        Raises:
            UserError: they differ in one of these.
        """
        stored, ours = checkpoint["lora"], self.hparams["lora"]
        if different := [key for key in ("r", "alpha", "target_modules") if stored[key] != ours[key]]:
            differences = ", ".join(f"{key} {brief(stored[key])} there, {brief(ours[key])} here" for key in different)
            raise UserError(
                f"The checkpoint's adapters are of another kind: {differences}. Use the --model.lora of its run."
            )

    def _check_trained_parts(self, grids: bool) -> None:
        """Makes sure that a fit trains the same parameters as that of the checkpoint; outside a fit, adopts its choice.

        Args:
            grids: whether the checkpoint's fit trained scales and minima of the base rather than adapters.

        Raises:
            UserError: the two fits train different parameters.
        """
        if grids != self.trains_grids and self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            there, here = ("base's scales and minima", "adapters")[:: 1 if grids else -1]
            raise UserError(
                f"The checkpoint is of a fit that trains the {there}, and this fit trains the {here}. Give both the "
                f"same callbacks, or begin a new fit."
            )
        self.trains_grids = grids

    def _check_state(self, state: dict[str, torch.Tensor]) -> None:
        """Makes sure that a checkpoint holds every trained parameter of the model, in its shape, and nothing else.

        Raises:
            UserError: a tensor is missing, superfluous or of another shape.
        """
        # Loading is not strict, as the base is left out, so a missing adapter would silently keep its initial values.
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


def _other_base(how: str) -> UserError:
    return UserError(
        f"The checkpoint's adapters were trained on a base {how}. Compress it as the run of the checkpoint did, or "
        f"begin a new fit."
    )
