"""Decides which optimizer proposes which trials of a search, and how the next one takes over.

The ledger says where each optimizer began. Only the last one is made again when a search is resumed: it learns the
points and scores of all trials before its first one, and then makes the proposals in the ledger and those to come.
"""

from lightning.pytorch.utilities import rank_zero_info

from qpruner.search.ledger import Ledger, OptimizerRecord
from qpruner.search.loop import Judge
from qpruner.search.optimizers import OURS, OptimizerSettings
from qpruner.search.proposals import Point
from qpruner.search.rehearsal import rehearse
from qpruner.search.space import SearchSpace
from qpruner.seeds import derive_seed


def succeed(
    ledger: Ledger,
    name: str,
    space: SearchSpace,
    judge: Judge,
    *,
    num_trials: int,
    workers: int,
    seed: int,
    starts: tuple[Point, ...] = (),
) -> None:
    """Has an optimizer propose the remaining trials, after a rehearsal, unless it is already the one that does.

    An optimizer of Nevergrad's that planned for fewer trials or workers also begins anew; ours do not plan.

    Args:
        ledger: ledger of the search.
        name: name of the optimizer.
        space: space of the plans.
        judge: fresh judge, which decides what optimizers are told of trials.
        num_trials: number of trials of the whole search.
        workers: number of trials proposed at a time.
        seed: seed of the search.
        starts: points that are proposed before others.

    Raises:
        UserError: the rehearsal failed; the ledger is unchanged.
    """
    first, before = len(ledger.records), ledger.optimizers[-1] if ledger.optimizers else None
    goes_on = (
        before is not None
        and before.name == name
        and (name in OURS or (num_trials <= before.trials and workers <= before.workers))
    )
    if goes_on or num_trials <= first:
        return
    record = OptimizerRecord(name, first, num_trials, workers)
    known = [(trial.point, judge(trial)) for trial in ledger.records if trial.done]
    rehearse(settings_of(record, space, seed, starts), known)
    ledger.begin(record)
    if before is not None:
        rank_zero_info(f"{name} proposes from trial {first + 1} on; {before.name} proposed the last one before.")


def settings_of(
    record: OptimizerRecord, space: SearchSpace, seed: int, starts: tuple[Point, ...] = ()
) -> OptimizerSettings:
    """The settings that an optimizer is made from, so that it makes the same proposals each time.

    Args:
        record: record of the optimizer.
        space: space of the plans.
        seed: seed of the search; an optimizer that succeeds another has its own seed, lest it repeat the proposals.
        starts: points that the first optimizer proposes before others.
    """
    return OptimizerSettings(
        record.name,
        space,
        num_trials=record.trials - record.first,
        num_workers=record.workers,
        seed=derive_seed(seed, "optimizer", record.first) if record.first else seed,
        starts=() if record.first else starts,
    )
