"""Loads the model that a compression begins with."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpruner import adapter_files, model_folder
from qpruner.anatomy import architecture_of, is_compressible
from qpruner.folder_manifest import is_compressed
from qpruner.likelihood import check_head
from qpruner.offload import Offload, OffloadChoice, choose, offload_
from qpruner.plan import CompressionPlan
from qpruner.pretrained import DType, held_in, hold_in_, load_model, resolve, weight_bytes
from qpruner.quantization.packed import PackedLinear


def choose_offload(
    base: str,
    choice: OffloadChoice,
    *,
    dtype: DType,
    trust_remote_code: bool,
    device: torch.device,
    num_processes: int,
    folder: Path,
    say: Callable[[str], object],
) -> Offload | None:
    """Chooses whether the blocks of a base lie in files while it is compressed; None to hold it whole in memory.

    The result is None, too, for bases that are packed, of an unknown family, or not downloaded yet (of unknown size).

    Args:
        base: folder, hub name, or ``qpruner/stories``.
        choice: option that the user set.
        dtype: number format of the weights in memory.
        trust_remote_code: whether code that comes with the model may run.
        device: device that computes.
        num_processes: number of processes on this machine that compress together.
        folder: folder for the files.
        say: function that receives a message on what was chosen, and why.
    """
    if choice == "never" or _is_packed(base):
        return None
    config = model_folder.read_base_config(base, trust_remote_code=trust_remote_code)
    num_bytes = weight_bytes(base, config, dtype)
    if num_bytes is None or not is_compressible(config):
        return None
    offloads, reason = choose(choice, num_bytes, device, num_processes)
    say(reason)
    return Offload(folder) if offloads else None


def _is_packed(base: str) -> bool:
    """Whether a base holds codes, which are small enough to be whole."""
    folder = Path(resolve(base))
    return is_compressed(folder) and model_folder.read_plan(folder).quantized


@dataclass(frozen=True)
class DenseBase:
    """A model that is taken as dense, whatever it holds.

    Args:
        network: model of transformers, frozen.
        sha256: fingerprint of its files; None where they are not at hand.
        plan: plan that keeps all of it, in the precisions that it has; None to take it for dense.
    """

    network: Any
    sha256: str | None
    plan: CompressionPlan | None


def load_dense_base(
    base: str,
    *,
    dtype: DType,
    trust_remote_code: bool,
    say: Callable[[str], None],
    fingerprint: Callable[[str], str | None],
    check_hashes: bool,
    offload: Offload | None = None,
) -> DenseBase:
    """Loads the model of a folder or of the hub; from a compressed folder, its model without adapters.

    Args:
        base: folder, hub name, or ``qpruner/stories``.
        dtype: number format of the weights in memory; see `held_in`.
        trust_remote_code: whether code that comes with the model may run.
        say: function that receives messages for the user about the model.
        fingerprint: function that computes the fingerprint of a base; it reads all of the base's files.
        check_hashes: whether the hash of every file of a compressed base is checked, beside its size.
        offload: holder of the blocks of a compressible model in files; None to hold them in memory.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    plan = None
    if is_compressed(folder := Path(resolve(base))):
        content = model_folder.load_base(folder, check_hashes=check_hashes)
        network, layers = content.network, content.plan.layers
        if not any(isinstance(module, PackedLinear) for module in network.modules()):
            hold_in_(network, held_in(network.config, dtype))
            if offload is not None:
                offload_(network, offload)
        if adapter_files.has_adapters(folder):
            warnings.warn(f"{base!r} is taken as the base without its adapters.", stacklevel=3)
        sha256 = fingerprint(base)
        plan = CompressionPlan.dense(architecture_of(network.config), sha256).with_precision(
            [layer.precision for layer in layers], embedding=content.plan.embedding, head=content.plan.head
        )
    else:
        network = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code, say=say, offload=offload)
        sha256 = fingerprint(base)
    if not is_compressible(network.config):  # of the others the heads are known
        check_head(network)
    return DenseBase(network.requires_grad_(False), sha256, plan)
