"""Where the compressed base of a checkpoint may be kept, after its run or its fit was moved."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from qpruner.folder_manifest import identity_of, is_compressed, read_manifest
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
