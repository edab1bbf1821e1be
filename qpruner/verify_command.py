"""`qpruner verify`: checks whether a folder still holds the compressed model that was written there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.folder_manifest import ADAPTER, MANIFEST, Manifest, identity_of, is_compressed, read_checked_manifest
from qpruner.options.functions import run_function


def verify_command(arguments: list[str]) -> None:
    run_function("qpruner verify", verify, arguments)


def verify(folder: Path, load: bool = True) -> None:
    """Checks every file of a compressed model, loads it, and compares its logits with those recorded when written.

    Args:
        folder: folder of the model or of its run, such as runs/quickstart.
        load: whether the model is loaded; if not, only sizes and SHA-256 of the files are compared with the manifest.

    Raises:
        UserError: there is no such folder, a file is missing, cut off or altered, the plan does not fit the weights, or
            the logits differ.
    """
    folder = folder.expanduser()
    if not is_compressed(folder) and is_compressed(folder / "model"):  # the folder of a run
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
    listed = {*manifest["files"], MANIFEST, "README.md"}
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    if others := [path for path in paths if path not in listed]:
        print(f"Not of the model, and not looked at: {', '.join(others)}.")
    if load:
        _hold_to_its_word(folder, manifest)


def _hold_to_its_word(folder: Path, manifest: Manifest) -> None:
    # These take seconds to import.
    from qpruner.model_folder import load_base, load_compressed
    from qpruner.reference_logits import deviation, says_the_same
    from qpruner.remote_code import CODE, load_by_transformers

    loaders: dict[str, tuple[Path, Callable[[], Any]]] = {
        "base": (folder, lambda: load_base(folder, check_hashes=False).network)
    }
    if CODE in manifest["files"]:
        loaders["base by transformers alone"] = (folder, lambda: load_by_transformers(folder))
    if manifest.get("adapters"):
        loaders["base with its adapters"] = (folder / ADAPTER, lambda: load_compressed(folder))
    for what, (recorded, load) in loaders.items():
        model = load()
        difference = deviation(recorded, model)
        if difference is None:
            print(f"The {what} loads; no logits were recorded when it was written.")
        elif says_the_same(difference, model.dtype):
            print(
                f"The {what} loads and says what it said: logits differ by up to {difference:.1g} standard deviations."
            )
        else:
            raise UserError(
                f"The {what} in {str(folder)!r} loads, and says something else than when it was written: its logits "
                f"differ by up to {difference:.2g} of their standard deviation. Load it with the versions of qpruner, "
                f"torch and transformers that wrote it."
            )
