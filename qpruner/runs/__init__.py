"""A run: a sequence of fits in a folder that records their progress, and what is measured of them."""

from qpruner.runs.phases import PhaseConfig
from qpruner.runs.run import Run

__all__ = ["PhaseConfig", "Run"]
