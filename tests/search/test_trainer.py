"""The parts of a search around its trials: what tells it from others, what a trial counts, and what is left behind."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from support.searches import finetuner, pruning, quantization, search_of, stories_of, trainer

from qpruner.callbacks import LoRAGuidedPruning
from qpruner.callbacks.compression import CompressionInSetup
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.plan import CompressionPlan
from qpruner.records.search import SearchResults
from qpruner.search.ledger import Key, Ledger, OptimizerRecord, TrialRecord
from qpruner.search.preparation import compressing
from qpruner.search.progress import Progress
from qpruner.search.structure import Part, Structure
from qpruner.search.trainer import Search, SearchTrainer
from qpruner.search.workers import Outcome
from qpruner.training.module import LoRAFinetuner


def loss_of(choices: Sequence[int], seed: int = 3) -> float:
    """The more 8 bits the lower, by a little for each unit; another seed changes it by less than a unit does."""
    return 3.0 - sum(choice * (1 + place / 8) for place, choice in enumerate(choices)) / 10 + (seed - 3) / 1000


class Scored:
    """An executor whose scores are made up, and in which some plans fail."""

    def __init__(self, fails: Sequence[Sequence[int]] = ()) -> None:
        self.fails = [list(choices) for choices in fails]
        self.keys: list[Key] = []

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        for place, key in enumerate(keys):
            self.keys.append(key)
            choices = key["choices"]
            if choices in self.fails:
                yield place, Outcome(why="out of memory")
            else:
                size = 1000 + 10 * sum(choices)
                scores = {"loss": loss_of(choices, key["seed"]), "bytes": size, "average_bits": 4 + sum(choices) / 2}
                yield place, Outcome(scores={**scores, "kl": 0.1, "seconds": {"all": 1.0}})


PLANS = ([0, 0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0] * 8)


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a search that is prepared."""
    path = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        search_of(tiny_llama, path / "new").prepare()
    return path / "new"


@pytest.fixture
def prepared(folder: Path, tiny_llama: Path) -> Iterator[Search]:
    search = search_of(tiny_llama, folder, trials=4, finalists=2, finalist_seeds=2, finalist_steps=5)
    search.prepare()
    yield search
    for name in ("ledger.jsonl", "variants.jsonl"):
        (folder / name).unlink(missing_ok=True)


def with_trials(search: Search, executor: Scored) -> Search:
    """The search when its trials, which are `PLANS`, are over."""
    search.ledger = Ledger.open(search.folder.ledger, search.identity("trials"))
    search.ledger.begin(OptimizerRecord("random", 0, 4, 1))
    keys = [search.key(plan, 0, search.config.steps) for plan in PLANS]
    for (place, outcome), key in zip(executor.run(keys), keys, strict=True):
        search.ledger.start(place, key, place, [])
        if outcome.scores:
            search.ledger.finish(place, outcome.scores)
        else:
            search.ledger.fail(place, str(outcome.why))
    return search


def test_the_space_is_that_of_the_prior(prepared: Search) -> None:
    decisions = prepared.prior.decisions
    assert prepared.space.limit == prepared.prior.for_items
    assert [[choice.size for choice in choices] for choices in prepared.space.choices] == [
        list(decision.sizes) for decision in decisions
    ]
    assert prepared.space.levels == [[4, 8]] * len(decisions) and not prepared.space.spends
    assert len(decisions) == 8


def test_a_repetition_is_another_seed(prepared: Search) -> None:
    assert prepared.key((0, 1), 0, 2) == {"choices": [0, 1], "steps": 2, "seed": 3}
    assert prepared.key((0, 1), 2, 7) == {"choices": [0, 1], "steps": 7, "seed": 5}


@pytest.mark.parametrize(("front", "told"), [(False, 2.5), (True, [2.5, 7.0])])
def test_what_an_optimizer_is_told(folder: Path, tiny_llama: Path, front: bool, told: Any) -> None:
    search = search_of(tiny_llama, folder, front=front)
    search.prepare()
    judge = search.judge()
    failed = TrialRecord(0, {}, 0, why="out of memory")
    assert judge(failed) == ([1e6, float(search.prior.for_items)] if front else 1e6)
    assert judge(TrialRecord(1, {}, 1, scores={"loss": 2.5, "bytes": 7})) == told
    assert search.space.spends == front


