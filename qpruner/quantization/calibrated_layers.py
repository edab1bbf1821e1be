"""Results of calibrated rounding on disk, layer by layer, so that an interrupted calibration can resume.

A file holds one layer: the states of its linears and the initial factors of their adapters, by ``linear/part``. It
records what the calibration was made from and the hash of the previous layer's file, since a layer depends on all those
rounded before it.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpruner.errors import UserError
from qpruner.files import hash_file, hash_json, replacing
from qpruner.processes import Processes

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Outcome:
    """How well a linear was rounded by text, on held-out text.

    Args:
        kept: whether the calibrated codes were kept; if not, round-to-nearest codes were no worse on held-out text, and
            were used instead.
        plain: squared error of the outputs with round-to-nearest codes, divided by the squared norm of the true
            outputs.
        calibrated: squared error of the outputs with calibrated codes, likewise.
    """

    kept: bool
    plain: float
    calibrated: float

    @classmethod
    def of(cls, plain: float, calibrated: float) -> Self:
        """The outcome for these errors on held-out text."""
        return cls(calibrated < plain, plain, calibrated)


@dataclass(frozen=True)
class RoundedLinear:
    """A linear that was rounded.

    Args:
        state: codes and scales, on the CPU.
        factors: initial factors A [r, in] and B [out, r] of the adapter, on the CPU; None for a start at zero.
        outcome: outcome of rounding by text; None if the format has no grid, so that rounding was plain.
    """

    state: dict[str, Tensor]
    factors: tuple[Tensor, Tensor] | None
    outcome: Outcome | None


Layer = dict[str, RoundedLinear]
"""The rounded linears of a layer, by name."""


class CalibratedLayers:
    """The rounded layers of a calibration, in a folder.

    Args:
        folder: folder of the files; None if nothing is stored.
        made_from: plain data that identifies the base, plan, text and options of the calibration.
    """

    def __init__(self, folder: Path | None, made_from: Mapping[str, Any]) -> None:
        self._folder = folder
        self._origin = hash_json(made_from)

    def read(self, number: int, processes: Processes) -> Layer | None:
        """Reads a layer, on all processes; None if it must be rounded. Warns if a file exists but cannot be used."""
        return processes.of_first(lambda: self._read(number))

    def write(self, number: int, layer: Layer, processes: Processes) -> None:
        """Writes a layer to its file, by the first process alone."""
        processes.of_first(lambda: self._write(number, layer))

    def _read(self, number: int) -> Layer | None:
        if self._folder is None or not (path := self._path(number)).exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                recorded = json.loads((file.metadata() or {}).get("layer", "{}"))
                if not isinstance(recorded, dict):
                    raise ValueError("its metadata is no record of a layer")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError, ValueError, RecursionError) as error:  # the last two of JSON
            warnings.warn(f"{str(path)!r} is no whole file of a calibration: {error}. It is made again.", stacklevel=2)
            return None
        if recorded.get("origin") != self._origin_of(number):
            warnings.warn(
                f"{str(path)!r} was made from another base, plan or text, with other options, or after other layers "
                f"before it. It is made again.",
                stacklevel=2,
            )
            return None
        outcomes = recorded["outcomes"]
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            parts.setdefault(name, {})[part] = tensor
        layer: Layer = {}
        for name, state in parts.items():
            factors = (state.pop(FACTORS[0]), state.pop(FACTORS[1])) if FACTORS[0] in state else None
            layer[name] = RoundedLinear(state, factors, Outcome(**outcomes[name]) if name in outcomes else None)
        return layer

    def _write(self, number: int, layer: Layer) -> None:
        if self._folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, linear in layer.items():
            parts = dict(zip(FACTORS, linear.factors or (), strict=False))
            tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in (linear.state | parts).items()}
        outcomes = {name: asdict(linear.outcome) for name, linear in layer.items() if linear.outcome is not None}
        # One entry, since the order of several may vary, and the next layer records the hash of this file.
        metadata = {"layer": json.dumps({"origin": self._origin_of(number), "outcomes": outcomes})}
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(self._path(number)) as temporary:
                save_file(tensors, temporary, metadata)
        except OSError as error:
            raise UserError(f"A rounded layer cannot be written to {str(self._folder)!r}: {error}.") from error

    def _origin_of(self, number: int) -> str:
        before = self._path(number - 1) if number else None
        return hash_json([self._origin, number, hash_file(before) if before and before.exists() else None])

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{number:03d}.safetensors"
