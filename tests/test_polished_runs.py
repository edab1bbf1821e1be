"""Runs that quantize and polish in one phase and train adapters in the next, from the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.forks import in_fork
from support.runs import KILL_AT, in_own_process, stages

import qpruner
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.records.folder import RunFolder
from qpruner.records.report import scalars

NAMES = ["dense", "quantized", "polished", "recovered (phase 2)"]
PARTS = ("model.safetensors", "adapter/adapter_model.safetensors")


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Two bits, polished for six steps against the dense model's hidden states, then six steps of adapters."""
    calibration = {"num_sequences": 16, "length": 12}
    quantization = {"bits": 2, "group": 32, "loftq_iterations": 0, "calibrated": {"text": calibration}}
    config_that_prunes["trainer"]["callbacks"] = [
        {"class_path": "MixedPrecisionQuantization", "init_args": quantization},
        {"class_path": "GridPolishing"},
    ]
    config_that_prunes["model"]["distillation"] = {"logits": 0.0, "hidden": 1.0, "cross_entropy": 1.0}
    config_that_prunes["phases"] = [{"max_epochs": 1, "optimizer": {"lr": 0.005}}]
    return config_that_prunes


def test_a_run_polishes_then_recovers(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    folder = RunFolder(tmp_path / "runs" / "x")
    first, rows = RunFolder(folder.path, 1), stages(folder.path)
    assert [row["name"] for row in rows] == NAMES
    _, quantized, polished, recovered = rows
    # Polishing costs no byte; adapters are on the model behind it.
    adapters = sum(tensor.nbytes for tensor in load_file(first.model / PARTS[1]).values())
    assert polished["tensor_bytes"] - quantized["tensor_bytes"] == adapters
    assert polished["average_bits"] == quantized["average_bits"] < 3
    losses = [dict(scalars(phase.tensorboard, "train/hidden")) for phase in (first, folder)]
    assert [len(values) for values in losses] == [6, 6]
    # Adapters train on the polished base, which no longer changes.
    assert (first.model / PARTS[0]).read_bytes() == (folder.model / PARTS[0]).read_bytes()
    begun, trained = (load_file(one.model / PARTS[1]) for one in (first, folder))
    assert not any(bool(tensor.any()) for name, tensor in begun.items() if "lora_B" in name)
    assert all(bool(tensor.any()) for name, tensor in trained.items() if "lora_B" in name)
    assert qpruner.load_compressed(folder.model)(input_ids=torch.arange(20).view(2, 10)).logits.isfinite().all()
    assert not first.checkpoint.exists() and not first.base.exists()
    assert "Polished: scales and minima are rounded" in folder.log.read_text()


@pytest.mark.slow
def test_killed_in_each_phase_and_repeated_equals_uninterrupted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it polishes, while the polished base is written, when the phase is called over, and in recovery."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: more threads add in another order
    pieces, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    for moment, phases in (("training 4", 0), ("keeping 1", 0), ("ending 1", 0), ("training 3", 1)):
        killed = in_fork(KILL_AT, *moment.split(), "fit", *arguments)
        assert killed.returncode == -9, killed.stderr
        assert pieces.finished_phases == phases
        if moment == "training 4":  # what was trained so far can be measured
            run(["test", *arguments])
            measured = read_json(pieces.test_summary)["stages"]
            assert [row["name"] for row in measured] == ["dense", "quantized", "recovered"]
            assert measured[2]["results"]["loss"] < measured[1]["results"]["loss"]
    run(["fit", *arguments])
    run(["fit", *arguments, "--run.name", "whole"])
    for one, other in ((pieces, whole), (RunFolder(pieces.path, 1), RunFolder(whole.path, 1))):
        for name in ("plan.json", *PARTS):
            assert (one.model / name).read_bytes() == (other.model / name).read_bytes()
        curves = [scalars(folder.tensorboard, "train/loss") for folder in (one, other)]
        assert curves[0] == curves[1] and len(curves[0]) == 6
    kept = ("name", "parameters", "tensor_bytes", "average_bits", "results")
    assert [[row[key] for key in kept] for row in stages(pieces.path)] == [
        [row[key] for key in kept] for row in stages(whole.path)
    ]


@pytest.mark.slow
def test_two_gloo_ranks_polish_as_one(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows on each of two ranks are the four rows of one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = [*arguments, "--model.lora.dropout", "0", "--phases", "[]"]
    run(["fit", *shared, "--run.name", "1"])
    two_ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.loader.batch_size", "2"]
    done = in_own_process("-m", "qpruner", "fit", *shared, *two_ranks, "--run.name", "2")
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("1", "2"))
    results = [stages(folder.path)[-1]["results"]["loss"] for folder in (one, two)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_what_cannot_be_polished_is_told_before_any_work(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"phases": []}))
    with pytest.raises(UserError, match="^GridPolishing trains the base of a fit, and the trials of a search"):
        run(["search", "--config", str(path)])
    config["trainer"]["callbacks"][0]["init_args"] = {"bits": 8}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="^GridPolishing stands behind a quantization to int8"):
        run(["fit", "--config", str(path)])
    assert not (tmp_path / "runs" / "x" / "summary.json").exists()
