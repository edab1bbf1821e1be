"""The checkpoint file that a fit resumes from, validated before a model is built for it."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from qpruner.adapters.lora import LoRAConfig
from qpruner.files import reading
from qpruner.pretrained import DType
from qpruner.schema import conform
from qpruner.training.optimization import OptimizerConfig

REMEDY = "Copy the file again, or begin the fit anew: with --restart, or without --ckpt_path."


class Options(TypedDict):
    """Options of the LightningModule, as a checkpoint stores them."""

    base: str
    dtype: DType
    trust_remote_code: bool
    gradient_checkpointing: bool
    lora: LoRAConfig
    optimizer: OptimizerConfig
    seed: int


class AdapterKind(TypedDict):
    """Options in which adapters must agree to continue from those of a checkpoint."""

    r: int
    alpha: float
    target_modules: list[str] | str


class BaseOfCheckpoint(TypedDict):
    """The base that adapters were trained on.

    Args:
        name: folder or hub name of the dense model.
        dense_sha256: fingerprint of the dense model.
        sha256: hash that identifies the base; that of the dense model where the base was not changed.
        folder: folder that holds the base; None for the unchanged dense model.
    """

    name: str
    dense_sha256: str | None
    sha256: str | None
    folder: str | None


FitCheckpoint = TypedDict(
    "FitCheckpoint",
    {
        "pytorch-lightning_version": str,
        "state_dict": dict[str, Tensor],
        "hyper_parameters": Options,
        "base": BaseOfCheckpoint,
        "masks": NotRequired[list[tuple[Tensor, ...]] | None],
        "trains_grids": NotRequired[bool],
        "lora": AdapterKind,
    },
)
"""Contents of a checkpoint that the module relies on, beside what Lightning stores."""


class GatesCheckpoint(TypedDict):
    """Contents of a checkpoint of a fit that learns gates."""

    state_dict: dict[str, Tensor]
    best: dict[str, Any]
    compared_at: int


def read_checkpoint(path: Path, kind: Any = FitCheckpoint) -> dict[str, Any]:
    """Reads the checkpoint of a fit, with its tensors on the CPU.

    Args:
        path: path of the checkpoint.
        kind: type that the content must have.

    Raises:
        UserError: there is no such file, it is damaged, or an entry is missing.
    """
    # For a damaged archive, or a pickle that holds more than plain data, torch may raise any kind of exception.
    with reading(path, REMEDY, (Exception,)):
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    with reading(path, REMEDY):
        checked: dict[str, Any] = conform(content, kind)
    return checked
