"""What a run was made of: versions, seeds, the command, and hashes of its data and its base model."""

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from qpruner.errors import UserError
from qpruner.files import write_json
from qpruner.records.folder import RESTORE
from qpruner.schema import read_as

PACKAGES = (
    "qpruner",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchmetrics",
    "datasets",
    "nevergrad",
    "numpy",
)


class Recorded(TypedDict):
    """Contents of the file.

    Args:
        seed: seed of the run.
        base: name and SHA-256 of the base model.
        data: rows, tokens and SHA-256 of each split.
        compression: what is done to the base, with all options, and in which phase.
        sessions: when, how and with what the run was started and continued.
    """

    seed: int
    base: dict[str, Any]
    data: dict[str, Any]
    compression: list[dict[str, Any]]
    sessions: list[dict[str, Any]]


def record_session(
    path: Path,
    *,
    seed: int,
    base: dict[str, Any],
    data: dict[str, Any],
    compression: list[dict[str, Any]],
    devices: str,
    phase: int,
) -> None:
    """Writes the manifest of a run, or adds the session that continues the run to it.

    Args:
        path: path of the manifest.
        seed: seed of the run.
        base: name and SHA-256 of the base model.
        data: rows, tokens and SHA-256 of each split.
        compression: what is done to the base, with all options.
        devices: devices that the session runs on, in words.
        phase: number of the fit that the session begins with.

    Raises:
        UserError: the run was started with another base model or other data.
    """
    manifest: Recorded = {
        "seed": seed,
        "base": base,
        "data": data,
        "compression": [],
        "sessions": [],
    }
    if path.exists():
        stored = read_as(path, Recorded, remedy=RESTORE)
        for name, begun_with, given in (("base model", stored["base"], base), ("data", stored["data"], data)):
            if begun_with != given:
                difference = _difference(begun_with, given)
                raise UserError(
                    f"The {name} changed since {str(path.parent)!r} was begun: {difference}. "
                    f"Put it back, start anew with --restart, or give this run another --run.name."
                )
        manifest = stored
    of_phases = manifest["compression"]
    if not any(entry.get("phase") == phase for entry in of_phases):
        of_phases += [{"phase": phase, **entry} for entry in compression]
    manifest["sessions"].append(
        {
            "phase": phase,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "devices": devices,
            "python": platform.python_version(),
            "system": platform.platform(),
            "versions": {package: version(package) for package in PACKAGES},
        }
    )
    write_json(path, manifest)


def _difference(stored: dict[str, Any], given: dict[str, Any]) -> str:
    return "; ".join(
        f"{key} was {stored.get(key)}, is now {given.get(key)}"
        for key in sorted(stored.keys() | given.keys())
        if stored.get(key) != given.get(key)
    )
