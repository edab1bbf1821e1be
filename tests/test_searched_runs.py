"""Searches from the command line: the record of them, kills, workers, and what cannot be searched."""

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from support.figures import curves
from support.forks import in_fork
from support.runs import KILL_AT, payload
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpruner.allocation.decision import Allocation
from qpruner.commands import run
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.model_folder import load_compressed
from qpruner.plan import CompressionPlan
from qpruner.quantization.packed import PackedLinear
from qpruner.records.folder import RunFolder
from qpruner.records.report import scalars
from qpruner.records.search import Proposer, SearchResults, pareto_front, variants_table
from qpruner.search.ledger import TrialRecord
from qpruner.search.progress import Progress
from qpruner.search.proposals import LocalProposals, OptimizerFailed, Proposal
from qpruner.search.trial import TrialRunner

TRIALS, SEEDS = 4, 2


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Units of their own under a budget, four trials of a step each, and two seeds for the best two."""
    allocation = {
        "allocation": "sensitivity",
        "budget": {"average_bits": 6.2},
        "deciding": {"granularity": "unit", "calibration": {"num_sequences": 8, "length": 12, "batch_size": 2}},
    }
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": allocation}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    search = {"trials": TRIALS, "steps": 1, "finalists": 2, "finalist_seeds": SEEDS}
    return {**config_that_prunes, "search": search}


@pytest.fixture
def fit_arguments(config: dict[str, Any], arguments: list[str], tmp_path: Path) -> list[str]:
    """The same without the search."""
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump({name: part for name, part in config.items() if name != "search"}))
    return ["--config", str(path), "--run.name", "fitted"]


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that loaders were made of."""
    splits: list[str] = []
    loaders = TokenDataModule.evaluation_loaders
    monkeypatch.setattr(
        TokenDataModule, "evaluation_loaders", lambda data, split: (splits.append(split), loaders(data, split))[1]
    )
    return splits


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: more threads add in another order


def records(path: Path) -> list[TrialRecord]:
    """Of a ledger, without a look at whose it is."""
    found: dict[int, TrialRecord] = {}
    for entry in map(json.loads, path.read_text().splitlines()[1:]):
        if entry["record"] == "optimizer":
            continue
        number = entry["trial"]
        if entry["record"] == "started":
            attempts = found[number].attempts + 1 if number in found else 1
            found[number] = TrialRecord(number, entry["key"], entry["told"], entry["point"], attempts)
        else:
            one = found[number]
            found[number] = TrialRecord(
                number,
                one.key,
                one.told,
                one.point,
                one.attempts,
                entry.get("scores"),
                entry.get("why"),
                entry["repeats"],
            )
    return [found[number] for number in sorted(found)]


def outcomes(path: Path) -> list[tuple[dict[str, Any], float]]:
    return [(one.key, one.scores["loss"]) for one in records(path) if one.scores is not None]


def bits_of(plan: CompressionPlan) -> list[int]:
    """Of the items, which are the units of both layers in order."""
    return [precision.bits for layer in plan.layers for precision in layer.precision.values()]


