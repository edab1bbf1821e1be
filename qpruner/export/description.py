"""A compressed model as the small files of its folder describe it."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qpruner.adapter_files import adapted_linears
from qpruner.anatomy import family_of
from qpruner.dense_copy import model_folder
from qpruner.model_folder import read_config, read_plan
from qpruner.plan import CompressionPlan


@dataclass(frozen=True)
class Description:
    """What is known of a compressed model before any weight is read.

    Args:
        folder: folder of the compressed model.
        config: configuration of the model, with the widths of each layer.
        plan: plan that the model follows.
        adapters: names of the linears that have trained adapters.
    """

    folder: Path
    config: Any
    plan: CompressionPlan
    adapters: Collection[str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the folder of a run, or of its model.

        Raises:
            UserError: there is no such folder, its fit is unfinished, or a file is missing or damaged.
        """
        folder = model_folder(folder.expanduser())
        return cls(folder, read_config(folder), read_plan(folder), adapted_linears(folder))

    @property
    def tied(self) -> bool:
        """Whether the dense model has tied embeddings, which an adapter on the head rules out."""
        return bool(self.config.tie_word_embeddings) and family_of(self.config)[1].head not in self.adapters
