"""The share of the calibration text that a process has, and the model where it computes."""

from dataclasses import replace

import pytest
import torch
from support.families import tiny_model

from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks.calibration import calibration_of
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.processes import Processes

CONFIG = CalibrationConfig(num_sequences=6, length=8, batch_size=16)


def test_processes_share_the_text_of_the_data_module(stories: StoriesDataModule) -> None:
    text = stories.calibration(6, 8)
    assert text.shape == (6, 8)
    alone = calibration_of(tiny_model("llama"), stories, CONFIG, Processes.alone(), "x")
    assert torch.equal(torch.cat([batch.tokens for batch in alone.batches]), text) and alone.num_sequences == 6
    assert {len(batch.tokens) for batch in alone.batches} == {2}  # 16 tokens
    shares = [
        calibration_of(tiny_model("llama"), stories, CONFIG, replace(Processes.alone(), rank=rank, world_size=2), "x")
        for rank in range(2)
    ]
    assert [[batch.first for batch in share.batches] for share in shares] == [[0, 4], [2]]
    assert all(torch.equal(batch.tokens, text[batch.first :][:2]) for share in shares for batch in share.batches)
    assert [share.num_sequences for share in shares] == [6, 6]


def test_without_data_it_is_told_who_needs_them() -> None:
    with pytest.raises(UserError, match="^StructuredPruning needs calibration text; give fit a data module"):
        calibration_of(tiny_model("llama"), None, CONFIG, Processes.alone(), "StructuredPruning")


def test_too_little_text_is_told_before_the_model_moves(stories: StoriesDataModule) -> None:
    model = tiny_model("llama")
    meta = Processes.alone("meta")
    with pytest.raises(UserError, match="x asks for 9999 sequences of 8 tokens"):
        calibration_of(model, stories, replace(CONFIG, num_sequences=9999), meta, "x")
    assert next(model.parameters()).device.type == "cpu"
    calibration_of(model, stories, CONFIG, meta, "x")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_model_without_room_on_the_device_stays(stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: torch.nn.Module, device: torch.device) -> None:
        raise UserError(f"no room on {device}")

    monkeypatch.setattr("qpruner.memory.check_room", full)
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no room on meta"):
        calibration_of(model, stories, CONFIG, Processes.alone("meta"), "x")
    assert next(model.parameters()).device.type == "cpu"
