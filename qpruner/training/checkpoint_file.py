"""The file that a fit goes on from, looked at before a model is made for it."""

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
    """The options of the module."""

    base: str
    dtype: DType
    trust_remote_code: bool
    gradient_checkpointing: bool
    lora: LoRAConfig
    optimizer: OptimizerConfig
    seed: int


class AdapterKind(TypedDict):
    """What adapters must agree in to go on from others."""

    r: int
    alpha: float
    target_modules: list[str] | str


class BaseOfCheckpoint(TypedDict):
    """The base that adapters were trained on.

    Args:
        name: folder or hub name of the dense model.
        dense_sha256: fingerprint of the dense model.
        sha256: hash by which the base is known; that of the dense model where nothing was done to it.
        folder: folder that keeps the base; None for the dense model as it came.
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
"""What the module keeps in a checkpoint, beside what Lightning does."""


class GatesCheckpoint(TypedDict):
    """What a fit keeps in a checkpoint that learns gates."""

    state_dict: dict[str, Tensor]


def read_checkpoint(path: Path, kind: Any = FitCheckpoint) -> dict[str, Any]:
    """What the checkpoint of a fit holds, on the CPU.

    Args:
        path: path of the checkpoint.
        kind: what it must hold.

    Raises:
        UserError: there is no such file, it is damaged, or it lacks something.
    """
    # Where the archive is damaged, or its pickle holds more than plain data, torch raises whatever it stumbles over.
    with reading(path, REMEDY, (Exception,)):
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    with reading(path, REMEDY):
        checked: dict[str, Any] = conform(content, kind)
    return checked
