"""The Trainer of a trial: every option of the search's Trainer is carried, refused or without effect."""

import json
from inspect import signature
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.plugins import MixedPrecision
from support.searches import pruning, quantization, trainer

from qpruner.errors import UserError
from qpruner.search.trial_trainer import CARRIED, REFUSED, WITHOUT_EFFECT, TrialTrainer, check_options

GIVEN: dict[str, Any] = {
    "accelerator": "cpu",
    "precision": "bf16-mixed",
    "accumulate_grad_batches": 3,
    "gradient_clip_val": 0.25,
    "gradient_clip_algorithm": "value",
    "limit_train_batches": 5,
    "limit_val_batches": 0.5,
    "deterministic": "warn",
    "benchmark": True,
    "detect_anomaly": True,
    "reload_dataloaders_every_n_epochs": 2,
}


def of(**options: Any) -> TrialTrainer:
    whole = trainer(**options)
    check_options(whole, whole.given)
    return TrialTrainer.of(whole, whole.given)


def test_every_option_of_a_trainer_has_one_fate() -> None:
    """A new option of Lightning has to be put in one of the three tables."""
    fates = [*CARRIED, *REFUSED, *WITHOUT_EFFECT]
    assert len(set(fates)) == len(fates)
    assert set(fates) == signature(Trainer.__init__).parameters.keys() - {"self"}


@pytest.fixture
def _flags_kept() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("_flags_kept")
def test_what_is_carried_reaches_the_trainer_of_a_trial() -> None:
    assert GIVEN.keys() == set(CARRIED)
    options = of(**GIVEN).options
    assert options == GIVEN
    torch.use_deterministic_algorithms(False)  # as in another process
    torch.backends.cudnn.benchmark = False
    trial = TrialTrainer(options).trainer(steps=4, max_seconds=60)
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark
    assert trial.strategy.root_device.type == "cpu"
    assert (trial.precision, trial.accumulate_grad_batches, trial.limit_train_batches) == ("bf16-mixed", 3, 5)
    assert (trial.gradient_clip_val, trial.gradient_clip_algorithm) == (0.25, "value")
    assert trial._detect_anomaly  # type: ignore[attr-defined]
    assert trial.reload_dataloaders_every_n_epochs == 2
    assert (trial.max_steps, trial.limit_val_batches) == (4, 0)
    assert TrialTrainer(options).limit_validation == 0.5


def test_defaults_are_plain_data() -> None:
    options = of(accumulate_grad_batches=1, gradient_clip_val=None).options
    assert json.loads(json.dumps(options)) == options
    assert options["accelerator"] == "cpu" and options["precision"] == "32-true"
    assert options["limit_train_batches"] == options["limit_val_batches"] == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices": 2}, "the Trainer has 2. Give --trainer.devices 1, .* --search.executor.workers 2"),
        ({"fast_dev_run": True}, "fast_dev_run is True, and a search has no rehearsal: drop it"),
        ({"overfit_batches": 2}, "overfit_batches is 2, .*--trainer.limit_train_batches"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}, "plugins is .*MixedPrecision.*--trainer.precision"),
        ({"profiler": "simple"}, "profiler is 'simple', .*profile a fit"),
        ({"barebones": True, "logger": None}, "barebones is True"),
        ({"callbacks": EarlyStopping("val/loss")}, "callbacks has EarlyStopping, .*give it to the fit"),
        (
            {"callbacks": [LearningRateMonitor(), GradientAccumulationScheduler({0: 2})]},
            "GradientAccumulationScheduler",
        ),
        ({"callbacks": [Callback()]}, "callbacks has Callback"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_trial_cannot_go_by_is_refused(options: dict[str, Any], said: str) -> None:
    if options.get("barebones"):
        options = {"enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None, **options}
    with pytest.raises(UserError, match=said):
        of(**options)


def test_a_strategy_that_splits_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer()
    monkeypatch.setattr("qpruner.search.trial_trainer.SingleDeviceStrategy", type(None))  # as that of FSDP is no such
    whole.given["strategy"] = "fsdp"
    with pytest.raises(UserError, match="strategy is 'fsdp', and a trial uses one device and holds the model as a"):
        check_options(whole, whole.given)


def test_another_device_than_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer()
    monkeypatch.setattr(whole.strategy, "_root_device", torch.device("cuda", 3))
    with pytest.raises(UserError, match=r"computes on cuda:3, .* CUDA_VISIBLE_DEVICES=3"):
        check_options(whole, whole.given)


def test_what_is_without_effect_is_let_through() -> None:
    """Also callbacks that compress, or only watch; one device by whatever name."""
    plain = of()
    options: dict[str, Any] = {
        "devices": 1,
        "num_nodes": 1,
        "max_epochs": 2,
        "max_steps": 7,
        "min_steps": 1,
        "max_time": {"hours": 1},
        "limit_test_batches": 3,
        "limit_predict_batches": 3,
        "val_check_interval": 0.5,
        "check_val_every_n_epoch": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "inference_mode": False,
        "sync_batchnorm": True,
        "enable_checkpointing": True,
        "enable_progress_bar": True,
        "callbacks": [pruning(), quantization(), ModelCheckpoint(), RichProgressBar(), LearningRateMonitor()],
    }
    assert options.keys() - WITHOUT_EFFECT.keys() == {"devices", "num_nodes", "callbacks"}
    assert of(**options).options == plain.options
