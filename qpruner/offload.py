"""Keeps weights and hidden states in files while they are not in use: for models larger than a device, or memory.

Only one decoder block of a model runs at a time (`qpruner.calibration.blocks`). The other blocks of an offloaded model
lie in memory-mapped files: dense weights in the safetensors of the base, which transformers maps directly, and the
results of a compression in unnamed files, which disappear with the process. Every tensor can be accessed at any time,
so that code which is not aware of offloading is slower but just as correct.

A block that is about to run moves to the compute device. Afterwards its weights are where they were, new tensors are
written to a file, and the system may reclaim the memory that holds copies of files.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qpruner.anatomy import decoder_blocks
from qpruner.errors import UserError
from qpruner.files import writing
from qpruner.likelihood import causal_model

OffloadChoice = Literal["auto", "never", "always"]

WHOLE = 2
"""Memory for compressing a whole model, as a multiple of its dense weights: these and the results."""
PAGEOUT = 21
"""MADV_PAGEOUT of Linux: pages leave memory and nothing is lost; see madvise(2)."""


@dataclass(frozen=True)
class Offload:
    """Puts tensors into files.

    Args:
        folder: folder of the files, on a disk with room for the weights of a compressed model.
    """

    folder: Path

    def shelve(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values that lies in a file, which is gone when nothing refers to the tensor any more.

        Args:
            tensor: tensor on the CPU.

        Raises:
            UserError: the disk has no room.
        """
        if not tensor.numel():
            return tensor
        with writing(self.folder), NamedTemporaryFile(dir=self.folder, prefix=".offload-") as file:
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            shelved = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
        return shelved.view(tensor.shape)

    def shelve_(self, module: nn.Module) -> None:
        """Puts the weights of a module that lie in no file into one, but for packed ones, which are small."""
        parameters = [
            parameter
            for part in module.modules()
            if all(parameter.is_floating_point() for parameter in part.parameters(recurse=False))
            for parameter in part.parameters(recurse=False)
            if parameter.device.type == "cpu" and not parameter.requires_grad
        ]
        mapped = _mapped_from_files()
        for parameter in parameters:
            if not any(start <= parameter.data_ptr() < end for start, end in mapped):
                parameter.data = self.shelve(parameter.data)


