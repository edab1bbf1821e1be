"""A data module of choice tasks and nothing else."""

from typing import Any

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.cache import Prepared
from qpruner.datamodules.choice_tasks import ChoiceTasksConfig
from qpruner.datamodules.rows import TextExamples
from qpruner.datamodules.splits import Split
from qpruner.errors import UserError


class ChoiceTasksDataModule(TokenDataModule):
    """Choice tasks without text, to measure what a model can do.

    ::

        qpruner test --data ChoiceTasksDataModule --data.tasks.folder zeroshot --data.tasks.names '[boolq, piqa]'

    Args:
        tasks: choice tasks of the validation and the test split.
        **kwargs: options of every data module; see `TokenDataModule`.
    """

    def __init__(self, tasks: ChoiceTasksConfig, **kwargs: Any) -> None:
        super().__init__(tasks=tasks, **kwargs)

    def examples(self, split: Split) -> TextExamples:
        raise UserError("ChoiceTasksDataModule has tasks and no text. For a fit name a data module that has text.")

    @property
    def protocol(self) -> str:
        return "no text"

    def options(self) -> dict[str, Any]:
        return {}

    def build(self) -> Prepared:
        return Prepared({}, ())
