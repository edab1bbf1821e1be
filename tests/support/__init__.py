"""What several tests need: tiny models, Trainers, runs, searches, and scripts for processes of their own."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Of a process that is to find this package."""
    places = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": places, **changes}
