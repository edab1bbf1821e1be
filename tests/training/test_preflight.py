"""Options of a Trainer that cannot be had are told in a line, before the model is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from support.fits import finetuner, fit

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import RunCheckpoint
from qpruner.commands import run
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.records.folder import RunFolder
from qpruner.training import preflight
from qpruner.training.compressible import CompressibleModule
from qpruner.training.distillation import DistillationConfig
from qpruner.training.preflight import check_checkpoint, check_monitored, class_refused

LIGHTNING = "lightning.pytorch."


def of(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}


OPTIONS = {
    "val_check_interval": [
        (500, r"\(500\) must be less than or equal to the number of the training batches \(5\)"),
        (0, "val_check_interval is 0; it is at least 1"),
        (1.5, "invalid value 1.5 for val_check_interval"),
        ("often", "Invalid time format"),
    ],
    "check_val_every_n_epoch": [(0, "check_val_every_n_epoch is 0; it is at least 1")],
    "accumulate_grad_batches": [(0, "accumulate_grad_batches is 0; it is at least 1")],
    "limit_train_batches": [(0.01, "0.01 of the `train_dataloader`")],
    "limit_val_batches": [(0.1, "0.1 of the `val_dataloader`")],
    "limit_test_batches": [(0.1, "limit_test_batches is 0.1, which of 1 batches is none")],
    "overfit_batches": [(0.01, "0.01 of the `train_dataloader`")],
    "enable_checkpointing": [(False, "goes on from its checkpoint.*--run.checkpoint_every_n_steps")],
    "barebones": [(True, "leaves out the logs and metrics")],
    "accelerator": [("tpu", "torch_xla"), ("abacus", "invalid accelerator name")],
    "devices": [(0, "not a valid input"), ("many", "should be an int > 0")],
    "strategy": [
        ("nope", "invalid strategy name"),
        ("fsdp", "one flat tensor of one dtype.* Use fsdp2"),
        (of(LIGHTNING + "strategies.FSDPStrategy"), "one flat tensor of one dtype.* Use fsdp2"),
        (of(LIGHTNING + "strategies.ModelParallelStrategy", tensor_parallel_size=2), "Give 1, or .*fsdp2"),
    ],
    "precision": [("transformer-engine", "transformer_engine.* not met")],
    "plugins": [([of(LIGHTNING + "plugins.io.AsyncCheckpointIO")], "when its checkpoint is on disk")],
    "logger": [("CometLogger", "loggers.CometLogger: Requirement 'comet-ml.* not met")],
    "max_epochs": [(-5, "max_epochs"), (-1, "schedule is 'cosine', which ends with the last step")],
    "callbacks": [
        ([of("EarlyStopping", monitor="val/losss")], "monitor 'val/losss', which nothing logs.*val/loss, val/perp"),
        ([of("EarlyStopping", monitor="val/loss", mode="less")], "^EarlyStopping: `mode` can be min, max, got less$"),
        ([of("ModelCheckpoint", save_top_k=3)], "^ModelCheckpoint: ModelCheckpoint.save_top_k=3, monitor=None. is"),
        ([of("RichProgressBar")], "enable_progress_bar=False"),
        ([of("StochasticWeightAveraging", swa_lrs=0.1)], "copies the model before it has been compressed"),
        ([of("LearningRateFinder")], "set --model.optimizer.lr"),
        ([of("EMAWeightAveraging")], "averages all tensors of the model"),
        ([of("WeightAveraging")], "averages all tensors of the model"),
        ([of("ModelPruning", pruning_fn="l1_unstructured", amount=0.5)], "not what was measured; use StructuredPr"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "said"), [(name, *case) for name, cases in OPTIONS.items() for case in cases]
)
def test_what_cannot_be_had_is_told_before_the_model_is_loaded(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(CompressibleModule, "load_base", lambda self: pytest.fail("the model was loaded"))
    config["trainer"][name] = value
    (path := tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=said) as caught:
        run(["fit", "--config", str(path)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "x" / "summary.json").exists()


@pytest.mark.parametrize("options", [{"logger": False, "callbacks": [of("LearningRateMonitor")]},
                                     {"limit_val_batches": 0, "callbacks": [of("EarlyStopping", monitor="val/loss")]},
                                     {"val_check_interval": 0.5, "check_val_every_n_epoch": None}])  # fmt: skip
def test_options_that_do_not_go_together_are_told(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(CompressibleModule, "load_base", lambda self: pytest.fail("the model was loaded"))
    config["trainer"] |= options
    (path := tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"--trainer.logger is off|'val/loss', which nothing logs|should be an integer"):
        run(["fit", "--config", str(path)])


def test_a_search_is_looked_at_as_a_fit_is(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressibleModule, "load_base", lambda self: pytest.fail("the model was loaded"))
    quantizing = ["--trainer.callbacks+=MixedPrecisionQuantization", "--trainer.callbacks.budget.average_bits", "6"]
    with pytest.raises(UserError, match="has EMAWeightAveraging, which averages all tensors"):
        run(["search", *arguments, *quantizing, "--trainer.callbacks+=EMAWeightAveraging"])
    with pytest.raises(UserError, match="accumulate_grad_batches is 0; it is at least 1"):
        run(["search", *arguments, *quantizing, "--trainer.accumulate_grad_batches", "0"])


def test_a_refused_restart_throws_nothing_away(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    with pytest.raises(UserError, match="invalid accelerator name"):
        run(["fit", *arguments, "--restart", "--trainer.accelerator", "abacus"])
    folder = RunFolder(tmp_path / "runs" / "x")
    assert folder.finished and folder.checkpoint.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 500, "check_val_every_n_epoch": None},
        {"val_check_interval": 500, "limit_val_batches": 0},
        {"val_check_interval": "00:00:00:05"},
        {"val_check_interval": {"seconds": 5}},
        {"callbacks": [of("Timer", duration="00:00:01:00")]},
        {"log_every_n_steps": 0},
        {"max_epochs": 0},
        {"logger": False},
        {"callbacks": [of("EarlyStopping", monitor="val/accuracy"), of("LearningRateMonitor")]},
        {"callbacks": [of("EarlyStopping", monitor="val/none", strict=False)]},
    ],
)
def test_what_can_be_had_works(config: dict[str, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    config["trainer"] |= {"max_epochs": 1, **options}
    (path := tmp_path / "right.yaml").write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path)])
    assert RunFolder(tmp_path / "runs" / "x").finished


def test_a_fit_that_only_time_ends_takes_a_constant_rate(arguments: list[str], tmp_path: Path) -> None:
    endless = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01"]
    run(["fit", *arguments, *endless, "--model.optimizer.schedule", "constant"])
    assert RunFolder(tmp_path / "runs" / "x").finished


def test_a_callback_from_elsewhere_may_log_what_another_waits_for(stories: StoriesDataModule) -> None:
    class Mine(Callback):
        pass

    def trainer(*callbacks: Callback) -> Trainer:
        return Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=False)

    Mine.__module__ = "mine"
    waiting = EarlyStopping("mine/metric")
    with pytest.raises(UserError, match="'mine/metric', which nothing logs"):
        check_monitored(trainer(waiting), stories)
    check_monitored(trainer(waiting, Mine()), stories)


def test_what_is_learnt_from_a_teacher_is_logged_too(stories: StoriesDataModule) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[EarlyStopping("train/kl")])
    check_monitored(trainer, stories, DistillationConfig())
    for distillation in (None, DistillationConfig(logits=0, hidden=1)):
        with pytest.raises(UserError, match="'train/kl', which nothing logs"):
            check_monitored(trainer, stories, distillation)
    assert DistillationConfig(hidden=1).logged == ["kl", "hidden"]


def test_a_checkpoint_is_looked_at_before_the_model_is_loaded(
    arguments: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["fit", *arguments])
    right = tmp_path / "runs" / "x" / "checkpoints" / "last.ckpt"
    foreign, other = tmp_path / "foreign.ckpt", tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, foreign)
    content = torch.load(right, weights_only=True)
    torch.save({**content, "base": {**content["base"], "dense_sha256": "beef"}}, other)
    cases = [
        (tmp_path / "nothing", "there is no such file"),
        ("best", "there is no such file"),
        (tiny_llama, "there is no such file"),
        (tiny_llama / "config.json", "which is no checkpoint"),
        (foreign, "no checkpoint of a fit of qpruner"),
        (other, "another base model"),
    ]
    for name in ("load_base", "load_dense_base"):
        monkeypatch.setattr(CompressibleModule, name, lambda self: pytest.fail("the model was loaded"))
    for path, said in cases:
        for command in ("fit", "test", "predict"):
            with pytest.raises(UserError, match=said):
                run([command, *arguments, "--run.name", "y", "--ckpt_path", str(path)])
    with pytest.raises(UserError, match="r 2 there, 4 here"):
        run(["fit", *arguments, "--run.name", "y", "--ckpt_path", str(right), "--model.lora.r", "4"])
    monkeypatch.undo()
    run(["fit", *arguments, "--run.name", "y", "--ckpt_path", str(right)])
    assert [stage["name"] for stage in read_json(tmp_path / "runs/y/summary.json")["stages"]] == ["dense", "recovered"]


def test_one_process_hashes_the_base_of_a_checkpoint_for_all(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    fit(finetuner(tiny_llama), stories, checkpoint)
    hashed: list[str] = []

    def fingerprint(base: str) -> str:
        hashed.append(base)
        return "beef"

    monkeypatch.setattr(preflight, "model_fingerprint", fingerprint)
    check_checkpoint(finetuner(tiny_llama), str(checkpoint.path), is_first=False)
    assert hashed == []
    with pytest.raises(UserError, match="another base model"):
        check_checkpoint(finetuner(tiny_llama), str(checkpoint.path), is_first=True)
    assert hashed == [str(tiny_llama)]
    # What it costs nothing to see, each process sees for itself.
    with pytest.raises(UserError, match="r 2 there, 4 here"):
        check_checkpoint(finetuner(tiny_llama, lora=LoRAConfig(r=4)), str(checkpoint.path), is_first=False)


def test_an_error_of_ours_is_not_taken_for_one_of_an_option() -> None:
    error = ValueError("a bug")
    error.__cause__ = KeyError("deeper")
    assert class_refused(error) is None
