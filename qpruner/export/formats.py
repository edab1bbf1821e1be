"""The formats that a compressed model is exported to, and their common interface; a new one takes a line here."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from qpruner.errors import UserError, nearest
from qpruner.export.compressed_tensors_folder import CompressedTensors
from qpruner.export.dense import Dense
from qpruner.export.description import Description
from qpruner.export.gguf_file import Gguf
from qpruner.export.mlx_folder import Mlx
from qpruner.export.onnx_file import Onnx
from qpruner.export.source import Source
from qpruner.export.written import Written


class Exporter(Protocol):
    """A format: what it cannot represent, and how it is written; a dataclass whose fields are its own options."""

    @property
    def name(self) -> str: ...

    @property
    def extra(self) -> str | None:
        """The optional extra of qpruner that the format needs, named like the format; None for none."""

    @property
    def module(self) -> str | None:
        """The import name of the module that the extra provides; None without an extra."""

    def check(self, model: Description) -> None:
        """Makes sure, before any weight is read, that the format can represent a model.

        Raises:
            UserError: it cannot; the message gives the reason and the nearest alternative that works.
        """

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        """Writes the files of the export.

        Args:
            source: model to export.
            folder: folder to create and write to. It is moved once all is written and measured, so no file may contain
                its path.
            dtype: 16-bit number format of what stays dense.

        Raises:
            UserError: a part of the model cannot be written.
        """


EXPORTS: Mapping[str, Exporter] = {
    exporter.name: exporter for exporter in (Dense(), Gguf(), CompressedTensors(), Onnx(), Mlx())
}
"""The formats by name."""


def exporter_for(name: str, options: Mapping[str, Any]) -> Exporter:
    """The format with a given name, after checking that its package is installed.

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
