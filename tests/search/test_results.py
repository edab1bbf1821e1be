"""From records of trials to what a person reads."""

from pathlib import Path
from typing import Any

import pytest

from qpruner.records.search import Proposer
from qpruner.search.aim import Aim
from qpruner.search.ledger import Ledger, OptimizerRecord, TrialRecord
from qpruner.search.results import proposers, timed, tried


def record(loss: float, seed: int, **scores: Any) -> TrialRecord:
    key = {"choices": [0, 1], "steps": 2, "seed": seed}
    return TrialRecord(seed, key, 0, None, scores={"loss": loss, "bytes": 10 + seed, "average_bits": 6.0, **scores})


def test_a_plan_has_the_losses_of_all_seeds_and_else_the_scores_of_the_first() -> None:
    plan = tried("trial 3", [record(2.5, 4, kl=0.1), record(3.5, 5, kl=0.2)], Aim.of("loss", {}))
    assert (plan.name, plan.choices, plan.losses, plan.loss) == ("trial 3", (0, 1), (2.5, 3.5), 3.0)
    assert (plan.num_bytes, plan.average_bits, plan.scores["kl"]) == (14, 6.0, 0.1)


def test_a_plan_gets_its_seconds_beside_what_it_measured() -> None:
    plans = [tried(name, [record(2.5, 4)], Aim.of("loss", {})) for name in ("a", "b")]
    first, second = timed(plans, [{"1": 2.0}, {"1": 3.0}])
    assert (first.seconds, second.seconds) == ({"1": 2.0}, {"1": 3.0}) and plans[0].seconds == {}
    assert (second.name, second.loss, second.scores["bytes"]) == ("b", 2.5, 14)


def test_a_plan_has_the_accuracies_of_all_seeds_and_what_their_mean_is_worth() -> None:
    aim = Aim.of("accuracy", {"endings": 25})  # steps of 0.1
    records = [record(2.0, 4, **{"endings/accuracy": 0.5}), record(4.0, 5, **{"endings/accuracy": 0.8})]
    plan = tried("trial 3", records, aim)
    assert plan.accuracies == (0.5, 0.8) and plan.accuracy == 0.65
    assert plan.minimized == aim.value(3.0, 0.65) == pytest.approx(0.1 * (3 + 3 / 4))
    assert tried("trial 3", records, Aim.of("loss", {})).minimized == 3.0


def ledger_of(folder: Path, trials: int, *optimizers: OptimizerRecord) -> Ledger:
    ledger = Ledger.open(folder / "ledger.jsonl", {})
    for number in range(trials):
        for optimizer in optimizers:
            if optimizer.first == number:
                ledger.begin(optimizer)
        ledger.start(number, {"choices": [number]}, number, [float(number)])
        ledger.finish(number, {"loss": 1.0})
    for optimizer in optimizers:
        if optimizer.first >= trials:
            ledger.begin(optimizer)
    return ledger


def test_proposers_are_those_who_proposed_something(tmp_path: Path) -> None:
    optimizers = [OptimizerRecord("random", 0, 4, 1), OptimizerRecord("bayesian", 3, 4, 1)]
    assert proposers(ledger_of(tmp_path, 4, *optimizers)) == [Proposer("random", 1, 3), Proposer("bayesian", 4, 4)]


def test_an_optimizer_that_was_replaced_at_once_is_none(tmp_path: Path) -> None:
    optimizers = [OptimizerRecord("TBPSA", 0, 2, 1), OptimizerRecord("random", 0, 2, 1)]
    assert proposers(ledger_of(tmp_path, 2, *optimizers)) == [Proposer("random", 1, 2)]
