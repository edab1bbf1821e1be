"""Parameters and bytes of a model, and the peak use of a period of work; reported separately, never as "memory"."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import decoder_blocks
from qpruner.errors import UserError
from qpruner.likelihood import causal_model
from qpruner.offload import offload_of, outside_blocks, tensors_of
from qpruner.quantization.packed import PackedLinear

LARGER = "Use a larger device or --model.dtype bfloat16."


def distinct_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and persistent buffers, each storage once, so that tied weights do not count twice."""
    seen: set[int] = set()
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            storage = tensor.data_ptr() or id(tensor)  # on the meta device all have none
            if storage not in seen:
                seen.add(storage)
                yield tensor


def num_parameters(model: nn.Module) -> int:
    """Weights of a model, shared ones once; of a packed linear, as many as it stands for, whatever its bytes."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    codes = {id(parameter) for module in packed for parameter in module.parameters() if parameter is not module.bias}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in codes)
    return plain + sum(module.out_features * module.in_features for module in packed)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the whole model would hold, file headers apart."""
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct_tensors(model))


def check_room(model: nn.Module, device: torch.device, remedy: str = LARGER) -> None:
    """Makes sure that a model's weights fit on a device before they are moved there.

    Args:
        model: model, or an outline of it on the meta device.
        device: device that it is going to be moved to.
        remedy: what can be done where there is no room, said at the end of the error.

    Raises:
        UserError: they do not.
    """
    if device.type == "cuda":
        elsewhere = [tensor for tensor in distinct_tensors(model) if tensor.device.type != "cuda"]
        check_free(sum(tensor.numel() * tensor.element_size() for tensor in elsewhere), device, remedy)


def place_(model: Any, device: torch.device) -> None:
    """Moves a model to a device; of an offloaded one all but its blocks.

    Raises:
        UserError: no room on the device, for an offloaded one also for its largest block.
    """
    if offload_of(model) is None:
        check_room(model, device)
        model.to(device)
        return
    outside = outside_blocks(model)
    largest = max(sum(tensor.nbytes for tensor in tensors_of(block)) for block in decoder_blocks(causal_model(model)))
    check_free(sum(tensor.nbytes for tensor in outside if tensor.device.type != device.type) + largest, device, LARGER)
    for tensor in outside:
        tensor.data = tensor.data.to(device)


def check_free(needed: int, device: torch.device, remedy: str) -> None:
    """Makes sure that a device has a number of bytes free for weights.

    Args:
        needed: bytes that are going to be moved there.
        device: device that they are going to be moved to.
        remedy: what can be done where there is no room, said at the end of the error.

    Raises:
        UserError: the device has fewer bytes free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise UserError(
                f"The model needs {needed:,} more bytes for its weights alone, and {device} has {free:,} free. {remedy}"
            )


@contextmanager
def freeing_cycles() -> Iterator[None]:
    """Frees, at its end, what was made inside and refers to itself, as a Trainer, its optimizers and their moments do.

    Python would look for that when a quarter of all objects are new: after a hundred fits in a process that has
    imported much. What was there before is left out here, so that it takes milliseconds.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def peak_meaning(device: torch.device) -> str:
    """What `read_peak` measures there."""
    return f"allocated on {device.type}" if device.type == "cuda" else "resident set of the process"


def reset_peak(device: torch.device) -> None:
    """Resets the peak of memory use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_resident_peak()


def read_peak(device: torch.device) -> int | None:
    """Highest use of memory since `reset_peak`, in bytes; None where the system does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()


def _reset_resident_peak() -> None:
    # Without Linux, or without the permission, the peak is that of the process so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5 forgets the peak; see proc(5)


def _resident_peak() -> int | None:
    """VmHWM of Linux, the one system that lets it start anew."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
