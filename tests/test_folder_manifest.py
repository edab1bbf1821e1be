"""What the manifest of a folder says, and what of the folder must be as it says."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpruner import folder_manifest
from qpruner.errors import UserError
from qpruner.files import hash_file
from qpruner.folder_manifest import entries_of, identity_of, is_compressed, read_checked_manifest, read_manifest

FILES = {"config.json": b"{}", "plan.json": b"{ }", "model.safetensors": b"weights", "adapter/adapter.bin": b"factors"}
MANIFEST: dict[str, Any] = {
    "kind": "qpruner model",
    "version": 2,
    "base": {"name": "models/dense", "sha256": "ab12"},
    "state": "pruned",
    "recipe": [{"name": "StructuredPruning", "options": {"ratio": 0.2}}],
    "adapters": "trained",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as it is read: what the files hold is no matter of the manifest's."""
    folder = tmp_path / "model"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write(folder, MANIFEST | {"files": entries_of(folder)})
    return folder


def write(folder: Path, content: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(content))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    write(folder, content)


def test_entries_are_sizes_and_hashes_of_all_files_by_their_path_in_the_folder(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert entries_of(folder) == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert list(entries_of(folder)) == sorted(FILES)


def test_a_folder_is_taken_for_what_it_says(folder: Path, tmp_path: Path) -> None:
    assert is_compressed(folder) and not is_compressed(tmp_path) and not is_compressed(tmp_path / "nothing")
    edit(folder, lambda manifest: manifest.update(kind="a run"))  # whose folder has files of the same names
    assert not is_compressed(folder)
    for damaged in ("{", "[]", "3"):  # what it was
        (folder / "manifest.json").write_text(damaged)
        assert is_compressed(folder)
    (folder / "plan.json").unlink()
    assert not is_compressed(folder)


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        (lambda manifest: manifest["base"].update(sha256="cd34"), True),
        (lambda manifest: manifest.update(state="quantized"), True),
        (lambda manifest: manifest["recipe"][0]["options"].update(ratio=0.3), True),
        (lambda manifest: manifest["recipe"].append({"name": "merge", "options": {}}), True),
        (lambda manifest: manifest["files"]["model.safetensors"].update(sha256="0"), True),
        (lambda manifest: manifest["files"].pop("model.safetensors"), True),
        (lambda manifest: manifest["files"].pop("adapter/adapter.bin"), False),
        (lambda manifest: manifest["files"]["adapter/adapter.bin"].update(sha256="0"), False),
        (lambda manifest: manifest.update(adapters=None), False),
        (lambda manifest: manifest.update(files=dict(reversed(manifest["files"].items()))), False),
    ],
)
def test_a_base_is_known_by_all_that_is_said_of_it_whatever_adapters_lie_beside_it(
    folder: Path, change: Callable[[dict[str, Any]], Any], changes: bool
) -> None:
    before = identity_of(read_manifest(folder))
    assert len(before) == 64
    edit(folder, change)
    assert (identity_of(read_manifest(folder)) != before) == changes


def test_a_folder_that_is_whole_gives_its_manifest(folder: Path) -> None:
    assert (
        read_checked_manifest(folder) == read_manifest(folder) == MANIFEST | {"files": read_manifest(folder)["files"]}
    )
    (folder / "more.safetensors").write_bytes(b"not listed")
    assert read_checked_manifest(folder)["files"].keys() == FILES.keys()


def test_sizes_alone_are_looked_at_where_hashes_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(UserError, match="model.safetensors' was altered: its SHA-256 is not"):
        read_checked_manifest(folder)
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(folder_manifest, "hash_file", noted)
    assert read_checked_manifest(folder, hashes=False) and hashed == []
    (folder / "model.safetensors").write_bytes(b"weight")
    for hashes in (True, False):  # nobody reads all of what is too short
        with pytest.raises(UserError, match=r"has 6 bytes instead of 7: it was cut off or altered"):
            read_checked_manifest(folder, hashes=hashes)
    assert "model.safetensors" not in hashed


def test_a_file_that_is_none_is_told(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors' is missing. Copy the whole folder again"):
        read_checked_manifest(folder)
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model.safetensors' is no file"):
        read_checked_manifest(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest.update(version=1), "kind 'qpruner model', version 1; this qpruner reads 'qpruner m"),
        (lambda manifest: manifest.pop("files"), "files"),
        (lambda manifest: manifest.update(state="thin"), "state must be dense or pruned or quantized or merg"),
        (lambda manifest: manifest["base"].update(name=3), "base.name must be text, not 3"),
        (lambda manifest: manifest["files"].pop("plan.json"), "It does not list plan.json."),
        (lambda manifest: manifest["files"].update({"../x": {"size": 1, "sha256": ""}}), "lists '../x', which lies"),
        (lambda manifest: manifest["files"].update({"/x": {"size": 1, "sha256": ""}}), "lists '/x', which lies"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert said in str(caught.value) and "manifest.json" in str(caught.value)


def test_the_folder_that_was_meant_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}' holds no compressed model; '{folder}' does. Name that"):
        read_manifest(tmp_path)  # that of a run
    with pytest.raises(UserError, match=rf"adapter' holds no compressed model; '{folder}' does. Name that"):
        read_manifest(folder / "adapter")
    with pytest.raises(UserError, match="holds no compressed model: cannot read its manifest.json"):
        read_manifest(tmp_path / "nowhere" / "deeper")