def test_a_front_of_widths_is_told_multiply_adds_too(folder: Path, tiny_llama: Path) -> None:
    search = search_of(tiny_llama, folder, front=True)
    search.prepare()
    part = Part(0, "kv_groups", (1, 2), (10, 20), (0, 0), (1.0, 0.0), 1)
    structure = Structure((part,), [[] for _ in range(search.space.num_items)], 0.5)
    search.space = replace(search.space, structure=structure)
    judge = search.judge()
    assert judge(TrialRecord(0, {}, 0, why="out of memory")) == [1e6, float(search.prior.for_items), 20.0]
    assert judge(TrialRecord(1, {}, 1, scores={"loss": 2.5, "bytes": 7, "multiply_adds": 15})) == [2.5, 7.0, 15.0]


def test_the_identity_is_plain_data_and_the_same_in_each_session(prepared: Search, tiny_llama: Path) -> None:
    identity = prepared.identity("trials")
    assert json.loads(json.dumps(identity)) == json.loads(json.dumps(prepared.identity("trials")))
    again = search_of(tiny_llama, prepared.folder.path, finalist_steps=5)
    again.prepare()
    assert json.dumps(again.identity("trials")) == json.dumps(identity)
    assert identity["compression"].keys() == {"StructuredPruning", "MixedPrecisionQuantization"}
    assert identity["trainer"]["gradient_clip_val"] == 0.5
    starts = [prepared.prepared.base, prepared.prepared.base.keeping([((0,), range(4))] * 2)]
    of_starts = []
    for start in starts:  # two plans in a file of one name
        again.start = start
        of_starts.append({**again.identity("trials")})
    assert of_starts[0] != of_starts[1] and all(one.pop("start") for one in of_starts)
    assert json.dumps(of_starts[0]) == json.dumps(identity)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"trials": 9, "optimizer": "random", "finalists": 1, "finalist_seeds": 1, "finalist_steps": 8}, False),
        ({"steps": 3}, True),
        ({"front": True}, True),
        ({"max_seconds": 5.0}, True),
    ],
)
def test_which_options_make_another_search(
    prepared: Search, tiny_llama: Path, options: dict[str, Any], differs: bool
) -> None:
    other = search_of(tiny_llama, prepared.folder.path, **options)
    other.prepare()
    assert (other.identity("trials") != prepared.identity("trials")) == differs


@pytest.mark.parametrize("options", [{"limit_train_batches": 3}, {"detect_anomaly": True}, {"deterministic": True}])
def test_which_options_of_the_trainer_make_another_search(
    prepared: Search, tiny_llama: Path, options: dict[str, Any]
) -> None:
    import torch

    whole = trainer(pruning(), quantization(), default_root_dir=prepared.folder.path, **options)
    torch.use_deterministic_algorithms(False)
    other = Search(whole, finetuner(tiny_llama), stories_of(tiny_llama), prepared.config)
    other.prepare()
    assert other.identity("trials") != prepared.identity("trials")


def test_finalists_and_plans_that_nobody_searched_for_are_tried_with_all_seeds(prepared: Search) -> None:
    executor = Scored()
    with_trials(prepared, Scored())
    variants = prepared.compare(executor)
    names = [variant.name for variant in variants]
    assert names == ["trial 3", "trial 2", "uniform", "mutual information", "sensitivity"]
    assert {(key["steps"], key["seed"]) for key in executor.keys} == {(5, 3), (5, 4)}
    assert variants[0].choices == tuple(PLANS[2])
    assert variants[0].losses == (loss_of(PLANS[2]), loss_of(PLANS[2], 4))
    # Another session has nothing left to run.
    again = Scored()
    assert prepared.compare(again) == variants and not again.keys


def test_a_finalist_that_fails_with_all_seeds_is_left_out(prepared: Search) -> None:
    with_trials(prepared, Scored())
    names = [variant.name for variant in prepared.compare(Scored(fails=[PLANS[2]]))]
    assert names == ["trial 2", "uniform", "mutual information", "sensitivity"]


def test_a_search_whose_trials_all_failed_says_why(prepared: Search) -> None:
    with_trials(prepared, Scored(fails=PLANS))
    with pytest.raises(UserError, match=r"Every trial failed. Of the first one: out of memory\. See the log"):
        prepared.compare(Scored())


