"""`qpruner verify`: whether a folder still holds the compressed model that was written there."""

from pathlib import Path

from qpruner.errors import UserError
from qpruner.folder_manifest import ADAPTER, identity_of, is_compressed, read_checked_manifest
from qpruner.options.functions import run_function


def verify_command(arguments: list[str]) -> None:
    run_function("qpruner verify", verify, arguments)


def verify(folder: Path, load: bool = True) -> None:
    """Reads every file of a compressed model, loads it, and holds what it says to what it said when it was written.

    Args:
        folder: folder of the model or of its run, such as runs/quickstart.
        load: whether the model is loaded; without it sizes and SHA-256 alone are compared with the manifest.

    Raises:
        UserError: there is no such folder, a file is missing, cut off or altered, the plan is not that of the weights,
            or the model says something else.
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
    if load:
        _hold_to_its_word(folder, adapters is not None)


def _hold_to_its_word(folder: Path, adapters: bool) -> None:
    from qpruner.model_folder import load_base, load_compressed  # takes seconds to import
    from qpruner.reference_logits import MOST, deviation

    differences = {"base": deviation(folder, load_base(folder, check_hashes=False).network)}
    if adapters:
        differences["base with its adapters"] = deviation(folder / ADAPTER, load_compressed(folder))
    for what, difference in differences.items():
        if difference is None:
            print(f"The {what} loads; no logits were recorded when it was written.")
        elif difference > MOST:
            raise UserError(
                f"The {what} in {str(folder)!r} loads, and says something else than when it was written: its logits "
                f"differ by up to {difference:.2g} of their standard deviation. Load it with the versions of qpruner, "
                f"torch and transformers that wrote it."
            )
        else:
            print(
                f"The {what} loads and says what it said: logits differ by up to {difference:.1g} standard deviations."
            )