class Shelf:
    """Tensors that lie in files but for the times that something works with them.

    Args:
        tensors: tensors, which nobody writes to from here on.
        offload: what puts tensors into files; None to leave them as they are.

    Raises:
        UserError: the disk has no room.
    """

    def __init__(self, tensors: Iterable[Tensor], offload: Offload | None) -> None:
        self._places = [] if offload is None else [(tensor, tensor.device) for tensor in tensors]
        for tensor, _ in self._places:
            assert offload is not None
            tensor.data = offload.shelve(tensor.data.cpu())
        self._let_go()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The tensors where they were."""
        homes = [tensor.data for tensor, _ in self._places]
        try:
            for tensor, device in self._places:
                tensor.data = tensor.data.to(device)
            yield
        finally:
            for (tensor, _), home in zip(self._places, homes, strict=True):
                tensor.data = home
            self._let_go()

    def _let_go(self) -> None:
        let_go(tensor for tensor, _ in self._places if tensor.numel())


def offload_(model: Any, offload: Offload | None) -> None:
    """Lets the blocks of a model, whose weights are frozen, lie in files from here on, or none of them any more.

    A model that no longer is offloaded is in host memory, from where it may be moved as a whole.
    """
    causal = causal_model(model)
    if offload is None and offload_of(model) is not None:
        causal.to("cpu")  # what is no block was on the device that computes
    causal.offload_of_qpruner = offload  # of the model, so that a copy with the same tensors has it, too
    if offload is not None:
        offload.folder.mkdir(parents=True, exist_ok=True)
        for block in decoder_blocks(causal):
            offload.shelve_(block.requires_grad_(False))


def offload_of(model: Any) -> Offload | None:
    """What puts the blocks of a model into files; None for a model that is whole."""
    offload: Offload | None = getattr(causal_model(model), "offload_of_qpruner", None)
    return offload


def outside_blocks(model: Any) -> list[Tensor]:
    """The parameters and buffers of a model that belong to no block, and so stay on the device that computes."""
    inside = {id(tensor) for block in decoder_blocks(causal_model(model)) for tensor in tensors_of(block)}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]


@contextmanager
def opened(model: Any, part: nn.Module) -> Iterator[None]:
    """A part of a model that is read, or given new weights, where it lies; a model that is whole need not be told.

    Args:
        model: model that the part is of.
        part: decoder block, or a part of one.
    """
    offload = offload_of(model)
    before = [] if offload is None else [tensor.data for tensor in tensors_of(part)]
    yield
    if offload is not None:
        offload.shelve_(part)
        let_go((*before, *tensors_of(part)))  # a file stays mapped as long as anything of it is in use


@contextmanager
def at_work(block: nn.Module, device: torch.device, offload: Offload | None) -> Iterator[None]:
    """Moves a block to the compute device; afterwards it is back where it was, including its new tensors.

    Within the context, parameters must be replaced by new tensors rather than changed in place.

    Args:
        block: decoder block.
        device: device that computes.
        offload: what puts blocks into files; None for a block of a model that is whole, which stays where it is.
    """
    if offload is None:
        yield
        return
    # With the tensors themselves: one that goes meanwhile would leave its id to one that comes.
    homes = {id(tensor): (tensor, tensor.data) for tensor in tensors_of(block)}
    home = next(data.device for _, data in homes.values())
    try:
        for tensor in tensors_of(block):
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor in tensors_of(block):
            tensor.data = homes[id(tensor)][1] if id(tensor) in homes else tensor.data.to(home)
        offload.shelve_(block)
        let_go((*(data for _, data in homes.values()), *tensors_of(block)))


@contextmanager
def passing(model: Any) -> Iterator[None]:
    """Allows forward passes through a whole model, whose blocks move to the device one after the other."""
    offload = offload_of(model)
    if offload is None:
        yield
        return
    device = outside_blocks(model)[0].device
    with ExitStack() as stack:
        for block in decoder_blocks(causal_model(model)):
            working = ExitStack()

            def enter(module: nn.Module, inputs: Any, working: ExitStack = working) -> None:
                working.enter_context(at_work(module, device, offload))

            def leave(module: nn.Module, inputs: Any, output: Any, working: ExitStack = working) -> None:
                working.close()

            stack.callback(working.close)
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        yield


def let_go(tensors: Iterable[Tensor]) -> None:
    """Lets the system take back memory that holds copies of files; it reads them again when they are wanted.

    On Linux at once, elsewhere when it needs the memory.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:  # an advice that is not taken costs nothing
                advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGEOUT)


def choose(choice: OffloadChoice, num_bytes: int, device: torch.device, num_processes: int = 1) -> tuple[bool, str]:
    """Whether a model is offloaded, and why, in a sentence.

    Args:
        choice: what was asked for.
        num_bytes: bytes of the dense weights.
        device: device that computes.
        num_processes: processes of this machine that hold the model, in host memory each what becomes of the weights.

    Raises:
        UserError: ``always``, on another system than Linux.
    """
    knows = sys.platform == "linux"  # which memory holds copies of files
    if choice == "always" and not knows:
        raise UserError("--model.offload always needs Linux. Use never, and a device with room for the whole model.")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    needed = num_bytes * (WHOLE if device.type == "cuda" else WHOLE - 1 + num_processes)
    offloads = choice == "always" or (choice == "auto" and knows and free is not None and needed > free)
    how = "block by block from files" if offloads else "as a whole"
    room = "does not say what it has" if free is None else f"has {free:,}"
    return offloads, (
        f"The model is worked on {how} (offload {choice}): its dense weights take {num_bytes:,} bytes, work as a whole "
        f"up to {needed:,}, and {'the system' if device.type == 'cpu' else device} {room} free."
    )


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _available() -> int | None:
    """Bytes of memory that a process can have without swapping; None where no system like Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _mapped_from_files() -> list[tuple[int, int]]:
    """The addresses of this process that are mapped from files; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = (line.split(maxsplit=5) for line in lines)
    ranges = (field[0].split("-") for field in fields if len(field) > 5 and field[5].startswith("/"))
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
