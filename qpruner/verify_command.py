"""`qpruner verify`: whether a folder still holds the compressed model that was written there."""

from pathlib import Path

from qpruner.folder_manifest import identity_of, is_compressed, read_checked_manifest
from qpruner.options.functions import run_function


def verify_command(arguments: list[str]) -> None:
    run_function("qpruner verify", verify, arguments)


def verify(folder: Path) -> None:
    """Reads every file of a compressed model and compares it with the size and SHA-256 in its manifest.

    Args:
        folder: folder of the model or of its run, such as runs/quickstart.

    Raises:
        UserError: there is no such folder, or a file is missing, cut off or altered.
    """
    folder = folder.expanduser()
    if not is_compressed(folder) and is_compressed(folder / "model"):  # that of a run
        folder = folder / "model"
    manifest = read_checked_manifest(folder)
    sizes = [entry["size"] for entry in manifest["files"].values()]
    print(f"{folder}: {len(sizes)} files of {sum(sizes):,} bytes are as they were written.")
    print(f"The base is {manifest['state']}, made from {manifest['base']['name']}; SHA-256 {identity_of(manifest)}.")
    for number, step in enumerate(manifest["recipe"], 1):
        options = ", ".join(f"{name}={value!r}" for name, value in step["options"].items())
        print(f"  {number}. {step['name']}({options})")
    adapters = manifest.get("adapters")
    print(f"Adapters: {adapters or 'none'}.")
