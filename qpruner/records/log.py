"""The log of a run."""

import logging
import logging.handlers
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class RunLog(logging.handlers.WatchedFileHandler):
    """A log in which a full disk leaves lines out, without ending the run or being reported for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(path: Path) -> Callable[[], None]:
    """Adds everything that is logged from now on to the log of the run, until the returned function is called.

    A run that begins anew removes the file, and the log continues in a new one.
    """
    handler = RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "qpruner")]
    for logger in loggers:
        logger.addHandler(handler)

    def stop() -> None:
        for logger in loggers:
            logger.removeHandler(handler)
        with suppress(OSError):  # lines that did not fit on the disk
            handler.close()

    return stop
