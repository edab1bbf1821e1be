"""Runs that are killed where a fit keeps its model, drops what it needs no more and calls itself over."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.forks import in_fork
from support.runs import KILL_AT, adapters, stages

from qpruner.commands import run
from qpruner.records.folder import RunFolder
from qpruner.records.report import scalars

SCHEDULE = {"warmup": 0.0, "cooldown": 0.2, "every_n_steps": 2}


def killed_and_repeated_equals_uninterrupted(config: dict[str, Any], folder: Path, moments: list[str]) -> RunFolder:
    """Kills a run at one moment after the other, lets it end, and compares what it left with a run in one piece."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for moment in moments:
        killed = in_fork(KILL_AT, *moment.split(), "fit", "--config", str(path))
        assert killed.returncode == -9, (moment, killed.stderr)
    run(["fit", "--config", str(path)])
    run(["fit", "--config", str(path), "--run.name", "whole"])
    pieces, whole = (RunFolder(folder / "runs" / name) for name in ("x", "whole"))
    assert pieces.finished and whole.finished
    for one, other in zip(pieces.all_phases, whole.all_phases, strict=True):
        for name in ("plan.json", "model.safetensors", "adapter/adapter_model.safetensors"):
            assert (one.model / name).read_bytes() == (other.model / name).read_bytes()
        assert scalars(one.tensorboard, "train/loss") == scalars(other.tensorboard, "train/loss")
        for mine, expected_there in ((one.phase_folder, other.phase_folder), (one.model, other.model)):
            names = [sorted(path.name for path in place.iterdir()) for place in (mine, expected_there)]
            assert names[0] == names[1]  # nothing half written stays behind
    trained, expected = adapters(pieces.path), adapters(whole.path)
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())
    kept = ("name", "parameters", "tensor_bytes", "average_bits", "results")
    assert [[row[key] for key in kept] for row in stages(pieces.path)] == [
        [row[key] for key in kept] for row in stages(whole.path)
    ]
    return pieces


@pytest.fixture
def config_that_allocates(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Pruning, and bits by sensitivity."""
    allocation = {
        "allocation": "sensitivity",
        "budget": {"average_bits": 7.2},
        "deciding": {"calibration": {"num_sequences": 8, "length": 12, "batch_size": 2}},
    }
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": allocation}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    return config_that_prunes


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: more threads add in another order


@pytest.mark.slow
def test_a_fit_that_prunes_and_quantizes(config_that_allocates: dict[str, Any], tmp_path: Path) -> None:
    """The pruned base kept and sensitivities not measured; the packed one half in its place; then to the end."""
    moments = [
        "swapping 1", "measuring 1", "adapters 1", "swapping 2", "dropping 1", "training 4", "adapters 1",
        "reporting 1", "card 1", "ending 1",
    ]  # fmt: skip
    killed_and_repeated_equals_uninterrupted(config_that_allocates, tmp_path, moments)


@pytest.mark.slow
def test_a_fit_without_compression(config_that_prunes: dict[str, Any], tmp_path: Path) -> None:
    config_that_prunes["trainer"]["callbacks"] = []
    moments = ["keeping 1", "adapters 1", "swapping 2", "reporting 1", "ending 1"]
    killed_and_repeated_equals_uninterrupted(config_that_prunes, tmp_path, moments)


@pytest.mark.slow
def test_phases(config_that_allocates: dict[str, Any], tmp_path: Path) -> None:
    """Packed, pruned in training, merged and quantized by what a second phase finds out."""
    _, quantization = config_that_allocates["trainer"]["callbacks"]
    guided = {"class_path": "LoRAGuidedPruning", "init_args": {"ratio": 0.05, "schedule": SCHEDULE}}
    packed = {"class_path": "MixedPrecisionQuantization", "init_args": {"bits": 8}}
    config_that_allocates["trainer"]["callbacks"] = [packed, guided]
    config_that_allocates["phases"] = [{"max_epochs": 1, "callbacks": [quantization]}]
    moments = [
        "training 4", "adapters 1", "ending 1", "measuring 1", "swapping 2", "dropping 1", "training 3", "reporting 1",
    ]  # fmt: skip
    killed_and_repeated_equals_uninterrupted(config_that_allocates, tmp_path, moments)
