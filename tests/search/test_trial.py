"""One trial: the same numbers whatever came before, those of a fit by hand, and the bytes of the folder of a run."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import Allocation, DecidingConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton, load_base, read_base_config
from qpruner.pretrained import load_model
from qpruner.pricing import price
from qpruner.pruning.calibration import CalibrationConfig
from qpruner.runs.search import SearchResults
from qpruner.search import reference as references
from qpruner.search.config import SearchConfig
from qpruner.search.ledger import Scores
from qpruner.search.preparation import part_of
from qpruner.search.reference import Reference
from qpruner.search.trainer import Search, SearchTrainer
from qpruner.search.trial import TrialRunner, TrialWork
from qpruner.training.evaluation import evaluate
from qpruner.training.metrics import IGNORED
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

PLAIN = [0, 1, 1, 0, 1, 0, 0, 1]
OTHER = [1, 1, 0, 0, 0, 0, 1, 1]


def finetuner(base: Path, seed: int = 3) -> LoRAFinetuner:
    return LoRAFinetuner(base=str(base), seed=seed, lora=LoRAConfig(r=2), optimizer=OptimizerConfig(lr=0.01))


def stories_of(base: Path) -> StoriesDataModule:
    return StoriesDataModule(
        tokenizer=str(base),
        max_length=24,
        num_train=24,
        num_validation=6,
        num_test=6,
        num_choices=4,
        loader=LoaderConfig(batch_size=4, eval_batch_size=4),
    )


def trainer(*callbacks: Callback, steps: int = 2, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **options,
    )


def prepared(base: Path, folder: Path, **tables: int) -> TrialWork:
    """What `Search` hands to its workers, on a pruned base with a bank of four and eight bits."""
    text = CalibrationConfig(num_sequences=6, length=8, batch_size=2)
    quantization = MixedPrecisionQuantization(
        allocation="sensitivity",
        budget=Budget(average_bits=6.2),
        deciding=DecidingConfig(granularity="unit", calibration=text),
        **tables,
    )
    callbacks = StructuredPruning(ratio=0.05, calibration=text), quantization
    search = Search(
        trainer(*callbacks, default_root_dir=folder), finetuner(base), stories_of(base), SearchConfig(steps=2)
    )
    search.data.prepared  # noqa: B018  # into the cache, as a search does first
    method = search.prepare()
    search.prior = Allocation.read(part_of(search.folder, method).allocation)
    return search.work(method)


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> TrialWork:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return prepared(tiny_llama, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def runner(work: TrialWork) -> TrialRunner:
    return sent(work).prepare()


def sent(work: TrialWork) -> TrialWork:
    """As a process of its own gets it; a runner uses the data module of its work."""
    return pickle.loads(pickle.dumps(work))


def key(choices: list[int], steps: int = 2, seed: int = 5) -> dict[str, Any]:
    return {"choices": choices, "steps": steps, "seed": seed}


def without_time(scores: Scores) -> Scores:
    return {name: value for name, value in scores.items() if name != "seconds"}


def by_hand(work: TrialWork, base: Path, choices: list[int], seed: int) -> tuple[float, float]:
    """Loss before and after a fit of the narrowed base, quantized afresh."""
    module, data = finetuner(base, seed), stories_of(base)
    data.seed = seed
    module.load_kept_base(work.base)
    assert module.plan is not None
    precision = [dict(layer.precision) for layer in module.plan.layers]
    for item, choice in zip(work.items, choices, strict=True):
        for unit in item.units:
            precision[item.layer][unit] = work.precisions[choice]
    plan = module.plan.with_precision(precision, **work.tables)
    module.quantize(plan, work.loftq_iterations, device=torch.device("cpu"))
    module.taken_from = None
    losses = []
    for steps in (0, 2):
        done = trainer(steps=steps, limit_val_batches=0)
        done.fit(module, datamodule=data)
        options: Any = {"limit": 1.0, "device": torch.device("cpu"), "precision": done.precision_plugin, "title": ""}
        results = evaluate(module, data.evaluation_loaders("validation"), progress=False, **options)
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


def test_a_trial_that_breaks_leaves_nothing_to_the_next(runner: TrialRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = without_time(runner(key(OTHER)))
    with monkeypatch.context() as patch:
        patch.setattr(LoRAFinetuner, "training_step", lambda *_: torch.zeros(2**60))
        with pytest.raises(RuntimeError):
            runner(key(PLAIN))
    assert not any("lora" in name for name, _ in runner.model.named_parameters())
    assert without_time(runner(key(OTHER))) == expected


def test_scores_are_those_of_a_fit_by_hand(work: TrialWork, runner: TrialRunner, tiny_llama: Path) -> None:
    before, after = by_hand(work, tiny_llama, PLAIN, seed=3)
    assert runner(key(PLAIN, seed=3))["loss"] == after
    assert runner(key(PLAIN, steps=0, seed=3))["loss"] == before != after


def test_bytes_and_bits_are_those_of_the_plan(work: TrialWork, runner: TrialRunner, tiny_llama: Path) -> None:
    plan = runner.plan_of(PLAIN)
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
    plan = here.plan_of(PLAIN)
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


# The reference.


def predictions(model: Any, data: StoriesDataModule) -> torch.Tensor:
    """[tokens, V] log-probabilities of all tokens but the first of each row."""
    found = []
    for batch in data.evaluation_loaders("validation")[0]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scored = batch["labels"][:, 1:] != IGNORED
        found.append(logits[:, :-1][scored].log_softmax(-1))
    return torch.cat(found)


@torch.no_grad()
def test_kl_is_to_the_dense_model(work: TrialWork, runner: TrialRunner, tiny_llama: Path) -> None:
    data = stories_of(tiny_llama)
    dense = predictions(load_model(str(tiny_llama), dtype="float32", trust_remote_code=False).eval(), data)
    reference = Reference.read(work.reference)
    assert torch.equal(reference.log_probabilities, dense.half())
    narrow = finetuner(tiny_llama)
    narrow.model = load_base(work.base).model
    found = predictions(narrow.model.eval(), data)
    plain = trainer().precision_plugin
    cpu = torch.device("cpu")
    expected = float((dense.exp() * (dense - found)).sum(-1).mean())
    assert reference.kl(narrow, cpu, plain) == pytest.approx(expected, rel=0.05) and expected > 1e-5
    module = finetuner(tiny_llama)
    module.load_dense_base()
    assert abs(reference.kl(module, cpu, plain)) < 1e-4
    assert runner(key([0] * 8, steps=0))["kl"] > runner(key([1] * 8, steps=0))["kl"] > 0


def test_the_reference_comes_back_and_keeps_no_more_than_it_may(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = finetuner(tiny_llama), stories_of(tiny_llama)
    module.load_dense_base()
    cpu, plain = torch.device("cpu"), trainer().precision_plugin
    whole = Reference.of(module, data, cpu, plain)
    assert len(whole.batches) == 2 and whole.log_probabilities.shape[1] == 2048
    monkeypatch.setattr(references, "TOKENS", 50)  # in the first batch of 4 rows of 23 scored tokens
    few = Reference.of(module, data, cpu, plain)
    assert len(few.batches) == 1 and torch.equal(few.log_probabilities, whole.log_probabilities[:50])
    assert abs(few.kl(module, cpu, plain)) < 1e-4
    for one in (whole, few):
        one.write(tmp_path / "reference.safetensors")
        read = Reference.read(tmp_path / "reference.safetensors")
        assert torch.equal(read.log_probabilities, one.log_probabilities)
        for batch, expected in zip(read.batches, one.batches, strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in batch.items())  # type: ignore[literal-required]


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
