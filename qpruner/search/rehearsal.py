"""Tries out an optimizer before the first trial, on the real space with made-up scores: milliseconds, no training.

Of Nevergrad's optimizers, some need packages that Nevergrad does not install, some fail or hang after some scores, and
some propose other plans when they are started again with the same seed, so that an interrupted search could not be
resumed. All of that would otherwise only come to light after trials that took hours.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner.allocation.solving import Choice
from qpruner.errors import UserError
from qpruner.search.optimizers import OURS, OptimizerSettings, check_optimizer
from qpruner.search.proposals import OptimizerFailed, Point, Proposals, Score, open_proposals
from qpruner.search.space import SearchSpace
from qpruner.seeds import derive_seed

SECONDS = 30.0  # after which a rehearsal ends, even if not all proposals have been made
PATIENCE = 60.0  # seconds without an answer after which an optimizer is considered to hang
SLOW = 1.0  # seconds per proposal from which on a warning is given
STAND_IN = SearchSpace([[Choice(1, 0.0), Choice(2, -float(gain))] for gain in range(1, 9)], [(4, 8)] * 8, limit=12)


def check_runs(name: str, num_workers: int, patience: float = PATIENCE) -> None:
    """Finds what an optimizer needs and lacks, without the space of the search, which takes long to prepare.

    Args:
        name: name of the optimizer.
        num_workers: number of trials that are evaluated at once.
        patience: seconds without an answer after which the optimizer is considered to hang.

    Raises:
        UserError: no optimizer has this name, it does not support this many workers, or it cannot make a proposal.
    """
    check_optimizer(name, num_workers)
    if name not in OURS:
        settings = OptimizerSettings(name, STAND_IN, 4 * num_workers, num_workers, seed=0)
        _rehearse(settings, [], num_proposals=num_workers, seconds=SECONDS, patience=patience)


def rehearse(
    settings: OptimizerSettings,
    known: Sequence[tuple[Point, Score]] = (),
    *,
    seconds: float = SECONDS,
    patience: float = PATIENCE,
) -> None:
    """Has an optimizer of Nevergrad propose as often as in the search, and tells it scores such as a search may find.

    Two processes do so side by side and must make the same proposals. Our own optimizers need no rehearsal.

    Args:
        settings: settings of the optimizer.
        known: points and scores that the optimizer is told first.
        seconds: seconds after which the rehearsal ends.
        patience: seconds without an answer after which the optimizer is considered to hang.

    Raises:
        UserError: the optimizer fails, gives no answer, or does not repeat its proposals.
    """
    if settings.name in OURS:
        return
    points, each = _rehearse(settings, known, num_proposals=settings.num_trials, seconds=seconds, patience=patience)
    plans = len(np.unique(settings.space.decode(np.array(points)), axis=0))
    rank_zero_info(f"Rehearsed {settings.name}: {len(points)} proposals, {plans} different plan(s), {each:.2g} s each.")
    if len(points) < settings.num_trials or each > SLOW:
        rank_zero_warn(
            f"{settings.name} takes {each:.2g} s for a proposal; {len(points)} of {settings.num_trials} were rehearsed."
        )
    if plans < len(points) / 2:
        rank_zero_warn(
            f"{len(points)} proposals of {settings.name} in its rehearsal were {plans} different plan(s), and one that "
            f"comes again teaches a search nothing. {' and '.join(OURS)} propose none twice while there are others."
        )


def _rehearse(
    settings: OptimizerSettings,
    known: Sequence[tuple[Point, Score]],
    *,
    num_proposals: int,
    seconds: float,
    patience: float,
) -> tuple[list[Point], float]:
    """The points that were proposed, and the seconds per proposal."""
    score_of = MadeUpScores(settings.space, settings.seed)
    points: list[Point] = []
    try:
        with _opened(settings, patience) as first, _opened(settings, patience) as second:
            for twin in (first, second):
                twin.wait()
                for value, score in known:
                    twin.learn(value, score)
            since = time.perf_counter()
            while len(points) < num_proposals and (not points or time.perf_counter() - since < seconds):
                size = min(settings.num_workers, num_proposals - len(points))
                wave, again = ([twin.ask() for _ in range(size)] for twin in (first, second))
                if wave != again:
                    raise OptimizerFailed(
                        f"{settings.name} does not make the same proposals again from the same seed and scores, so "
                        f"that a search that is cut off could not go on."
                    )
                for proposal in wave:
                    for twin in (first, second):
                        twin.tell(proposal, score_of(proposal.value))
                points += [proposal.value for proposal in wave]
            return points, (time.perf_counter() - since) / (2 * len(points))
    except OptimizerFailed as error:
        ours = " or ".join(OURS)
        raise UserError(
            f"{error} That was in a rehearsal with made-up scores, after {len(points)} of {num_proposals} proposals; "
            f"no trial was spent on it. Take another --search.optimizer, such as {ours}."
        ) from error


def _opened(settings: OptimizerSettings, patience: float) -> AbstractContextManager[Proposals]:
    return open_proposals(settings, patience=patience, hear=lambda warning: None)  # the search will hear warnings


class MadeUpScores:
    """Losses such as a search finds: about 2 nats per token, mostly determined by the prior and otherwise random.

    Args:
        space: space of the plans; where it spends a share of the bytes, these are a second objective, and the
            multiply-adds of a structure a third.
        seed: seed of the random part, which is the same for equal plans.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space, self.seed = space, seed
        costs = space.costs(space.decode(space.uninformed(np.random.default_rng(seed), 256)))
        self.middle, self.spread = costs.mean(), costs.std() or 1.0

    def __call__(self, value: Point) -> Score:
        plan = self.space.decode(np.array([value]))
        (luck,) = np.random.default_rng(derive_seed(self.seed, *plan[0].tolist())).standard_normal(1)
        (cost,) = (self.space.costs(plan) - self.middle) / self.spread
        loss = float(2 + 0.1 * cost + 0.03 * luck)
        if not self.space.spends:
            return loss
        structure, size = self.space.structure, float(self.space.sizes(plan)[0])
        if structure is None:
            return [loss, size]
        return [loss, size, float(structure.multiply_adds(plan[:, : self.space.num_parts])[0])]
