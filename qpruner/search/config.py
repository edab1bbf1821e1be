"""The options of a search."""

from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.errors import UserError
from qpruner.records.search import Comparison
from qpruner.search.aim import ScoreOption, check_score
from qpruner.search.executors import ExecutorConfig
from qpruner.search.structure import StructureConfig


@dataclass(frozen=True)
class SearchConfig:
    """How bits are searched for, and how wide layers are; budget, bits and prior are those of
    `MixedPrecisionQuantization`.

    Args:
        optimizer: name of the optimizer: ``bayesian``, ``random``, or one of Nevergrad's, which is rehearsed before the
            first trial. A search may continue with a different one, which is informed of the trials so far.
        trials: number of plans to try, at least 1.
        steps: number of optimizer steps of a trial's fit, at least 0; with 0, plans are compared without a fit.
        max_seconds: seconds after which a trial's fit ends, however many steps it has made; a search with this limit
            cannot be repeated exactly.
        score: measure by which plans are compared: ``loss`` on the validation text; ``accuracy``, the mean over the
            validation questions of all tasks; or tasks with their weights, such as ``{boolq: 1, winogrande: 1}``.
            Accuracies count in steps of their standard error, within which the loss decides.
        front: whether to search for the trade-off of score and bytes below the budget, instead of the best plan within
            it; and of multiply-adds if widths of layers are searched.
        finalists: number of plans that are tried again with other seeds, at least 1; the best on average wins.
        finalist_seeds: total number of seeds that finalists are tried with, at least 1.
        finalist_steps: number of optimizer steps of the finalists' fits; default ``steps``. With more, a trial is a
            rung: all but the finalists stop there. Fewer steps than recovery takes may choose the wrong ones: see
            ``docs/choosing/search.md``.
        executor: how and where trials run.
        structure: how wide layers may be, if that is searched together with bits; null to prune the base once and
            search for bits alone.
        ranks: ranks that the adapters of a layer may have, at least two, if these are searched, too; the highest is
            ``r`` of the module's ``lora``, and the budget is one of bytes, in which adapters are included. Empty to
            have ``r`` everywhere.

    Raises:
        UserError: a number out of its range, or ranks that leave no choice.
    """

    optimizer: str = "bayesian"
    trials: int = 20
    steps: int = 20
    max_seconds: float | None = None
    score: ScoreOption = "loss"
    front: bool = False
    finalists: int = 3
    finalist_seeds: int = 3
    finalist_steps: int | None = None
    executor: ExecutorConfig = ExecutorConfig()
    structure: StructureConfig | None = None
    ranks: Sequence[int] = ()

    @property
    def comparison(self) -> Comparison:
        """How the best plans are compared in the end."""
        return Comparison(self.finalists, self.finalist_seeds, self.finalist_steps or self.steps)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))  # a list from YAML compares as a tuple
        if self.ranks and (len(set(self.ranks)) < max(2, len(self.ranks)) or min(self.ranks) < 1):
            raise UserError(
                f"search.ranks is {list(self.ranks)}; it names at least two ranks from 1 on, each once, such as "
                f"[2, 4, 8]. Leave it out for --model.lora.r in all layers."
            )
        for name, least in (("trials", 1), ("steps", 0), ("finalists", 1), ("finalist_seeds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"search.{name} is {getattr(self, name)}; it must be at least {least}.")
        check_score(self.score)
        if self.finalist_steps is not None and self.finalist_steps < self.steps:
            raise UserError(
                f"search.finalist_steps is {self.finalist_steps}; finalists take at least the "
                f"{self.steps} steps of all."
            )
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise UserError(f"search.max_seconds is {self.max_seconds}; it must be above 0, or null for steps alone.")
