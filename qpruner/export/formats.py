"""The formats that a compressed model is exported to, and what every one of them can do; a new one is a line here."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from qpruner.errors import UserError, nearest
from qpruner.export.compressed_tensors_folder import CompressedTensors
from qpruner.export.dense import Dense
from qpruner.export.gguf_file import Gguf
from qpruner.export.mlx_folder import Mlx
from qpruner.export.onnx_file import Onnx
from qpruner.export.source import Source
from qpruner.export.written import Written


class Exporter(Protocol):
    """A format: what of it cannot be had, and how it is written; a dataclass whose fields are options of its own."""

    @property
    def name(self) -> str: ...

    @property
    def extra(self) -> str | None:
        """The optional extra of the package that it needs, which has the name of the format; None for none."""

    @property
    def module(self) -> str | None:
        """The module that the extra brings, as it is imported; None without an extra."""

    def check(self, source: Source) -> None:
        """Makes sure, before any work, that the format can say all that the model is.

        Raises:
            UserError: it cannot; the reason, and the nearest thing that works.
        """

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        """Writes the files of the export.

        Args:
            source: model to export.
            folder: folder to make and to write to. It moves once all is written and measured: nothing in the files may
                name it.
            dtype: number format, of 16 bits, of what is left dense.

        Raises:
            UserError: something cannot be written.
        """


EXPORTS: Mapping[str, Exporter] = {
    exporter.name: exporter for exporter in (Dense(), Gguf(), CompressedTensors(), Onnx(), Mlx())
}
"""The formats by their names."""


def exporter_for(name: str, options: Mapping[str, Any]) -> Exporter:
    """The format of a name, whose package is there.

    Args:
        name: name of the format.
        options: options of the format alone.

    Raises:
        UserError: there is no such format, its package is missing, or it has no such option.
    """
    if name not in EXPORTS:
        raise UserError(f"There is no format {name!r}.{nearest(name, EXPORTS)} Choose one of {', '.join(EXPORTS)}.")
    exporter: Any = EXPORTS[name]
    for option in options:
        if not hasattr(exporter, option):
            others = ", ".join(other for other, known in EXPORTS.items() if hasattr(known, option))
            raise UserError(
                f"--{option} is an option of --format {others}; {name} has none of that name. Leave it out."
            )
    if exporter.module is not None and find_spec(exporter.module) is None:
        raise UserError(
            f"--format {name} needs the package {exporter.module}, which is not installed. Install it with "
            f"`pip install 'qpruner[{exporter.extra}]'`."
        )
    return replace(exporter, **options) if options else exporter
