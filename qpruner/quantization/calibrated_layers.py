"""The results of calibrated rounding on disk, layer by layer, so that an interrupted one can resume.

A file holds one layer: states of its linears, and what their adapters start from, by ``linear/part``. It records what
the calibration is made from and the hash of the previous layer's file, as a layer depends on all those rounded before
it.
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
    """What came of a linear.

    Args:
        kept: whether the calibrated codes were kept; if not, round-to-nearest codes were no worse on held-out text, and
            were used instead.
        plain: squared error of plainly rounded codes on held-out text, over the square of the true outputs.
        calibrated: the same of calibrated codes.
    """

    kept: bool
    plain: float
    calibrated: float

    @classmethod
    def of(cls, plain: float, calibrated: float) -> Self:
        """The outcome that follows from the errors on held-out text."""
        return cls(calibrated < plain, plain, calibrated)


@dataclass(frozen=True)
class RoundedLinear:
    """A linear that is rounded.

    Args:
        state: codes and scales, on the CPU.
        factors: factors A [r, in] and B [out, r] that its adapter starts from, on the CPU; None for a start at zero.
        outcome: what came of rounding by text; None where the format has no grid, and rounding was plain.
    """

    state: dict[str, Tensor]
    factors: tuple[Tensor, Tensor] | None
    outcome: Outcome | None


Layer = dict[str, RoundedLinear]
"""The rounded linears of a layer, by name."""


class CalibratedLayers:
    """The folder of a calibration.

    Args:
        folder: folder of the files; None where nothing is kept.
        made_from: plain data that tells what the calibration is made from: base, plan, text and options.
    """

    def __init__(self, folder: Path | None, made_from: Mapping[str, Any]) -> None:
        self._folder = folder
        self._origin = hash_json(made_from)

    def read(self, number: int, processes: Processes) -> Layer | None:
        """A layer, on all processes; None where it has to be rounded. What is of no use is told and made again."""
        return processes.of_first(lambda: self._read(number))

    def write(self, number: int, layer: Layer, processes: Processes) -> None:
        """Keeps a layer, once."""
        processes.of_first(lambda: self._write(number, layer))

    def _read(self, number: int) -> Layer | None:
        if self._folder is None or not (path := self._path(number)).exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                recorded: dict[str, Any] = json.loads((file.metadata() or {}).get("layer", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError) as error:
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
        # In one entry: the order of several is not always the same, and the next layer names this file by its hash.
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
