"""Folders that take long to fill, which one process of a test session fills for all of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def filled_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of this session, which no test may change; whoever comes second waits for whoever came first."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folders lie side by side
        root = root.parent
    folder = root / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            filling = folder.with_name(f"{name}.filling")
            filling.mkdir(exist_ok=True)
            fill(filling)
            filling.rename(folder)
    return folder
