"""One trial: the same numbers whatever came before, those of a fit by hand, and the bytes of the folder of a run."""

import gc
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from support.searches import finetuner, predictions, pruning, quantization, search_of, stories_of, trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import DecidingConfig
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.callbacks import MixedPrecisionQuantization
from qpruner.compressed import CompressedModel, State
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton, read_base_config
from qpruner.pretrained import load_model
from qpruner.pricing import price
from qpruner.processes import Processes
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.calibrated_bank import BankText, rounded_layers
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.packed import PackedLinear
from qpruner.records.search import SearchResults
from qpruner.search.config import SearchConfig
from qpruner.search.ledger import Scores
from qpruner.search.reference import Reference
from qpruner.search.trainer import SearchTrainer
from qpruner.search.trial import TrialRunner, TrialWork
from qpruner.training import teaching
from qpruner.training.distillation import DistillationConfig
from qpruner.training.evaluation import evaluate
from qpruner.training.module import LoRAFinetuner

PLAIN = [0, 1, 1, 0, 1, 0, 0, 1]
OTHER = [1, 1, 0, 0, 0, 0, 1, 1]


def prepared(base: Path, folder: Path, **tables: int) -> TrialWork:
    """What `Search` hands to its workers, on a pruned base with a bank of four and eight bits."""
    search = search_of(base, folder, pruning(), quantization(**tables))
    search.prepare()
    return search.work()


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> TrialWork:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return prepared(tiny_llama, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def runner(work: TrialWork) -> TrialRunner:
    return sent(work).prepare()


def sent(work: TrialWork) -> TrialWork:
    """As another process gets it."""
    return pickle.loads(pickle.dumps(work))


def key(choices: list[int], steps: int = 2, seed: int = 5) -> dict[str, Any]:
    return {"choices": choices, "steps": steps, "seed": seed}


def without_time(scores: Scores) -> Scores:
    return {name: value for name, value in scores.items() if name != "seconds"}


def by_hand(work: TrialWork, base: Path, choices: list[int], seed: int) -> tuple[float, float]:
    """Loss before and after a fit of the narrowed base, quantized afresh."""
    data = stories_of(base)
    data.seed = seed
    model = CompressedModel.open(work.base)
    plan = model.known_plan()
    precision = [dict(layer.precision) for layer in plan.layers]
    for item, choice in zip(work.items, choices, strict=True):
        for unit in item.units:
            precision[item.layer][unit] = work.precisions[choice]
    module = finetuner(base, seed).hold(model)
    loftq = LoftQSettings.of(module.lora, work.loftq_iterations, seed)
    model.quantize(plan.with_precision(precision, **work.tables), loftq, device=torch.device("cpu"))
    losses = []
    for steps in (0, 2):
        done = trainer(max_steps=steps, limit_val_batches=0)
        done.fit(module, datamodule=data)
        options: Any = {"limit": 1.0, "device": torch.device("cpu"), "precision": done.precision_plugin, "title": ""}
        results = evaluate(module.model, data.evaluation_loaders("validation"), progress=False, **options)
        losses.append(results["loss"])
    return losses[0], losses[1]


def test_a_key_gives_the_same_bits_whatever_came_before(work: TrialWork, runner: TrialRunner) -> None:
    first = runner(key(PLAIN))
    others = [runner(key(OTHER)), runner(key(PLAIN, steps=1)), runner(key(PLAIN, seed=6))]
    assert without_time(runner(key(PLAIN))) == without_time(first)
    assert without_time(sent(work).prepare()(key(PLAIN))) == without_time(first)
    assert len({one["loss"] for one in (first, *others)}) == 4
    assert others[0]["bytes"] == first["bytes"] == others[2]["bytes"]  # as many bits, elsewhere
    assert first["steps"] == 2 and others[1]["steps"] == 1


@pytest.mark.parametrize("teacher", ["online", "recorded"])
def test_a_trial_learns_from_the_dense_model(
    teacher: str, work: TrialWork, runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillationConfig(logits=5.0, hidden=1.0, teacher=teacher)  # type: ignore[arg-type]
    taught = sent(replace(work, options={**work.options, "distillation": asdict(config)})).prepare()
    loaded, load = [], teaching.load_teacher
    monkeypatch.setattr(teaching, "load_teacher", lambda *args, **options: loaded.append(1) or load(*args, **options))
    first = taught(key(PLAIN))
    other = taught(key(PLAIN, steps=1))
    assert without_time(taught(key(PLAIN))) == without_time(first)
    plain = runner(key(PLAIN))
    assert first["loss"] != plain["loss"] and other["loss"] != first["loss"]
    assert first["bytes"] == plain["bytes"]
    # One step reads other rows than two; those of the first trial are there for the third.
    assert len(loaded) == (1 if teacher == "online" else 2)


def test_a_trial_that_breaks_leaves_nothing_to_the_next(runner: TrialRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = without_time(runner(key(OTHER)))
    with monkeypatch.context() as patch:
        patch.setattr(LoRAFinetuner, "training_step", lambda *_: torch.zeros(2**60))
        with pytest.raises(RuntimeError):
            runner(key(PLAIN))
    assert runner.base.state is State.QUANTIZED
    assert not any("lora" in name for name, _ in runner.base.named_parameters())
    assert without_time(runner(key(OTHER))) == expected


def test_a_trial_leaves_no_trainer_and_no_moments(runner: TrialRunner) -> None:
    """They refer to each other, and Python alone would let them go after a hundred trials."""

    def left() -> int:
        return sum(isinstance(thing, Trainer | torch.optim.Optimizer) for thing in gc.get_objects())

    gc.collect()
    before = left()
    gc.disable()
    try:
        runner(key(PLAIN))
        assert left() == before
    finally:
        gc.enable()


def test_scores_are_those_of_a_fit_by_hand(work: TrialWork, runner: TrialRunner, tiny_llama: Path) -> None:
    before, after = by_hand(work, tiny_llama, PLAIN, seed=3)
    assert runner(key(PLAIN, seed=3))["loss"] == after
    assert runner(key(PLAIN, steps=0, seed=3))["loss"] == before != after


def test_bytes_and_bits_are_those_of_the_plan(work: TrialWork, runner: TrialRunner, tiny_llama: Path) -> None:
    plan = runner.plan_of(key(PLAIN))
    skeleton = build_skeleton(read_base_config(str(tiny_llama)))
    expected = price(skeleton, plan, rank=2, targets=LoRAConfig().target_modules)
    scores = runner(key(PLAIN, steps=0))
    assert (scores["bytes"], scores["average_bits"]) == (expected.total, expected.average_bits)
    bits = [plan.layers[item.layer].precision[unit].bits for item in work.items for unit in item.units]
    assert bits == [(4, 8)[choice] for choice, item in zip(PLAIN, work.items, strict=True) for _ in item.units]


def test_seconds_are_parts_of_the_whole(runner: TrialRunner) -> None:
    seconds = runner(key(PLAIN))["seconds"]
    assert seconds.keys() == {"assemble", "train", "evaluate", "all"} and min(seconds.values()) > 0
    assert seconds["assemble"] + seconds["train"] + seconds["evaluate"] <= seconds["all"]
    assert runner(key(PLAIN, steps=0))["seconds"]["train"] == 0


def test_time_that_is_up_ends_a_fit(work: TrialWork) -> None:
    scores = replace(sent(work), max_seconds=1e-6).prepare()(key(PLAIN, steps=200))
    assert scores["steps"] < 200


def test_tables_are_quantized_as_asked(tiny_llama: Path, tmp_path: Path, runner: TrialRunner) -> None:
    work = prepared(tiny_llama, tmp_path, embedding=8, head=8)
    here = work.prepare()
    plan = here.plan_of(key(PLAIN))
    assert plan.embedding.bits == 8
    scores = here(key(PLAIN))
    skeleton = build_skeleton(read_base_config(str(tiny_llama)))
    expected = price(skeleton, plan, rank=2, targets=LoRAConfig().target_modules).total
    assert scores["bytes"] == expected < runner(key(PLAIN))["bytes"]
    assert here(key(PLAIN, seed=3))["loss"] == by_hand(work, tiny_llama, PLAIN, seed=3)[1]
    assert without_time(here(key(PLAIN))) == without_time(scores)


def test_a_ledger_is_of_one_order_of_the_data(tiny_llama: Path, tmp_path: Path) -> None:
    deciding = DecidingConfig(calibration=CalibrationConfig(num_sequences=6, length=8))
    budget = MixedPrecisionQuantization(budget=Budget(average_bits=6.2), deciding=deciding)
    config = SearchConfig(optimizer="random", trials=1, steps=0, finalist_seeds=1)

    def search(seed: int) -> SearchResults:
        data = stories_of(tiny_llama)
        data.seed = seed
        options: Any = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
        return SearchTrainer(**options, callbacks=[budget]).search(finetuner(tiny_llama), data, config)

    assert search(0) == search(0)
    with pytest.raises(UserError, match="data.seed: was 0, is now 1"):
        search(1)


@torch.no_grad()
def test_kl_is_to_the_dense_model(work: TrialWork, runner: TrialRunner, tiny_llama: Path) -> None:
    """Plans whose every unit has 4 bits, or 8."""
    dense = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    assert torch.equal(
        Reference.read(work.reference).log_probabilities, predictions(dense, stories_of(tiny_llama)).half()
    )
    assert Reference.read(work.reference).base == CompressedModel.open(work.base).base_sha256
    assert runner(key([0] * 8, steps=0))["kl"] > runner(key([1] * 8, steps=0))["kl"] > 0


def test_work_is_a_value(work: TrialWork) -> None:
    """Trials leave what they were given as it was, to the byte."""
    before = pickle.dumps(work)
    runner = work.prepare()
    scores = runner(key(PLAIN, seed=6))
    assert pickle.dumps(work) == before
    assert work.data.seed == 0 and work.data.trainer is None and runner.data.trainer is None
    assert without_time(runner(key(PLAIN, seed=6))) == without_time(scores)
    assert b"StoriesDataModule" in before and len(before) < 2_000_000  # without the rows


def test_a_trial_whose_loss_is_not_finite_fails_and_the_next_is_as_ever(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without_time(runner(key(PLAIN)))
    right = LoRAFinetuner.loss
    monkeypatch.setattr(LoRAFinetuner, "loss", lambda self, batch: right(self, batch) * float("nan"))
    with pytest.raises(UserError, match="training loss of optimizer step 1 is not finite"):
        runner(key(PLAIN))
    monkeypatch.undo()
    assert without_time(runner(key(PLAIN))) == expected


def test_trials_have_the_linears_and_the_starts_that_text_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    by_text = CalibratedConfig(text=CalibrationConfig(16, 12))
    two_or_three = MixedPrecisionQuantization(
        allocation="sensitivity",
        budget=Budget(average_bits=3.5),
        deciding=DecidingConfig(widths=(2, 3), granularity="unit", calibration=CalibrationConfig(6, 8)),
        group=32,
        calibrated=by_text,
    )
    search = search_of(tiny_llama, tmp_path, pruning(), two_or_three)
    search.prepare()
    work = search.work()
    runner = sent(work).prepare()
    assert runner(key(PLAIN, steps=0))["loss"] > 0
    model = runner._assembled(runner.plan_of(key(PLAIN)))

    dense, data = CompressedModel.open(work.base), stories_of(tiny_llama)
    alone = Processes.alone()
    text = BankText(by_text, {}, Calibration.share(data.calibration(16, 12), alone, by_text.text.batch_size))
    starts = LoftQSettings.of(finetuner(tiny_llama).lora, 1, seed=3)
    layers = dict(rounded_layers(dense.network, [work.precisions[0], work.precisions[1]], text, starts, {0, 1}))
    packed = {name: each for name, each in model.network.named_modules() if isinstance(each, PackedLinear)}
    assert len(packed) == 14
    for name, linear in packed.items():
        rounded = layers[int(name.split(".")[2])][name, linear.precision]
        assert all(torch.equal(tensor, rounded.state[part]) for part, tensor in linear.packed().items()), name
        assert rounded.factors is not None
        assert all(map(torch.equal, model.initial_adapters[name], rounded.factors)), name
    with pytest.raises(UserError, match="to a bank of another"):
        replace(work, rounding=None).prepare()
