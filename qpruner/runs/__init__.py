"""A run: fits one behind the other in a folder that knows how far they came, and what is measured of them."""

from qpruner.runs.phases import PhaseConfig
from qpruner.runs.run import Run

__all__ = ["PhaseConfig", "Run"]