def test_what_a_search_leaves_behind(prepared: Search) -> None:
    with_trials(prepared, Scored(fails=[PLANS[1]]))
    results = prepared.finish(prepared.compare(Scored()))
    assert SearchResults.read(prepared.folder.results) == results
    assert [trial.name for trial in results.trials] == ["trial 1", "trial 3", "trial 4"]
    assert results.failed == {2: "out of memory"} and results.bits == (4, 8) and results.prior == "sensitivity"
    assert [variant.loss for variant in results.variants] == sorted(variant.loss for variant in results.variants)
    # Of the trials, each has more bytes and a lower loss than the one before.
    assert results.front == ("trial 4", "trial 1", "trial 3")
    entries = read_json(prepared.folder.pareto)
    assert [entry["plan"] for entry in entries] == [f"plans/trial-{number}.json" for number in (4, 1, 3)]
    for entry, choices in zip(entries, (PLANS[3], PLANS[0], PLANS[2]), strict=True):
        plan = CompressionPlan.read(prepared.folder.path / entry["plan"])
        assert bits_of(plan) == [(4, 8)[choice] for choice in choices]
        assert plan.widths == prepared.prepared.base.widths
    assert bits_of(CompressionPlan.read(prepared.folder.plan)) == [(4, 8)[choice] for choice in results.winner.choices]
    assert "trial 3" in prepared.folder.report.read_text()


def bits_of(plan: CompressionPlan) -> list[int]:
    return [precision.bits for layer in plan.layers for precision in layer.precision.values()]


def test_a_trial_is_reported_with_the_best_so_far_and_the_time_left(
    prepared: Search, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_trials(prepared, Scored(fails=[PLANS[1]]))
    progress = Progress(prepared.ledger, prepared.aim, 10, None, prepared.folder.tensorboard, searches_widths=False)
    progress.already, progress.since = 1, 100.0
    monkeypatch.setattr("qpruner.search.progress.time.perf_counter", lambda: 130.0)  # three trials in 30 seconds
    records = prepared.ledger.records
    with caplog.at_level(logging.INFO):
        progress.report(records[3])
        progress.report(records[1])
    best = f"best so far trial 3, loss {loss_of(PLANS[2]):.4f}; 6 left, about 1.0 min."
    assert f"Trial 4 of 10: loss {loss_of(PLANS[3]):.4f}, 1,000 bytes; {best}" in caplog.text
    assert f"Trial 2 of 10: failed: out of memory; {best}" in caplog.text


def test_the_budget_has_one_callback_and_others_prune() -> None:
    prunes, budget = pruning(), quantization()
    assert compressing([prunes, budget]) == ([prunes], budget)
    for callbacks, said in (
        ([prunes], "0 callbacks quantize: add MixedPrecisionQuantization"),
        ([budget, quantization()], "2 callbacks quantize"),
        ([budget, LoRAGuidedPruning(ratio=0.2)], "LoRAGuidedPruning changes the base in the course of a fit"),
    ):
        with pytest.raises(UserError, match=said):
            compressing(callbacks)
    assert isinstance(prunes, CompressionInSetup)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callbacks": [EarlyStopping("val/loss"), quantization()]}, "callbacks has EarlyStopping"),
        ({"fast_dev_run": True}, "a search has no rehearsal"),
        ({"callbacks": []}, "add MixedPrecisionQuantization"),
    ],
)
def test_what_a_search_cannot_do_is_told_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    whole = trainer(**{"callbacks": [quantization()], **options})
    assert isinstance(whole, SearchTrainer)
    with pytest.raises(UserError, match=said):
        whole.search(finetuner(tiny_llama), stories_of(tiny_llama))


def test_the_module_is_left_without_a_model(prepared: Search) -> None:
    assert isinstance(prepared.module, LoRAFinetuner)
    assert prepared.module.model is None and prepared.data.trainer is None


def test_a_search_by_accuracy_ranks_by_it_and_says_so(tmp_path: Path, tiny_llama: Path) -> None:
    search = search_of(tiny_llama, tmp_path, score={"endings": 1.0}, trials=3, finalists=1, finalist_seeds=1)
    results = search.run()
    assert search.aim.step == pytest.approx(0.25)  # four endings
    for plan in (*results.trials, *results.variants):
        assert plan.accuracies == (plan.scores["endings/accuracy"],)
        assert plan.minimized == search.aim.value(plan.loss, plan.accuracy)
    assert results.winner.minimized == min(plan.minimized for plan in results.variants)
    assert "validation accuracy" in (tmp_path / "report.md").read_text()
    with pytest.raises(UserError, match="names the task 'ending'"):
        search_of(tiny_llama, tmp_path / "other", score={"ending": 1.0}).run()
    with pytest.raises(UserError, match="search.score"):  # another search than that of the ledger
        search_of(tiny_llama, tmp_path, trials=4).run()
