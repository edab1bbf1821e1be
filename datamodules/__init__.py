"""Data modules: text, instructions and the embedded stories, in the three splits of every run."""

if __name__ != "qpruner.datamodules":
    raise ImportError("import qpruner.datamodules: the bare name would give its classes a second identity")

from qpruner.datamodules.instructions import InstructionDataModule
from qpruner.datamodules.stories import StoriesDataModule
from qpruner.datamodules.tasks_only import ChoiceTasksDataModule
from qpruner.datamodules.text import TextDataModule

__all__ = ["ChoiceTasksDataModule", "InstructionDataModule", "StoriesDataModule", "TextDataModule"]
