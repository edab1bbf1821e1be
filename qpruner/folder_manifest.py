"""The manifest of a compressed model's folder: what was done to which model, and size and SHA-256 of every file."""

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NotRequired, TypedDict

from qpruner.errors import UserError, brief, cut
from qpruner.files import MALFORMED, hash_file, hash_json, reading
from qpruner.schema import conform

KIND, VERSION = "qpruner model", 2
MANIFEST, PLAN, CONFIG, ADAPTER = "manifest.json", "plan.json", "config.json", "adapter"
REFERENCE = "reference"
COPY_AGAIN = "Copy the folder again, or run the fit that wrote it again."
ANYTHING = (Exception,)
"""Errors that transformers and PEFT raise on unexpected content: any, since they validate little of it."""


class Entry(TypedDict):
    """What the manifest says of a file."""

    size: int
    sha256: str


class Base(TypedDict):
    """What the manifest says of the dense model: folder or hub name, and fingerprint."""

    name: str
    sha256: str | None


class Step(TypedDict):
    """One thing that was done to a model: by what, with which options."""

    name: str
    options: dict[str, Any]


class Manifest(TypedDict):
    """What ``manifest.json`` holds.

    Args:
        kind: what the folder holds, always `KIND`.
        version: version of the format, at present `VERSION`.
        base: the dense model that was compressed.
        state: how far the compression of the base has come.
        recipe: what was done to the dense model, in order.
        files: size and hash of each file, by its path in the folder.
        adapters: whether a fit has trained the adapters; None where there are none.
    """

    kind: str
    version: int
    base: Base
    state: Literal["dense", "pruned", "quantized", "merged"]
    recipe: list[Step]
    files: dict[str, Entry]
    adapters: NotRequired[Literal["trained", "initial"] | None]


def is_compressed(folder: Path) -> bool:
    """Whether a folder says that it holds a compressed model.

    That of a run has files of the same names. One whose manifest is damaged is still taken for what it was.
    """
    if not ((folder / MANIFEST).is_file() and (folder / PLAN).is_file()):
        return False
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except MALFORMED:
        return True
    return not isinstance(content, dict) or content.get("kind") == KIND


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        UserError: there is none, it is malformed or of another version, or it lists files elsewhere.
    """
    path = folder / MANIFEST
    if not is_compressed(folder):
        for near in (folder / "model", folder.parent):  # of a run, or of the adapters
            if is_compressed(near):
                raise UserError(f"{str(folder)!r} holds no compressed model; {str(near)!r} does. Name that.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except MALFORMED as error:
        raise UserError(
            f"{str(folder)!r} holds no compressed model: cannot read its {MANIFEST} ({cut(error)}). "
            f"Name the folder that a fit wrote, or copy that again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no manifest of a compressed model. {COPY_AGAIN}")
    if content.get("kind") != KIND or content.get("version") != VERSION:
        raise UserError(
            f"{str(path)!r} is of kind {brief(content.get('kind'))}, version {brief(content.get('version'))}; "
            f"this qpruner reads {KIND!r}, version {VERSION}. Read it with the qpruner that wrote it."
        )
    with reading(path, COPY_AGAIN):
        manifest: Manifest = conform(content, Manifest)
        if unlisted := {CONFIG, PLAN} - manifest["files"].keys():
            raise UserError(f"It does not list {', '.join(sorted(unlisted))}.")
        for name in map(PurePosixPath, manifest["files"]):
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"It lists {brief(str(name))}, which lies outside the folder.")
    return manifest


def identity_of(manifest: Manifest) -> str:
    """The hash that identifies a base: of all that the manifest says of it.

    It covers neither the adapters beside the base nor its recorded logits, whose last bits depend on the machine.
    """
    beside = (f"{ADAPTER}/", f"{REFERENCE}/")
    files = {name: entry for name, entry in manifest["files"].items() if not name.startswith(beside)}
    return hash_json([manifest[key] for key in ("kind", "version", "base", "state", "recipe")] + [files])


def read_checked_manifest(folder: Path, *, hashes: bool = True) -> Manifest:
    """The manifest of a folder, after checking every file that it lists.

    Args:
        folder: folder of a compressed model.
        hashes: whether the files are read and compared with their hashes, beside their sizes.

    Raises:
        UserError: the manifest cannot be read (see `read_manifest`), or a file is missing, cut off or altered.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        with reading(path, COPY_AGAIN):  # it may not be ours to read
            size = path.stat().st_size if path.is_file() else None
            sha256 = hash_file(path) if hashes and size == expected["size"] else None
        if size is None:
            raise UserError(
                f"{str(path)!r} is {'no file' if path.exists() else 'missing'}. Copy the whole folder again."
            )
        if size != expected["size"]:
            raise UserError(
                f"{str(path)!r} has {size:,} bytes instead of {expected['size']:,}: it was cut off or altered. "
                f"Copy the folder again."
            )
        if hashes and sha256 != expected["sha256"]:
            raise UserError(
                f"{str(path)!r} was altered: its SHA-256 is not {cut(expected['sha256'], 80)}. Copy it again."
            )
    return manifest


def entries_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of the files of a folder and of the folders in it: sizes and hashes, by their path in it."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
