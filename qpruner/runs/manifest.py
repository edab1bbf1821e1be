"""What a run was made of: versions, seeds, the command, and hashes of its data and its base model."""

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.files import read_json, write_json

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
    """Writes the manifest of a run, or adds to it the session that continues the run.

    Args:
        path: the manifest.
        seed: of the run.
        base: name and SHA-256 of the base model.
        data: rows, tokens and SHA-256 of each split.
        compression: what is done to the base, with every option.
        devices: what the session runs on.
        phase: number of the fit that the session begins with.

    Raises:
        UserError: the run was begun with another base model or other data.
    """
    manifest: dict[str, Any] = {
        "seed": seed,
        "base": base,
        "data": data,
        "compression": [],
        "sessions": [],
    }
    if path.exists():
        stored = read_json(path)
        for part, name in (("base", "base model"), ("data", "data")):
            if stored[part] != manifest[part]:
                difference = _difference(stored[part], manifest[part])
                raise UserError(
                    f"The {name} changed since {str(path.parent)!r} was begun: {difference}. "
                    f"Put it back, start anew with --restart, or give this run another --run.name."
                )
        manifest = stored
    of_phases = manifest["compression"]
    if not any(entry["phase"] == phase for entry in of_phases):
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
