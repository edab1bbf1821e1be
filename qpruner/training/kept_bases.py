"""Compressed bases in folders named by their hashes, and the places where a checkpoint's base may be after a move."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from qpruner.errors import UserError
from qpruner.folder_manifest import identity_of, is_compressed, read_checked_manifest, read_manifest
from qpruner.records.folder import RunFolder


def identity_in(folder: Path) -> str | None:
    """The hash of the base that a folder holds; None where it holds none.

    Raises:
        UserError: the folder's manifest is damaged.
    """
    return identity_of(read_manifest(folder)) if is_compressed(folder) else None


def place_by_hash(bases: Path, sha256: str) -> Path:
    """The folder of a base with a given hash among the folders that are named by hash."""
    return bases / sha256[:16]


def keep_by_hash(bases: Path, write: Callable[[Path], None]) -> Path:
    """Writes a base to the folder named by its hash, unless an earlier fit, whose checkpoints name it, has done so.

    A lock lets one process write at a time, so that remains of a killed process are known to be unused and removed.

    Args:
        bases: folder that contains all bases.
        write: function that writes the base to a folder.

    Returns:
        The folder that holds the base.
    """
    bases.mkdir(parents=True, exist_ok=True)
    with FileLock(bases / ".lock"):
        new = bases / "new"
        shutil.rmtree(new, ignore_errors=True)  # first, since these remains may be what fills the disk
        write(new)
        place = place_by_hash(bases, identity_of(read_manifest(new)))
        try:
            read_checked_manifest(place)
            shutil.rmtree(new)
        except UserError:  # there is none, or it is damaged
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
    return place


def keeping_folder(named: Path, sha256: str | None, checkpoint: Path | None, roots: Iterable[Path], bases: str) -> Path:
    """The folder that a checkpoint names, or where that does not hold its base, a nearby one that does.

    Args:
        named: folder that the checkpoint names; it is also the result where no folder holds the base.
        sha256: hash of the base.
        checkpoint: file of the checkpoint; see `places_of`.
        roots: further folders that may contain ``bases``.
        bases: name of the folder that contains bases named by their hashes.

    Raises:
        UserError: the manifest of a candidate folder is damaged.
    """
    if identity_in(named) == sha256:
        return named
    places = places_of(str(sha256), checkpoint, roots, bases)
    return next((place for place in places if identity_in(place) == sha256), named)


def places_of(sha256: str, checkpoint: Path | None, roots: Iterable[Path], bases: str) -> Iterator[Path]:
    """Folders that may hold a base that is not in the folder its checkpoint names.

    Args:
        sha256: hash of the base.
        checkpoint: file of the checkpoint; None where it is not in a file. The base of a run lies beside the folder of
            its checkpoints; that of a fit without a run, under a folder above the checkpoint.
        roots: further folders that may contain ``bases``.
        bases: name of the folder that contains bases named by their hashes.
    """
    if checkpoint is not None:
        checkpoint = checkpoint.absolute()
        run = RunFolder(checkpoint.parent.parent)
        yield from (run.model, run.base)
        roots = (*roots, *checkpoint.parents)
    yield from (place_by_hash(root / bases, sha256) for root in roots)
