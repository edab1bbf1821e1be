"""Tokenized splits on disk, keyed by everything on which they depend."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qpruner.datamodules.rows import TokenRows
from qpruner.datamodules.splits import SPLITS, Split
from qpruner.errors import UserError
from qpruner.files import replacing

FIELDS = ("tokens", "scored", "num_bytes", "offsets")


@dataclass(frozen=True)
class Prepared:
    """The splits of a data module as token rows.

    Args:
        splits: rows of each split that has data.
        notes: what the user should know about how the splits were made, such as records left out.
    """

    splits: dict[Split, TokenRows]
    notes: tuple[str, ...]


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qpruner" / "tokens"


def cache_path(directory: Path, key: str) -> Path:
    return directory / f"{key}.safetensors"


def store(path: Path, prepared: Prepared) -> None:
    """Writes the file completely or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    tensors = {f"{split}.{name}": getattr(rows, name) for split, rows in prepared.splits.items() for name in FIELDS}
    remedy = "Make room there, or name another folder with --data.init_args.cache_dir."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, remedy) as temporary:
            save_file(tensors, temporary, metadata={"notes": json.dumps(prepared.notes)})
    except (OSError, SafetensorError) as error:  # the second if the folder is not ours
        raise UserError(
            f"Cannot write the token cache in {str(path.parent)!r} ({error}). Name another folder with "
            f"--data.init_args.cache_dir."
        ) from error


def load(path: Path) -> Prepared:
    """Reads what `store` has written; the tensors are memory-mapped from the file.

    Raises:
        UserError: the file is damaged or missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            splits = {
                split: TokenRows(**{name: file.get_tensor(f"{split}.{name}") for name in FIELDS})
                for split in SPLITS
                if f"{split}.tokens" in names
            }
            return Prepared(splits, tuple(json.loads(file.metadata()["notes"])))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Cannot read the token cache {str(path)!r} ({error}). Delete this file, if it is there, and run again."
        ) from error
