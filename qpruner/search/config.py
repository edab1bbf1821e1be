"""What a search is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.errors import UserError
from qpruner.search.aim import ScoreOption, check_score
from qpruner.search.executors import ExecutorConfig
from qpruner.search.structure import StructureConfig


@dataclass(frozen=True)
class SearchConfig:
    """How bits are searched for, and how wide layers are; budget, bits and prior are those of
    `MixedPrecisionQuantization`.

    Args:
        optimizer: name of the optimizer: ``bayesian``, ``random``, or one of Nevergrad's, which is rehearsed before the
            first trial. A search may go on with another one, which is told of the trials so far.
        trials: number of plans to try, at least 1.
        steps: optimizer steps of a trial's fit, at least 0; without any, plans are compared as they are.
        max_seconds: seconds after which a trial's fit ends, whatever its steps; a search with it cannot be repeated
            exactly.
        score: what plans are compared by: ``loss`` on the validation text; ``accuracy``, the mean over the validation
            questions of all tasks; or tasks with their weights, such as ``{boolq: 1, winogrande: 1}``. Accuracies count
            in steps of their standard error, within which the loss decides.
        front: whether to search for the trade-off of score and bytes below the budget, instead of the best plan in it;
            and of multiply-adds where widths of layers are searched.
        finalists: number of plans that are tried again with other seeds, at least 1; the best on average wins.
        finalist_seeds: number of seeds that finalists are tried with in all, at least 1.
        finalist_steps: optimizer steps of the finalists' fits; default ``steps``. With more, a trial is a rung: all but
            the finalists stop there. Fewer steps than recovery takes may choose the wrong ones: see
            ``docs/choosing/search.md``.
        executor: how and where trials run.
        structure: how wide layers may be, where that is searched together with bits; null to prune the base once and
            search bits alone.
        ranks: ranks that the adapters of a layer may have, at least two, where these are searched, too; the highest is
            ``r`` of the module's ``lora``, and the budget is one of bytes, against which adapters count. Empty to have
            ``r`` everywhere.

    Raises:
        UserError: a number out of its range, or ranks between which there is no choice.
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
