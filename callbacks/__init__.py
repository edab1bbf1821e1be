"""When things happen in a Trainer; the mathematics is in the other packages of `qpruner`."""

if __name__ != "qpruner.callbacks":
    raise ImportError("import qpruner.callbacks: the bare name would give its classes a second identity")

from qpruner.callbacks.checkpoint import RunCheckpoint
from qpruner.callbacks.compression import Compression
from qpruner.callbacks.keep_model import KeepModel
from qpruner.callbacks.log_interval import LogInterval
from qpruner.callbacks.lora_guided import LoRAGuidedPruning
from qpruner.callbacks.polishing import GridPolishing
from qpruner.callbacks.predictions import PredictionsWriter
from qpruner.callbacks.pruning import PlannedPruning, StructuredPruning
from qpruner.callbacks.quantization import MixedPrecisionQuantization
from qpruner.callbacks.report import MeasuredEnd, MeasuredStage, RunReport
from qpruner.callbacks.throughput import Throughput

__all__ = [
    "Compression",
    "GridPolishing",
    "KeepModel",
    "LoRAGuidedPruning",
    "LogInterval",
    "MeasuredEnd",
    "MeasuredStage",
    "MixedPrecisionQuantization",
    "PlannedPruning",
    "PredictionsWriter",
    "RunCheckpoint",
    "RunReport",
    "StructuredPruning",
    "Throughput",
]
