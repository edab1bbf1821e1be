"""The Trainers of a run: whose options they have, and where they work."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from qpruner.errors import UserError
from qpruner.records.folder import RunFolder
from qpruner.runs.trainers import make_trainer, options_of_trainer

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def test_each_trainer_has_options_of_its_own() -> None:
    given: dict[str, Any] = {"max_steps": 3, "logger": [[1]]}
    first, second = options_of_trainer(given), options_of_trainer(given)
    assert first == second == {**given, "use_distributed_sampler": False}
    first["logger"][0].append(2)
    assert second["logger"] == given["logger"] == [[1]]
    assert options_of_trainer({"use_distributed_sampler": True})["use_distributed_sampler"] is True


def test_options_are_made_anew_where_a_function_makes_them() -> None:
    made = [options_of_trainer(lambda: {"plugins": [object()]})["plugins"][0] for _ in range(2)]
    assert made[0] is not made[1]


def test_callbacks_belong_to_the_run() -> None:
    with pytest.raises(UserError, match="Give them as its callbacks"):
        options_of_trainer({"callbacks": [Timer()]})
    assert "callbacks" not in options_of_trainer({"callbacks": []})


@pytest.mark.parametrize("logger", [None, True])
def test_it_logs_to_the_folder_of_its_phase(tmp_path: Path, logger: bool | None) -> None:
    timer = Timer()
    trainer = make_trainer({**QUIET, "logger": logger}, RunFolder(tmp_path, 1), [timer])
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert Path(trainer.logger.log_dir) == RunFolder(tmp_path, 1).tensorboard != RunFolder(tmp_path).tensorboard
    assert trainer.default_root_dir == str(tmp_path) and timer in trainer.callbacks


def test_a_logger_that_is_given_stays(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    assert make_trainer({**QUIET, "logger": logger}, RunFolder(tmp_path), []).logger is logger
    assert make_trainer({**QUIET, "logger": False}, RunFolder(tmp_path), []).logger is None


def test_devices_without_double_precision_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mps, which has no float64"):
        make_trainer({**QUIET, "strategy": SingleDeviceStrategy("mps")}, RunFolder(tmp_path), [])


def test_options_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="abacus"):
        make_trainer({**QUIET, "accelerator": "abacus"}, RunFolder(tmp_path), [])
    no_checkpoints = {**QUIET, "enable_checkpointing": False}
    make_trainer(no_checkpoints, RunFolder(tmp_path), [])
    with pytest.raises(UserError, match="goes on from its checkpoint"):
        make_trainer(no_checkpoints, RunFolder(tmp_path), [], keeps_checkpoint=True)
