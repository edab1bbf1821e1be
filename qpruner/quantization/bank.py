"""A bank: every linear of a narrowed model in every precision that a plan may ask for, quantized once.

Candidate plans are then assembled from the bank in place, at the cost of swapping modules, and are bit for bit what
quantizing the model anew would give. The dense linears are the model's own; only packed ones take additional memory.
Calibrated rounding in a bank uses the inputs that linears have in the dense model
(`qpruner.quantization.calibrated_bank`); when `qpruner.quantization.calibrated` carries out a plan, it rounds again, on
the actual inputs of the linears.

In a folder, a bank is one safetensors file per layer, either complete or absent, so that an interrupted bank can be
completed and processes can share the work; tensors are memory-mapped and read when they are used. The name of a tensor
is ``linear/precision/part``, where a part is a tensor that the format documents, ``lora_A`` or ``lora_B``.
"""

import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qpruner.anatomy import unit_linears
from qpruner.errors import UserError
from qpruner.files import hash_json, replacing
from qpruner.offload import offload_of, opened
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.quantization.apply import (
    Factors,
    LoftQSettings,
    Quantized,
    adapter_ranks,
    check_rank,
    linear_precisions,
    quantize_linear,
)
from qpruner.quantization.calibrated_bank import BankText, TextRounding, rounded_layers
from qpruner.quantization.formats import dequantize, num_bytes, rebuild
from qpruner.quantization.packed import PackedLinear


