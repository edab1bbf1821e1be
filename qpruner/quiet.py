"""Suppresses messages of libraries that address developers or advertise, so that relevant ones stay visible."""

import logging
import threading
import warnings
from collections.abc import Callable
from functools import partial

NOISE = (
    "\N{ELECTRIC LIGHT BULB} Tip:",
    "Failed to load CPU gemm_4bit_forward",
    "You are using a model of type `compressed_",  # said where only the tokenizer of such a folder is read
)
SPEAKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "bitsandbytes.backends.cpu.ops",
    "transformers.configuration_utils",
)
WARNINGS = (
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    (UserWarning, "`isinstance.treespec, LeafSpec.` is deprecated"),
    (FutureWarning, "`isinstance.treespec, LeafSpec.` is deprecated"),
)


def quieten() -> None:
    """To be called before the libraries are imported: some of them speak then."""
    for name in SPEAKERS:
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(NOISE))
    for category, message in WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    threading.excepthook = partial(_told_elsewhere, threading.excepthook)


def _told_elsewhere(others: Callable[[threading.ExceptHookArgs], object], failed: threading.ExceptHookArgs) -> None:
    """Leaves out the end of TensorBoard's thread, as on a full disk: who next gives it something has the same error."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        others(failed)
