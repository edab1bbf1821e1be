"""Compressed bases in folders named by their hashes, and where that of a checkpoint may lie once it was moved."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from qpruner.errors import UserError
from qpruner.folder_manifest import identity_of, is_compressed, read_checked_manifest, read_manifest
from qpruner.records.folder import RunFolder


def identity_in(folder: Path) -> str | None:
    """The hash of the base that a folder keeps; None where it keeps none.

    Raises:
        UserError: its manifest is damaged.
    """
    return identity_of(read_manifest(folder)) if is_compressed(folder) else None


def place_by_hash(bases: Path, sha256: str) -> Path:
    """The folder of a base among others that are named by their hashes."""
    return bases / sha256[:16]


def keep_by_hash(bases: Path, write: Callable[[Path], None]) -> Path:
    """Writes a base to the folder named by its hash, unless an earlier fit has done so, whose checkpoints name it.

    One process at a time writes there, so that what one left that was killed is known to be nobody's, and goes.

    Args:
        bases: folder of all bases.
        write: function that writes the base to a folder.

    Returns:
        The folder that keeps the base.
    """
    bases.mkdir(parents=True, exist_ok=True)
    with FileLock(bases / ".lock"):
        new = bases / "new"
        shutil.rmtree(new, ignore_errors=True)  # before more is written: the disk may be full of it
        write(new)
        place = place_by_hash(bases, identity_of(read_manifest(new)))
        try:
            read_checked_manifest(place)
            shutil.rmtree(new)
        except UserError:  # none, or a damaged one
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
    return place


def keeping_folder(named: Path, sha256: str | None, checkpoint: Path | None, roots: Iterable[Path], bases: str) -> Path:
    """The folder that a checkpoint names, or where that does not keep its base, one near it that does.

    Args:
        named: folder that the checkpoint names; it is also the answer where no other keeps the base.
        sha256: hash of the base.
        checkpoint: file of the checkpoint, as the next arguments for `places_of`.
        roots: further folders that may hold ``bases``.
        bases: name of the folder that keeps bases by their hashes.

    Raises:
        UserError: the manifest of a folder where the base may be is damaged.
    """
    if identity_in(named) == sha256:
        return named
    places = places_of(str(sha256), checkpoint, roots, bases)
    return next((place for place in places if identity_in(place) == sha256), named)


def places_of(sha256: str, checkpoint: Path | None, roots: Iterable[Path], bases: str) -> Iterator[Path]:
    """Folders that may keep a base, where the one that its checkpoint names does not.

    Args:
        sha256: hash of the base.
        checkpoint: file of the checkpoint; None where it is no file. Of a run, the base lies beside the folder of its
            checkpoints; of a fit without a run, in a folder above it.
        roots: further folders that may hold ``bases``.
        bases: name of the folder that keeps bases by their hashes.
    """
    if checkpoint is not None:
        checkpoint = checkpoint.absolute()
        run = RunFolder(checkpoint.parent.parent)
        yield from (run.model, run.base)
        roots = (*roots, *checkpoint.parents)
    yield from (place_by_hash(root / bases, sha256) for root in roots)
