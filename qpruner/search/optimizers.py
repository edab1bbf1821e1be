"""Optimizers that propose the next plan: our own and all of Nevergrad's, behind one function.

All use Nevergrad's ask-and-tell interface on points of a `SearchSpace`. Several objectives are told as a list, score
first. An optimizer with the same seed that is asked and told the same things in the same order makes the same
proposals, so a record of trials is all that a search needs to resume.

**bayesian.** The prior's plan first. After that, from a pool of random plans and modifications of plans tried before,
the one with the highest expected improvement under a Gaussian process whose mean follows the prior as far as the scores
bear it out. No plan is proposed twice. Plans that are still being evaluated count with the score that the process
expects of them (the "kriging believer"), so several can be evaluated at once.

**random.** Plans drawn without regard to the prior, none twice.

**Sources.** Ginsbourger, Le Riche and Carraro 2010, "Kriging is well-suited to parallelize optimization". Several
objectives: Knowles 2006, "ParEGO". Refinement of a prior's bits by a Gaussian process: QPruner (arXiv 2412.11629).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.optimization.base import Optimizer

from qpruner.errors import UserError, nearest
from qpruner.search.gaussian import expected_improvement, fit, posterior
from qpruner.search.space import SearchSpace
from qpruner.search.structure import Floats, Integers
from qpruner.seeds import derive_seed

POOL = 1024  # plans from which a proposal is picked
ATTEMPTS = 16  # pools without a new plan after which plans may repeat


@dataclass(frozen=True)
class OptimizerSettings:
    """Everything that an optimizer's proposals depend on, except the scores.

    Args:
        name: name of the optimizer: ``bayesian``, ``random`` or one of Nevergrad's.
        space: space of the plans.
        num_trials: number of trials that will be told, at least 1; many of Nevergrad's optimizers plan for it.
        num_workers: number of trials that are evaluated at once, at least 1.
        seed: seed of the random draws.
        starts: points that are proposed before others.
    """

    name: str
    space: SearchSpace
    num_trials: int
    num_workers: int
    seed: int
    starts: tuple[list[float], ...] = ()


def make_optimizer(settings: OptimizerSettings) -> Optimizer:
    """Makes an optimizer whose candidates have a point of the space as their value.

    Args:
        settings: settings of the optimizer.

    Raises:
        UserError: from `check_optimizer`; other errors where one of Nevergrad's optimizers does not run here.
    """
    name, budget, num_workers = settings.name, settings.num_trials, settings.num_workers
    check_optimizer(name, num_workers)
    array = ng.p.Array(init=np.zeros(settings.space.dimension))
    array.random_state = np.random.RandomState(derive_seed(settings.seed, "search", name) % 2**32)
    if name in OURS:
        return OURS[name](array, budget, num_workers, space=settings.space, seed=settings.seed, starts=settings.starts)
    optimizer = ng.optimizers.registry[name](array, budget, num_workers)
    for start in reversed(settings.starts):  # the point suggested last is asked about first
        optimizer.suggest(np.array(start))
    return optimizer


def check_optimizer(name: str, num_workers: int) -> None:
    """Finds, without a space, why `make_optimizer` would refuse a name.

    Args:
        name: name of the optimizer.
        num_workers: number of trials that are evaluated at once.

    Raises:
        UserError: no optimizer has this name; or it only proposes one trial after the other, and there are several
            workers.
    """
    if name in OURS:
        return
    registry = ng.optimizers.registry
    if name not in registry:
        raise UserError(
            f"There is no optimizer {name!r}.{nearest(name, [*OURS, *registry])} There are {', '.join(OURS)} and all "
            f"of Nevergrad's, such as OnePlusOne, TBPSA and NGOpt."
        )
    if registry[name].no_parallelization and num_workers > 1:
        raise UserError(
            f"{name} proposes one trial after the other, and there are {num_workers} workers. Have one worker, or take "
            f"{' or '.join(OURS)}."
        )


class PlanOptimizer(Optimizer):
    """Remembers which plans are pending and which were told; draws depend on the seed and on how many these are.

    Args:
        parametrization: Nevergrad's array of ``space.dimension`` numbers.
        budget: number of trials.
        num_workers: number of trials that are evaluated at once.
        space: space of the plans.
        seed: seed of the random draws.
        starts: points that are proposed before others, except for those whose plan is already known.
    """

    def __init__(
        self,
        parametrization: Any,
        budget: int,
        num_workers: int,
        *,
        space: SearchSpace,
        seed: int,
        starts: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__(parametrization, budget, num_workers)
        self._no_hypervolume = True  # Nevergrad would reduce several objectives to one number
        self.space, self.seed = space, seed
        self.points: list[Floats] = []  # of the plans that were told, as are the next two
        self.plans: list[tuple[int, ...]] = []
        self.losses: list[Floats] = []  # one to three each
        self.pending: dict[str, tuple[int, ...]] = {}  # by candidate
        self._starts = [np.array(start) for start in starts]
        self._started: set[str] = set()  # candidates of starts

    def _internal_ask_candidate(self) -> Any:
        # Starts are not drawn: while they are pending, they do not count.
        drawn = len(self.plans) + len(self.pending.keys() - self._started)
        start = self._next_start()
        point = self._propose(np.random.default_rng(derive_seed(self.seed, "ask", drawn))) if start is None else start
        candidate = self.parametrization.spawn_child(new_value=point)
        self.pending[candidate.uid] = self._plan(candidate.value)
        if start is not None:
            self._started.add(candidate.uid)
        return candidate

    def _next_start(self) -> Floats | None:
        """The next start whose plan is neither told nor pending; None if there is none."""
        while self._starts:
            start = self._starts.pop(0)
            if self._plan(start) not in {*self.plans, *self.pending.values()}:
                return start
        return None

    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        self.pending.pop(candidate.uid, None)
        self.points.append(candidate.value)
        self.plans.append(self._plan(candidate.value))
        self.losses.append(candidate.losses)

    def _plan(self, point: Floats) -> tuple[int, ...]:
        return tuple(self.space.decode(point[None])[0].tolist())

    def _fresh(self, points: Floats) -> tuple[Floats, Integers]:
        """The points of plans that are neither told nor pending, one for each plan, and these plans."""
        plans = self.space.decode(points)
        known = {*self.plans, *self.pending.values()}
        first: dict[tuple[int, ...], int] = {}
        for place, plan in enumerate(map(tuple, plans.tolist())):
            if plan not in known:
                first.setdefault(plan, place)
        kept = list(first.values())
        return points[kept], plans[kept]

    def _unknown(self, generator: np.random.Generator) -> Floats:
        """A random point of a new plan, or of any plan if many draws gave no new one."""
        for _ in range(ATTEMPTS):
            points, _ = self._fresh(self.space.uninformed(generator, POOL))
            if len(points):
                break
        else:
            points = self.space.uninformed(generator, 1)
        return points[0]

    def _propose(self, generator: np.random.Generator) -> Floats:
        raise NotImplementedError


class RandomPlans(PlanOptimizer):
    """Plans drawn without regard to the prior, none twice while there are others."""

    def _propose(self, generator: np.random.Generator) -> Floats:
        return self._unknown(generator)


class BayesianPlans(PlanOptimizer):
    """The plan of largest expected improvement under a Gaussian process; costs are standardised by random plans."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        generator = np.random.default_rng(derive_seed(self.seed, "costs"))
        costs = self.space.costs(self.space.decode(self.space.uninformed(generator, POOL)))
        self.middle, self.spread = costs.mean(), _spread(costs)

    def _propose(self, generator: np.random.Generator) -> Floats:
        prior = np.zeros(self.space.dimension)
        if self._plan(prior) not in {*self.plans, *self.pending.values()}:
            return prior
        if not self.plans:
            return self._unknown(generator)
        scores = self._scores(generator)
        points, plans = self._fresh(self._pool(generator, scores))
        if not len(points):
            return self._unknown(generator)
        told = self._inputs(self.plans)
        process = fit(*told, scores)
        if self.pending:
            out = self._inputs([*self.pending.values()])
            expected, _ = posterior(process, *told, scores, *out)
            told = np.concatenate([told[0], out[0]]), np.concatenate([told[1], out[1]])
            scores = np.concatenate([scores, expected])
        mean, variance = posterior(process, *told, scores, *self._inputs(plans))
        improvement = expected_improvement(mean, variance, scores.min())
        return points[np.lexsort((mean, -improvement))[0]]

    def _inputs(self, plans: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Features and standardised prior costs."""
        plans = np.asarray(plans)
        return self.space.features(plans), (self.space.costs(plans) - self.middle) / self.spread

    def _scores(self, generator: np.random.Generator) -> Floats:
        """[told], with mean 0 and spread 1; several objectives are combined into one with random weights."""
        losses = np.array(self.losses)
        if losses.shape[1] > 1:
            scaled = (losses - losses.min(0)) / _spread(losses)
            weighed = scaled * generator.dirichlet(np.ones(losses.shape[1]))
            losses = weighed.max(1) + 0.05 * weighed.sum(1)
        scores = losses.reshape(len(losses))
        return (scores - scores.mean()) / _spread(scores)

    def _pool(self, generator: np.random.Generator, scores: Floats) -> Floats:
        """Random points with and without the prior, and the best and other points with some coordinates changed."""
        quarter, dimension = POOL // 4, self.space.dimension
        bases = np.concatenate([np.full(quarter, scores.argmin()), generator.integers(len(scores), size=quarter)])
        reach = np.exp(generator.uniform(-1, 1.5, (len(bases), 1)))
        changes = reach * generator.standard_normal((len(bases), dimension))
        changes *= generator.random(changes.shape) < 2 / dimension
        return np.concatenate(
            [
                self.space.uninformed(generator, quarter),
                generator.standard_normal((quarter, dimension)),
                np.array(self.points)[bases] + changes,
            ]
        )


def _spread(values: Floats) -> Floats:
    """Standard deviations of columns; 1 where values differ only by rounding."""
    deviations = values.std(axis=0)
    return np.where(deviations > 1e-9 * np.abs(values).max(axis=0), deviations, 1.0)


OURS = {"bayesian": BayesianPlans, "random": RandomPlans}