class Bank:
    """The packed linears of a model, from which plans are assembled.

    Args:
        model: narrowed model with its dense linears in place; these are used where a plan leaves a unit dense.
        tensors: tensors of the packed linears, named as the docstring of the module describes.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        names = [name for units in unit_linears(model) for names in units.values() for name in names]
        self.dense: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self.tensors = tensors
        self._parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            entry, _, part = key.rpartition("/")
            self._parts.setdefault(entry, {})[part] = tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and adapter factors, excluding the dense linears."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def linear(self, name: str, precision: Precision) -> nn.Linear | PackedLinear:
        """A linear in a precision; a packed one shares the tensors of the bank.

        Raises:
            UserError: the bank does not hold the linear in this precision.
        """
        dense = self.dense[name]
        if precision == DENSE:
            return dense
        bias = None if dense.bias is None else dense.bias.detach()
        state = self._entry(name, precision)
        shape = dense.out_features, dense.in_features
        return rebuild(state, *shape, precision=precision, bias=bias, dtype=dense.weight.dtype)

    def factors(self, name: str, precision: Precision) -> Factors | None:
        """The initial factors of the adapter on a linear in a precision; None where the adapter starts at zero."""
        if precision == DENSE or "lora_A" not in (entry := self._entry(name, precision)):
            return None
        return entry["lora_A"], entry["lora_B"]

    def entry(self, name: str, precision: Precision) -> dict[str, Tensor]:
        """The tensors of a linear in a precision, under the names that they have in a bank.

        Raises:
            UserError: the bank does not hold the linear in this precision.
        """
        return {f"{_key(name, precision)}/{part}": tensor for part, tensor in self._entry(name, precision).items()}

    def weight(self, name: str, precision: Precision, device: torch.device) -> Tensor:
        """The weight of a linear in a precision, on a device; float32 [out, in]."""
        linear = self.linear(name, precision).to(device)
        return dequantize(linear) if isinstance(linear, PackedLinear) else linear.weight.detach().float()

    def place_(self, model: nn.Module, names: Iterable[str], precision: Precision) -> None:
        """Puts linears of the model, given by name, into a precision, unless they are in it already."""
        offloaded = offload_of(model) is not None  # if so, dense linears stay where their block is
        for name in names:
            present: Any = model.get_submodule(name)
            if getattr(present, "precision", DENSE) != precision:
                placed = self.linear(name, precision)
                if precision != DENSE or not offloaded:
                    placed = placed.to(_device(model))
                model.set_submodule(name, placed.train(present.training))
                if precision != DENSE and not offloaded:
                    self.dense[name].cpu()  # the device may have no room for both

    def assemble_(self, model: nn.Module, plan: CompressionPlan) -> dict[str, Factors]:
        """Puts every linear of the model into the precision of a plan, whatever plan was assembled before.

        Where the plan sets a lower rank for a layer than the bank has, adapters start from the leading part of the
        bank's factors.

        Args:
            model: model that the bank was made for, without adapters; its embedding and head are left alone.
            plan: plan whose widths the model has, with no rank above that of the bank.

        Returns:
            Initial factors of the adapters, by the name of their linear.

        Raises:
            UserError: the bank lacks a linear in a precision of the plan, or the plan has a rank above the bank's.
        """
        factors: dict[str, Factors] = {}
        ranks = adapter_ranks(model, plan)
        for name, precision in linear_precisions(model, plan).items():
            self.place_(model, [name], precision)
            if (start := self.factors(name, precision)) is not None:
                lora_A, lora_B = start
                if (ranks[name] or 0) > len(lora_A):
                    raise UserError(
                        f"The plan has adapters of rank {ranks[name]} on {name}, and the bank was filled for "
                        f"{len(lora_A)}. Raise --model.lora.r to the highest rank of the plan."
                    )
                factors[name] = lora_A[: ranks[name]], lora_B[:, : ranks[name]]
        return factors

    def _entry(self, name: str, precision: Precision) -> Mapping[str, Tensor]:
        try:
            return self._parts[_key(name, precision)]
        except KeyError:
            held = sorted({key.partition("/")[2] for key in self._parts})
            raise UserError(
                f"The bank does not hold {name} in {precision}; it holds {', '.join(held)}. Fill it with the "
                f"precisions that plans ask for."
            ) from None


def fill(
    model: nn.Module,
    precisions: Sequence[Precision],
    settings: LoftQSettings | None,
    *,
    layers: Iterable[int] | None = None,
    device: torch.device,
    text: BankText | None = None,
) -> Bank:
    """Fills a bank in memory.

    Args:
        model: narrowed and dense model; with ``text``, on the compute device.
        precisions: precisions to quantize to; dense linears need not be listed.
        settings: settings of LoftQ, or of the initialisation that ``text`` configures; None if adapters start at zero.
        layers: numbers of the layers to quantize, all by default; the others can only be dense.
        device: device on which each linear is quantized; the bank is on the CPU.
        text: calibration text and options of rounding by it, which all processes that share the text do together; None
            to round to nearest.

    Raises:
        UserError: no format offers a precision, an adapter's rank exceeds that of its linear, a weight is not finite,
            or, with ``text``, the model has experts, the text is too short, or what reaches a linear is not finite.
    """
    names = _linears(model)
    numbers = list(range(len(names)) if layers is None else layers)
    wanted = [precision for precision in precisions if precision != DENSE]
    tensors: dict[str, Tensor] = {}
    if text is not None:
        for _, layer in _rounded(model, names, wanted, settings, numbers, text):
            tensors |= layer
    else:
        for number in numbers:
            tensors |= _quantized(model, names[number], wanted, settings, device)
    return Bank(model, tensors)


def fill_folder(
    folder: Path,
    model: nn.Module,
    precisions: Sequence[Precision],
    settings: LoftQSettings | None,
    *,
    base: str | None,
    layers: Iterable[int] | None = None,
    processes: Processes,
    text: BankText | None = None,
) -> Bank:
    """Fills a bank in a folder, and opens it.

    An existing file is reused if it is complete, has all precisions, and was made from the same model, settings and
    text. Other files are made again, with a warning if they are damaged or belong to another bank.

    Args:
        folder: folder of the bank, on a disk that all processes share.
        model: narrowed and dense model; with ``text``, on the compute device.
        precisions: precisions to quantize to.
        settings: settings of LoftQ, or of the initialisation that ``text`` configures; None if adapters start at zero.
        base: hash that identifies the model that the bank belongs to.
        layers: numbers of the layers to quantize, all by default.
        processes: processes that share the work, each with the files of every ``world_size``-th layer, or with its part
            of the text.
        text: calibration text and options of rounding by it; None to round to nearest. The text passes through all
            layers up to the last one that is missing.

    Raises:
        UserError: as `fill`, or the disk is full; on all processes, whichever of them failed.
    """
    origin = _origin(base, settings, next(model.parameters()).dtype, text)
    names = _linears(model)
    layers = list(range(len(names)) if layers is None else layers)
    wanted = [precision for precision in precisions if precision != DENSE]

    def look() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        for number in layers:
            check_rank(model, dict.fromkeys(names[number] if wanted else [], settings))
        return [number for number in layers if not _holds(_path(folder, number), names[number], wanted, origin)]

    def check_disk(missing: Sequence[int]) -> None:
        _check_disk(folder, model, [name for number in missing for name in names[number]], wanted)

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        with replacing(_path(folder, number)) as temporary:
            save_file(tensors, temporary, {"origin": origin})

    def quantize(missing: Sequence[int]) -> None:
        check_disk(missing)
        for number in missing:
            if number % processes.world_size == processes.rank:
                write(number, _quantized(model, names[number], wanted, settings, processes.device))

    def read() -> Bank:
        if unseen := [str(_path(folder, number)) for number in layers if not _path(folder, number).exists()]:
            raise UserError(
                f"{unseen[0]!r} was to be made by another process and is not there. Name a --run.dir on a disk that "
                f"all machines share."
            )
        return open_folder(folder, model, settings, base=base, text=text)

    missing = processes.of_each(look)  # before any process writes a file
    if text is None:
        processes.of_each(lambda: quantize(missing))
    else:
        missing = processes.broadcast(missing)  # all processes pass the text through the same layers
        processes.of_each(lambda: check_disk(missing))
        for number, tensors in _rounded(model, names, wanted, settings, missing, text):
            processes.of_first(partial(write, number, tensors))
    return processes.of_each(read)


def open_folder(
    folder: Path,
    model: nn.Module,
    settings: LoftQSettings | None,
    *,
    base: str | None,
    text: TextRounding | None = None,
) -> Bank:
    """Opens the bank that `fill_folder` left in a folder; the arguments are the same.

    Raises:
        UserError: the folder holds a bank of another model, other settings or another text, or a file was cut off.
    """
    origin = _origin(base, settings, next(model.parameters()).dtype, text)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("layer-*.safetensors")):
        with _opened(path, origin) as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    return Bank(model, tensors)


def _linears(model: nn.Module) -> list[list[str]]:
    """The names of the linears of each layer."""
    return [[name for names in units.values() for name in names] for units in unit_linears(model)]


def _quantized(
    model: nn.Module,
    names: Iterable[str],
    precisions: Sequence[Precision],
    settings: LoftQSettings | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The tensors of the given linears in all precisions, rounded to nearest."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        check_rank(model, dict.fromkeys([name] if precisions else [], settings))
        linear: Any = model.get_submodule(name)
        homes = [(parameter, parameter.data) for parameter in linear.parameters()]
        with opened(model, linear):
            for precision in precisions:
                tensors |= entry_of(name, quantize_linear(linear, precision, name, settings, device))
            for parameter, home in homes:  # quantizing moved them to the device
                parameter.data = home
    return tensors


def _rounded(
    model: nn.Module,
    names: Sequence[Sequence[str]],
    precisions: Sequence[Precision],
    settings: LoftQSettings | None,
    layers: Collection[int],
    text: BankText,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The number and the tensors of each of some layers, in all precisions, rounded by text; same on all processes."""
    for number in layers:
        check_rank(model, dict.fromkeys(names[number] if precisions else [], settings))
    for number, layer in rounded_layers(model, precisions, text, settings, layers):
        tensors: dict[str, Tensor] = {}
        for (name, precision), linear in layer.items():
            tensors |= entry_of_state(name, precision, linear.state, linear.factors)
        yield number, tensors


