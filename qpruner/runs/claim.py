"""Controls who may write to the folder of a run, and which options the folder is bound to."""

from collections.abc import Mapping
from typing import Any

import yaml
from filelock import FileLock, Timeout

from qpruner.errors import UserError
from qpruner.files import write_text
from qpruner.records.folder import RunFolder

FREE_OPTIONS = (
    "ckpt_path",
    "config",
    "data.init_args.cache_dir",
    "data.init_args.loader.num_workers",
    "restart",
    "run.dir",
    "run.name",
    "search.executor.address",
    "search.executor.kind",
    "search.executor.time_limit",
    "search.executor.workers",
    "search.finalist_seeds",
    "search.finalist_steps",
    "search.finalists",
    "search.optimizer",
    "search.trials",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "weights_only",
)
"""Options that do not affect any number of a run, so that a run may be continued with other values of them."""


def lock_folder(folder: RunFolder) -> FileLock:
    """Creates the folder and keeps others out until the returned lock is released or the process ends.

    Raises:
        UserError: the folder cannot be created or written to, or another process is working in it.
    """
    lock = FileLock(folder.path / ".lock", timeout=0)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another process is working in {str(folder.path)!r}. Wait for it, or give this run another --run.name."
        ) from None
    except OSError as error:
        raise UserError(
            f"Cannot write the run folder {str(folder.path)!r} ({error}). Name another place with --run.dir."
        ) from error
    return lock


def claim_folder(folder: RunFolder, options: Mapping[str, Any], *, restart: bool) -> bool:
    """Binds the folder to options, and returns whether there is a run to continue.

    As long as a run has neither compressed nor trained anything, its options may still change; it then begins anew.

    Args:
        folder: folder of the run.
        options: all options of the run, as plain data.
        restart: whether to discard the contents of the folder.

    Raises:
        UserError: the folder belongs to a run with other options, each of which is named.
    """
    # A configuration that is discarded need not be readable.
    stored = folder.read_config() if folder.config.exists() and not restart else {}
    changes = changed_options(stored, options)
    if restart or not stored or (changes and not folder.begun):
        folder.clear()
        write_text(folder.config, yaml.safe_dump(dict(options), sort_keys=False))
        return False
    if changes:
        listed = "\n".join(f"  {name}: was {was}, is now {now}" for name, (was, now) in changes.items())
        raise UserError(
            f"{str(folder.path)!r} holds a run with other options:\n{listed}\nContinue it with its own options, "
            f"start it anew with --restart (restart=True), or give this run another --run.name (folder)."
        )
    return True


def changed_options(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options, by dotted name, whose values differ in a way that matters, each with its stored and its given value."""
    before, after = _flat(stored), _flat(given)
    names = sorted(before.keys() | after.keys())
    return {
        name: (before.get(name), after.get(name))
        for name in names
        if name not in FREE_OPTIONS and before.get(name) != after.get(name)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value))  # callbacks: each option gets a name of its own
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
