"""Structured pruning, mixed-precision quantization and LoRA recovery of language models under a memory budget."""

from importlib.metadata import version

__version__ = version("qpruner")
