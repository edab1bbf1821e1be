"""The log of a run."""

import logging
import logging.handlers
from collections.abc import Callable
from pathlib import Path


def log_to(path: Path) -> Callable[[], None]:
    """Adds what is logged from now on to the log of the run, until the function that is returned is called.

    A run that begins anew removes the file, and the log goes on in a new one.
    """
    handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "qpruner")]
    for logger in loggers:
        logger.addHandler(handler)

    def stop() -> None:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()

    return stop
