"""Finds the teacher of a fit, and records what it says where that is asked for."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from qpruner.datamodules.loader import ResumableLoader
from qpruner.datamodules.rows import TextExamples
from qpruner.errors import UserError
from qpruner.pretrained import DType, held_in, model_fingerprint
from qpruner.processes import of_first
from qpruner.training.compressible import CompressibleModule
from qpruner.training.distillation import DistillationConfig
from qpruner.training.recording import Form, Recording, rows_of_fit
from qpruner.training.teacher import OnlineTeacher, Teacher, check_teacher, load_teacher, name_of_teacher

RECORDED = "teacher"
"""Folder under the Trainer's ``default_root_dir`` of what teachers said."""


def engage_teacher(
    config: DistillationConfig, module: CompressibleModule, trainer: Trainer, folder: Path | None
) -> Teacher:
    """The teacher of a fit; to be called by all processes together, before anything is done to the student's base.

    Args:
        config: options of the distillation.
        module: module that is taught, with its base.
        trainer: Trainer of the fit.
        folder: folder of what teachers said; None for `RECORDED` under the Trainer's ``default_root_dir``.

    Raises:
        UserError: the teacher is not there, does not go with the student, or has no room.
    """
    device = trainer.strategy.root_device if config.device is None else torch.device(config.device)
    teacher = check_teacher(config, module.base, module.model.config, trust_remote_code=module.trust_remote_code)
    if config.teacher == "online":
        return OnlineTeacher(_load(config, module, device), config, device)
    folder = folder or Path(trainer.default_root_dir) / RECORDED
    recording = _recording(config, module, trainer, folder, form_of(config, teacher, module.dtype_of_base))
    strategy = trainer.strategy
    missing = of_first(recording.missing, is_first=trainer.is_global_zero, broadcast=strategy.broadcast)
    if missing:
        needed = of_first(
            lambda: recording.check_room(missing), is_first=trainer.is_global_zero, broadcast=strategy.broadcast
        )
        rank_zero_info(f"Recording what the model that teaches says: {needed:,} bytes in {str(recording.folder)!r}.")
        if mine := missing[trainer.global_rank :: trainer.world_size]:
            network = _load(config, module, device).to(device)
            recording.record(network, mine, device=device, forward_context=trainer.precision_plugin.forward_context)
        strategy.barrier()
        if recording.missing():
            raise UserError(
                f"What other processes recorded of the model that teaches is not in {str(recording.folder)!r}. Name a "
                f"--run.dir on a disk that all machines share."
            )
    return recording


def form_of(config: DistillationConfig, teacher: Any, dtype_of_base: DType) -> Form:
    """What is recorded of each token.

    Args:
        config: options of the distillation.
        teacher: configuration of the teacher.
        dtype_of_base: number format that was asked for the student's base.
    """
    text = teacher.get_text_config()
    dtype = held_in(teacher, config.held_in(dtype_of_base))
    return Form(
        top_k=min(config.top_k, text.vocab_size - 1) if config.logits else 0,
        temperature=config.temperature,
        hidden_size=text.hidden_size if config.hidden else 0,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=text.vocab_size,
    )


def _recording(
    config: DistillationConfig, module: CompressibleModule, trainer: Trainer, folder: Path, form: Form
) -> Recording:
    """What is going to be, or was, recorded for a fit."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    loader = data and data.train_dataloader()
    if not isinstance(loader, ResumableLoader) or not isinstance(loader.examples, TextExamples):
        raise UserError(
            f"A teacher is recorded on the rows of a data module of qpruner, and the fit has "
            f"{type(data or loader).__name__}. Have the teacher online."
        )
    name, sha256 = name_of_teacher(config, module.base), module.compressed.base_sha256
    if name != module.compressed.base:
        sha256 = of_first(
            lambda: model_fingerprint(name), is_first=trainer.is_global_zero, broadcast=trainer.strategy.broadcast
        )
    rows = rows_of_fit(loader, trainer.max_epochs, trainer.max_steps)
    return Recording(folder, loader.examples, rows, form, [sha256 or name, config.dtype, str(trainer.precision)])


def _load(config: DistillationConfig, module: CompressibleModule, device: torch.device) -> torch.nn.Module:
    network: torch.nn.Module = load_teacher(
        config,
        name_of_teacher(config, module.base),
        dtype=module.dtype_of_base,
        trust_remote_code=module.trust_remote_code,
        device=device,
    )
    return network