def test_a_search_records_what_it_tried_and_its_plan_is_carried_out(
    arguments: list[str],
    fit_arguments: list[str],
    tmp_path: Path,
    looked_at: list[str],
    capsys: Any,
    pictures: dict[str, Figure],
) -> None:
    run(["search", *arguments])
    assert set(looked_at) == {"validation"}
    folder = RunFolder(tmp_path / "runs" / "x")
    results = SearchResults.read(folder.results)
    priors = {one.name: Allocation.read(one / "allocation.json") for one in folder.prior.iterdir()}
    assert priors.keys() == {"uniform", "mutual_information", "sensitivity"}
    # Every trial is within the budget and new, the first one is the prior's plan.
    trials = records(folder.ledger)
    assert len(trials) == len(results.trials) == TRIALS and not results.failed and len(results.items) == 8
    assert all(one.scores and one.scores["average_bits"] <= 6.2 for one in trials)
    prior = priors["sensitivity"]
    for one in results.trials:
        sizes = [decision.sizes[choice] for decision, choice in zip(prior.decisions, one.choices, strict=True)]
        assert sum(sizes) <= prior.for_items
        assert one.num_bytes - sum(sizes) == prior.total_bytes - sum(
            decision.sizes[decision.chosen] for decision in prior.decisions
        )
    assert trials[0].key == {"choices": [one.chosen for one in prior.decisions], "steps": 1, "seed": 0}
    assert results.trials[0].num_bytes == prior.total_bytes
    assert len({one.choices for one in results.trials}) == TRIALS
    # The winner has the lowest mean of all that were tried with all seeds.
    names = [one.name for one in results.variants]
    ranked = sorted(results.trials, key=lambda one: one.loss)
    assert set(names) == {ranked[0].name, ranked[1].name, "uniform", "mutual information", "sensitivity"}
    means = [sum(one.losses) / SEEDS for one in results.variants]
    assert means == sorted(means) and all(len(one.losses) == SEEDS for one in results.variants)
    seeds = [one.key["seed"] for one in records(folder.variants)]
    assert {*seeds} <= {0, 1} and seeds.count(1) == len({one.choices for one in results.variants})
    winner = CompressionPlan.read(folder.plan)
    assert bits_of(winner) == [results.bits[choice] for choice in results.winner.choices]
    # The front.
    front = read_json(folder.pareto)
    assert [row["name"] for row in front] == list(results.front) == [one.name for one in pareto_front(results.trials)]
    assert {f"plans/{file.name}" for file in folder.plans.iterdir()} == {row["plan"] for row in front}
    by_name = {one.name: one for one in results.trials}
    for row in front:
        one = by_name[row["name"]]
        plan = CompressionPlan.read(folder.path / row["plan"])
        assert (row["bytes"], row["average_bits"], row["loss"]) == (one.num_bytes, one.average_bits, one.loss)
        assert bits_of(plan) == [results.bits[choice] for choice in one.choices]
    # What a person reads.
    report, printed = folder.report.read_text(), capsys.readouterr().out
    assert variants_table(results) in report and variants_table(results) in printed
    for picture in (folder.trials_picture, folder.pareto_picture):
        assert picture.exists() and f"]({picture.name})" in report
    proposed = curves(pictures["trials.png"].axes[0])["_child0"]
    assert proposed == [(number, one.loss) for number, one in enumerate(results.trials)]
    assert sorted(curves(pictures["pareto.png"].axes[0])["front"]) == sorted(
        (row["bytes"], row["loss"]) for row in front
    )
    assert f"Trial {TRIALS} of {TRIALS}: loss" in folder.log.read_text()
    losses = [one.loss for one in results.trials]
    assert scalars(folder.tensorboard, "search/loss") == [
        (number, pytest.approx(loss)) for number, loss in enumerate(losses)
    ]
    best = [min(losses[: number + 1]) for number in range(TRIALS)]
    assert [value for _, value in scalars(folder.tensorboard, "search/best")] == pytest.approx(best)
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert {"search/allocations", "search/front"} <= {*board.Tags()["images"]}
    first = EventAccumulator(str(folder.tensorboard / "trial 1"))
    first.Reload()
    assert first.Scalars("search/trial_loss")[0].value == pytest.approx(losses[0])
    assert "_hparams_/session_start_info" in first.summary_metadata
    # Again nothing is done.
    written = folder.ledger.read_bytes(), folder.variants.read_bytes(), folder.results.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpruner.dense_base.load_model", None)
        patch.setattr(TrialRunner, "__call__", None)
        run(["search", *arguments])
    assert "is finished" in folder.log.read_text()
    assert written == (folder.ledger.read_bytes(), folder.variants.read_bytes(), folder.results.stat().st_mtime_ns)
    # A fit of the winner holds exactly these bits, in exactly these bytes.
    run(["fit", *fit_arguments, "--plan", str(folder.plan)])
    fitted = RunFolder(tmp_path / "runs" / "fitted")
    assert CompressionPlan.read(fitted.plan) == winner
    stored = [payload(fitted.model / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors")]
    assert sum(stored) == results.winner.num_bytes
    model = load_compressed(fitted.model)
    packed = {name: one.precision.bits for name, one in model.named_modules() if isinstance(one, PackedLinear)}
    assert len(packed) == 14
    for layer, kept in enumerate(winner.layers):
        held = {bits for name, bits in packed.items() if f".layers.{layer}." in name}
        assert held == {precision.bits for precision in kept.precision.values()}


def test_killed_and_repeated_equals_uninterrupted(
    arguments: list[str], tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the base is kept, when it is measured, and in the second trial; nothing is measured twice."""
    pieces, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    sensitivities = [pieces.prior / method / "sensitivities.json" for method in ("mutual_information", "sensitivity")]
    written: dict[Path, int] = {}
    for moment, number in (("keeping", "1"), ("measuring", "1"), ("trial", "2")):
        killed = in_fork(KILL_AT, moment, number, "search", *arguments)
        assert killed.returncode == -9, killed.stderr
        assert not pieces.results.exists()
        assert pieces.reference.exists()
        assert pieces.base.exists() == (moment != "keeping")
        assert [path.exists() for path in sensitivities] == [moment != "keeping", moment == "trial"]
        assert pieces.ledger.exists() == (moment == "trial")
        kept = (pieces.reference, *pieces.base.glob("*"), *sensitivities)
        times = {path: path.stat().st_mtime_ns for path in kept if path.exists()}
        assert written.items() <= times.items()
        written = times
    assert [one.done for one in records(pieces.ledger)] == [True, False]
    ran: list[dict[str, Any]] = []
    call = TrialRunner.__call__
    monkeypatch.setattr(TrialRunner, "__call__", lambda runner, key: (ran.append(key), call(runner, key))[1])
    run(["search", *arguments])
    assert ran == [one.key for one in (*records(pieces.ledger)[1:], *records(pieces.variants))]
    assert [one.attempts for one in records(pieces.ledger)] == [1, 2, 1, 1]
    assert written == {path: path.stat().st_mtime_ns for path in written}
    ran.clear()
    run(["search", *arguments, "--run.name", "whole"])
    assert ran == [one.key for one in (*records(whole.ledger), *records(whole.variants))]
    for part in ("ledger", "variants"):
        assert outcomes(getattr(pieces, part)) == outcomes(getattr(whole, part))
    assert pieces.plan.read_text() == whole.plan.read_text()
    first, second = (SearchResults.read(folder.results) for folder in (pieces, whole))
    assert [(one.name, one.losses) for one in first.variants] == [(one.name, one.losses) for one in second.variants]
    assert first.front == second.front
    assert len(scalars(pieces.tensorboard, "search/loss")) == TRIALS


def test_a_front_has_the_trade_off_below_the_budget(arguments: list[str], tmp_path: Path) -> None:
    run(["search", *arguments, "--search.front", "true", "--search.trials", "6", "--search.finalist_seeds", "1"])
    folder = RunFolder(tmp_path / "runs" / "x")
    front = read_json(folder.pareto)
    results = SearchResults.read(folder.results)
    assert len(results.trials) == 6 and len({one.num_bytes for one in results.trials}) > 1
    assert all(first["bytes"] < second["bytes"] for first, second in pairwise(front))
    assert all(first["loss"] > second["loss"] for first, second in pairwise(front))
    assert all(one.average_bits <= 6.2 for one in results.trials)
    assert results.winner.loss == min(one.loss for one in results.variants)


@pytest.mark.slow
def test_two_workers_find_what_one_finds(arguments: list[str], tmp_path: Path, one_thread: None) -> None:
    """Random plans depend on no score; seed 3 shows that nothing depends on its being 0."""
    random = [*arguments, "--search.optimizer", "random", "--search.finalist_seeds", "1", "--seed_everything", "3"]
    run(["search", *random, "--run.name", "one"])
    workers = ["--search.executor.kind", "processes", "--search.executor.workers", "2"]
    run(["search", *random, "--run.name", "two", *workers])
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("one", "two"))
    assert outcomes(one.ledger) == outcomes(two.ledger) and len(outcomes(one.ledger)) == TRIALS
    assert sorted(map(str, outcomes(one.variants))) == sorted(map(str, outcomes(two.variants)))
    assert one.plan.read_text() == two.plan.read_text()
    assert [record.told for record in records(two.ledger)] == [0, 0, 2, 2]


def test_longer_fits_of_finalists_are_a_rung(arguments: list[str], tmp_path: Path) -> None:
    run(["search", *arguments, "--search.finalist_steps", "2", "--search.finalist_seeds", "1", "--search.trials", "2"])
    folder = RunFolder(tmp_path / "runs" / "x")
    assert {one.key["steps"] for one in records(folder.ledger)} == {1}
    plans = {tuple(one.key["choices"]) for one in records(folder.variants)}
    assert [one.scores["steps"] for one in records(folder.variants) if one.scores] == [2] * len(plans)


def test_other_finalists_of_a_finished_search_are_compared(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fits that were made before are not repeated, and the same finalists again are no work."""
    ran: list[dict[str, Any]] = []
    call = TrialRunner.__call__

    def counted(runner: TrialRunner, key: dict[str, Any]) -> Any:
        ran.append(key)
        return call(runner, key)

    monkeypatch.setattr(TrialRunner, "__call__", counted)
    command = ["search", *arguments, "--search.trials", "3", "--search.finalists"]
    run([*command, "1", "--search.finalist_seeds", "1"])
    folder = RunFolder(tmp_path / "runs" / "x")
    before, tried = folder.ledger.read_bytes(), len(ran)
    assert [len(one.losses) for one in SearchResults.read(folder.results).variants if "trial" in one.name] == [1]
    run([*command, "2", "--search.finalist_seeds", "2"])
    results = SearchResults.read(folder.results)
    assert [len(one.losses) for one in results.variants if "trial" in one.name] == [2, 2]
    assert {len(one.losses) for one in results.variants} == {2} and folder.ledger.read_bytes() == before
    assert {key["seed"] for key in ran[tried:]} == {1} and len({*map(str, ran)}) == len(ran)
    assert "compared anew, by 2 finalist(s) with 2 seed(s) of 1 steps each" in folder.log.read_text()
    tried = len(ran)
    run([*command, "2", "--search.finalist_seeds", "2", "--search.finalist_steps", "2"])
    assert {key["steps"] for key in ran[tried:]} == {2} and len(ran) > tried
    tried = len(ran)
    written = folder.results.stat().st_mtime_ns
    run([*command, "2", "--search.finalist_seeds", "2", "--search.finalist_steps", "2"])
    assert len(ran) == tried and folder.results.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_finished_search_goes_on_to_more_trials(arguments: list[str], tmp_path: Path) -> None:
    few = ["search", *arguments, "--search.finalists", "1", "--search.finalist_seeds", "1"]
    run([*few, "--search.trials", "2"])
    folder = RunFolder(tmp_path / "runs" / "x")
    before = folder.ledger.read_text()
    run([*few, "--search.trials", "4"])
    assert folder.ledger.read_text().startswith(before)
    assert len(SearchResults.read(folder.results).trials) == len(records(folder.ledger)) == 4
    run(["search", *arguments, "--run.name", "whole"])
    assert outcomes(folder.ledger) == outcomes(RunFolder(tmp_path / "runs" / "whole").ledger)[:4]


def test_a_search_whose_optimizer_fails_goes_on_with_another(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailsLate(LocalProposals):
        def ask(self) -> Proposal:
            if self._asked == 2:
                raise OptimizerFailed("TBPSA fails when it is asked: singular matrix.")
            return super().ask()

    monkeypatch.setattr("qpruner.search.trainer.check_runs", lambda *_: None)
    monkeypatch.setattr("qpruner.search.succession.rehearse", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr("qpruner.search.trainer.open_proposals", lambda settings: nullcontext(FailsLate(settings)))
        with pytest.raises(
            UserError, match=r"singular matrix\. The 2 trials so far are safe in .*ledger.jsonl.*another"
        ):
            run(["search", *arguments, "--search.optimizer", "TBPSA"])
    folder = RunFolder(tmp_path / "runs" / "x")
    before = folder.ledger.read_text()
    few = ["--search.finalists", "1", "--search.finalist_seeds", "1"]
    run(["search", *arguments, *few, "--search.optimizer", "bayesian"])
    assert folder.ledger.read_text().startswith(before)
    assert [record.told for record in records(folder.ledger)] == [0, 1, 2, 3]
    results = SearchResults.read(folder.results)
    assert results.proposers == (Proposer("TBPSA", 1, 2), Proposer("bayesian", 3, 4))
    assert "Trials 1 to 2 were proposed by `TBPSA`, 3 to 4 by `bayesian`." in folder.report.read_text()
    # It is finished, whoever of the two is asked for; a third one would be answered with what it did not propose.
    run(["search", *arguments, *few, "--search.optimizer", "TBPSA"])
    with pytest.raises(UserError, match=r"is finished, and random proposed none of it\. .*--search\.trials"):
        run(["search", *arguments, *few, "--search.optimizer", "random"])


# What cannot be had.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["search.optimizer", "bayesain"], ["no optimizer 'bayesain'", "Did you mean 'bayesian'"]),
        (["search.optimizer", "OnePlusOn"], ["no optimizer 'OnePlusOn'", "OnePlusOne"]),
        (
            ["search.optimizer", "SMAC3"],
            ["SMAC3 fails when it is asked: it needs the package 'ConfigSpace'", "bayesian"],
        ),
        (["search.trials", "0"], ["search.trials is 0; it must be at least 1"]),
        (["search.steps", "-1"], ["search.steps is -1; it must be at least 0"]),
        (["search.finalists", "0"], ["search.finalists is 0"]),
        (["search.finalist_steps", "0"], ["search.finalist_steps is 0; finalists take at least the 1 steps of all"]),
        (["search.max_seconds", "0"], ["search.max_seconds is 0"]),
        (["search.executor.workers", "2"], ["the serial executor runs one trial at a time", "processes"]),
        (
            ["search.executor", "{kind: dask, address: 'tcp://127.0.0.1:9'}"],
            ["No Dask scheduler answers at 'tcp://127"],
        ),
        (["trainer.devices", "2"], ["the Trainer has 2", "--search.executor.kind processes"]),
        (["trainer.callbacks.budget", "{average_bits: 4}"], ["The budget is 4 bits per weight, and the cheapest plan"]),
        (["trainer.callbacks.deciding.calibration.num_sequences", "49"], ["asks for 49 sequences"]),
        (["search.trails", "3"], ["trails"]),
        (["trainer.overfit_batches", "2"], ["overfit_batches is 2", "--trainer.limit_train_batches"]),
        (["trainer.profiler", "simple"], ["profiler is 'simple'", "profile a fit"]),
        (["trainer.fast_dev_run", "true"], ["a search has no rehearsal"]),
        (["plan", "plan.json"], ["--plan is for `qpruner fit`"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and len(value) == 2 else "",
)
def test_mistakes_are_told_before_any_model_is_loaded(
    arguments: list[str], wrong: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    monkeypatch.setattr("qpruner.search.cluster.CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError) as caught:
        run(["search", *arguments, f"--{wrong[0]}", wrong[1]])
    assert all(text in str(caught.value) for text in said), str(caught.value)


def test_a_search_needs_a_budget_text_and_a_validation_split(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    pruning, quantization = config["trainer"]["callbacks"]
    uniform = {
        **quantization["init_args"],
        "allocation": "uniform",
        "deciding": {"calibration": {"num_sequences": 25, "length": 24}},
    }
    without_text = {"class_path": quantization["class_path"], "init_args": uniform}
    without_budget = {"class_path": quantization["class_path"], "init_args": {"bits": 4}}
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    for file in (train, test):
        file.write_text(f"words of {file.stem} and more words. " * 400)
    no_validation = {
        "class_path": "TextDataModule",
        "init_args": {"train": str(train), "test": str(test), "held_out": 0, "max_length": 24},
    }
    trainer = config["trainer"]
    for changes, said in (
        ({"trainer": {**trainer, "callbacks": [pruning, without_budget]}}, "MixedPrecisionQuantization has none"),
        ({"trainer": {**trainer, "callbacks": [pruning]}}, "add MixedPrecisionQuantization"),
        ({"trainer": {**trainer, "callbacks": [without_text]}}, "asks for 25 sequences"),
        ({"data": no_validation}, "chooses on the validation split, and there is none"),
    ):
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump({**config, **changes}))
        with pytest.raises(UserError, match=said):
            run(["search", "--config", str(path)])


def test_a_trial_that_only_the_ledger_saw_is_shown_when_the_search_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the record of a trial and its curve."""
    show = Progress.show

    def killed(progress: Progress, record: TrialRecord) -> None:
        if record.number == 1:
            raise InterruptedError
        show(progress, record)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", killed)
        with pytest.raises(InterruptedError):
            run(["search", *arguments])
    run(["search", *arguments])
    folder = RunFolder(tmp_path / "runs" / "x")
    losses = [loss for _, loss in outcomes(folder.ledger)]
    for tag, values in {"loss": losses, "best": [min(losses[: number + 1]) for number in range(TRIALS)]}.items():
        assert scalars(folder.tensorboard, f"search/{tag}") == [*enumerate(map(pytest.approx, values))]


@pytest.mark.slow
def test_a_folder_and_a_ledger_belong_to_one_search(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["search", *arguments])
    with pytest.raises(UserError) as caught:
        run(["search", *arguments, "--search.steps", "2"])
    assert "search.steps: was 1, is now 2" in str(caught.value)
    # A `SearchTrainer` without a run claims nothing; the ledger tells.
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.results.unlink()
    monkeypatch.setattr("qpruner.runs.run.claim_folder", lambda *_, **__: True)
    for options, said in (
        (["--seed_everything", "1"], "model.seed: was 0, is now 1"),
        (["--data.num_train", "23"], "data.train.rows: was 24, is now 23"),
        (["--data.loader.batch_size", "3"], "data.batch_size: was 4, is now 3"),
        (["--search.steps", "2"], "search.steps: was 1, is now 2"),
        (["--trainer.callbacks.loftq_iterations", "2"], "MixedPrecisionQuantization.loftq_iterations: was 1, is now 2"),
    ):
        with pytest.raises(UserError, match="belongs to a search with other options") as caught:
            run(["search", *arguments, *options])
        assert said in str(caught.value)


def test_a_plan_for_another_model_is_refused(arguments: list[str], fit_arguments: list[str], tmp_path: Path) -> None:
    run(["search", *arguments, "--search.trials", "1", "--search.finalist_seeds", "1"])
    plan = tmp_path / "runs" / "x" / "plan.json"
    with pytest.raises(UserError, match="plan is for"):
        run(["fit", *fit_arguments, "--model.base", "qpruner/stories", "--plan", str(plan)])
