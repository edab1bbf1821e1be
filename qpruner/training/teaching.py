"""Finds the teacher of a fit, and records its outputs where that is requested."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from qpruner.datamodules.loader import ResumableLoader
from qpruner.datamodules.rows import TextExamples
from qpruner.errors import UserError
from qpruner.pretrained import DType, held_in, model_fingerprint
from qpruner.processes import Processes, of_first
from qpruner.training.compressible import CompressibleModule
from qpruner.training.distillation import DistillationConfig
from qpruner.training.processes import processes_of
from qpruner.training.recording import Form, Recording, rows_of_fit
from qpruner.training.teacher import OnlineTeacher, Teacher, check_teacher, load_teacher, name_of_teacher

RECORDED = "teacher"
"""Folder of recorded teacher outputs under the Trainer's ``default_root_dir``."""


def engage_teacher(
    config: DistillationConfig, module: CompressibleModule, trainer: Trainer, folder: Path | None
) -> Teacher:
    """The teacher of a fit; a collective call of all processes, before the student's base is changed.

    Args:
        config: options of the distillation.
        module: module that is taught, with its base.
        trainer: Trainer of the fit.
        folder: folder of recorded teacher outputs; None for `RECORDED` under the Trainer's ``default_root_dir``.

    Raises:
        UserError: on one of the processes the teacher does not exist, does not match the student, or has no room; or
            a rehearsal (``fast_dev_run``) would record it.
    """
    if config.teacher == "recorded" and trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            "distillation.teacher is recorded, and a rehearsal (fast_dev_run) writes no files. Rehearse with "
            "--model.distillation.teacher online."
        )
    processes = processes_of(trainer)
    device = processes.device if config.device is None else torch.device(config.device)

    def load() -> torch.nn.Module:
        network: torch.nn.Module = load_teacher(
            config,
            name_of_teacher(config, module.base),
            dtype=module.dtype_of_base,
            trust_remote_code=module.trust_remote_code,
            device=device,
        )
        return network

    def look() -> tuple[Any, torch.nn.Module | None]:
        student = module.model.config
        teacher = check_teacher(config, module.base, student, trust_remote_code=module.trust_remote_code)
        return teacher, load() if config.teacher == "online" else None

    teacher, network = processes.of_each(look)
    if network is not None:
        return OnlineTeacher(network, config, device)
    folder = folder or Path(trainer.default_root_dir) / RECORDED
    recording = _recording(config, module, trainer, folder, form_of(config, teacher, module.dtype_of_base))
    record_missing(recording, load, device, processes)
    return recording


def record_missing(
    recording: Recording, load: Callable[[], torch.nn.Module], device: torch.device, processes: Processes
) -> None:
    """Records the missing parts, a share of them on each process.

    Args:
        recording: recording of the rows that the fit will need.
        load: function that loads the teacher; it is called only where there is something to record.
        device: device that the teacher runs on.
        processes: processes that share the parts.

    Raises:
        UserError: one of the processes has no room, or does not see the files of the others.
    """
    missing = processes.of_first(recording.missing)
    if not missing:
        return
    needed = processes.of_first(lambda: recording.check_room(missing))
    rank_zero_info(f"Recording what the model that teaches says: {needed:,} bytes in {str(recording.folder)!r}.")

    def record() -> None:
        if mine := missing[processes.rank :: processes.world_size]:
            recording.record(load().to(device), mine, device=device, forward_context=processes.forward_context)

    def check() -> None:
        if recording.missing():
            raise UserError(
                f"What other processes recorded of the model that teaches is not in {str(recording.folder)!r}. Name a "
                f"--run.dir on a disk that all machines share."
            )

    processes.of_each(record)
    processes.of_each(check)


def form_of(config: DistillationConfig, teacher: Any, dtype_of_base: DType) -> Form:
    """What is recorded for each token.

    Args:
        config: options of the distillation.
        teacher: configuration of the teacher.
        dtype_of_base: number format that was requested for the student's base.
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
    """The recording for a fit, whether or not its files exist yet."""
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