def entry_of(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of a quantized linear, under the names that they have in a bank."""
    return entry_of_state(name, quantized.packed.precision, quantized.packed.packed(), quantized.factors)


def entry_of_state(
    name: str, precision: Precision, state: Mapping[str, Tensor], factors: Factors | None
) -> dict[str, Tensor]:
    """The tensors of a linear in a precision and the initial factors of its adapter, under their names in a bank."""
    parts = {**state, **({} if factors is None else dict(zip(("lora_A", "lora_B"), factors, strict=True)))}
    return {f"{_key(name, precision)}/{part}": tensor.detach().cpu().contiguous() for part, tensor in parts.items()}


def _key(name: str, precision: Precision) -> str:
    assert precision.leading is None, "a bank holds whole linears; which columns lead is a plan's"
    return f"{name}/{precision.format}-{precision.bits}-{precision.group or 'default'}"


def _path(folder: Path, number: int) -> Path:
    return folder / f"layer-{number:03d}.safetensors"


def _origin(base: str | None, settings: LoftQSettings | None, dtype: torch.dtype, text: TextRounding | None) -> str:
    """The hash that distinguishes a bank from those of other models, settings and texts."""
    start = None if settings is None else asdict(settings)
    return hash_json([base, start, str(dtype), *([] if text is None else text.origin)])


def _holds(path: Path, names: Iterable[str], precisions: Sequence[Precision], origin: str) -> bool:
    """Whether a file has all precisions of its layer; warns if it is damaged or belongs to another bank."""
    if not path.exists():
        return False
    try:
        with _opened(path, origin) as file:
            held = {key.rpartition("/")[0] for key in file.keys()}  # noqa: SIM118  # no mapping
    except UserError as error:
        warnings.warn(f"{error} It is made again.", stacklevel=2)
        return False
    return {_key(name, precision) for name in names for precision in precisions} <= held


def _check_disk(folder: Path, model: nn.Module, names: Iterable[str], precisions: Sequence[Precision]) -> None:
    linears: list[Any] = [model.get_submodule(name) for name in names]
    needed = sum(
        num_bytes(linear.out_features, linear.in_features, precision) for linear in linears for precision in precisions
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The bank of quantized linears needs {needed:,} bytes in {str(folder)!r} and the disk has {free:,} left. "
            f"Free some, or name another place with --run.dir."
        )


def _opened(path: Path, origin: str) -> Any:
    """Opens a file of a bank.

    Raises:
        UserError: the file is missing, cut off, or belongs to a bank of another origin.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole file of a bank: {error}.") from error
    metadata: dict[str, str] = file.metadata() or {}  # type: ignore[no-untyped-call]
    if metadata.get("origin") != origin:
        raise UserError(f"{str(path)!r} belongs to a bank of another model, pruning, LoftQ start or calibration.")
    return file


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
