"""Runs whose bits a budget decides, from the command line: the record of it, kills and ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from support.figures import widths
from support.forks import in_fork
from support.runs import INT8, KILL_AT, NAMES, NF4, adapters, in_own_process, payload, stages
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpruner.allocation.decision import Allocation
from qpruner.allocation.sensitivities import Sensitivities
from qpruner.commands import run
from qpruner.compressed import State
from qpruner.errors import UserError
from qpruner.folder_manifest import read_manifest
from qpruner.plan import CompressionPlan
from qpruner.records.allocation_report import sentence
from qpruner.records.folder import RunFolder
from qpruner.records.report import scalars

METHODS = ("uniform", "mutual_information", "sensitivity", "marginal")


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Pruning, bits by sensitivity, and a fit of six steps."""
    allocation = {
        "allocation": "sensitivity",
        "budget": {"average_bits": 7.2},
        "deciding": {"calibration": {"num_sequences": 8, "length": 12, "batch_size": 2}},
    }
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": allocation}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    return config_that_prunes


@pytest.mark.parametrize("method", METHODS)
def test_a_run_records_what_its_budget_bought(
    arguments: list[str], tmp_path: Path, method: str, pictures: dict[str, Figure]
) -> None:
    run(["fit", *arguments, "--trainer.callbacks.allocation", method])
    folder = RunFolder(tmp_path / "runs" / "x")
    allocation, plan = Allocation.read(folder.allocation), CompressionPlan.read(folder.plan)
    assert [row["name"] for row in stages(folder.path)] == NAMES
    assert plan == CompressionPlan.read(folder.model / "plan.json")
    held = {"uniform": [NF4, NF4]}.get(method) or [one.precision for one in allocation.decisions]
    assert [set(layer.precision.values()) for layer in plan.layers] == [{one} for one in held]
    assert method == "uniform" or set(held) == {NF4, INT8}
    # To the byte.
    stored = [payload(folder.model / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors")]
    assert allocation.total_bytes == sum(stored) == stages(folder.path)[-1]["tensor_bytes"]
    assert allocation.average_bits == stages(folder.path)[-1]["average_bits"] <= 7.2
    # What a person reads.
    report = folder.report.read_text()
    assert "## Who got which bits" in report and str(allocation) in report and "](allocation.png)" in report
    assert [line for line in report.splitlines() if line.startswith("- Layer ")] == [
        f"- {sentence(allocation, decision)}" for decision in allocation.decisions
    ]
    assert len(allocation.decisions) == 2 and folder.allocation_picture.exists()
    gains, bits = pictures["allocation.png"].axes
    assert widths(bits) == [one.bits for one in held]
    assert widths(gains) == [one.costs[0] - one.costs[-1] for one in allocation.decisions]
    assert ("greedy upgrades" in report) == ("optimum" in report) == (method != "uniform")
    assert str(allocation) in folder.log.read_text()
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert "plan/allocation" in board.Tags()["images"]
    (text,) = board.Tensors("plan/allocation/text_summary")
    assert all(sentence(allocation, one) in text.tensor_proto.string_val[0].decode() for one in allocation.decisions)
    # What was found.
    assert folder.sensitivities.exists() == (method != "uniform") and not folder.bank.exists()
    if method != "uniform":
        found = Sensitivities.read(folder.sensitivities)
        parts = {
            "mutual_information": found.mutual_information,
            "sensitivity": found.rises,
            "marginal": found.marginals,
        }
        assert [name for name, part in parts.items() if part is not None] == [method]
        assert ("each of 2 items on average" in folder.log.read_text()) == (method == "marginal")


@pytest.mark.slow
def test_killed_and_repeated_equals_uninterrupted(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bank full, and with the sensitivities written before the quantized base takes the pruned one's place."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: more threads add in another order
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    pieces = RunFolder(tmp_path / "runs" / "x")
    there, made = [], []
    for moment in ("measuring", "keeping"):
        killed = in_fork(KILL_AT, moment, "1", "fit", "--config", str(path))
        assert killed.returncode == -9, killed.stderr
        found = {part: getattr(pieces, part).exists() for part in ("bank", "sensitivities", "allocation", "model")}
        there.append([part for part, exists in found.items() if exists])
        made.append({file.name: file.stat().st_mtime_ns for file in pieces.bank.iterdir()})
        assert read_manifest(pieces.model)["state"] == State.PRUNED
    assert there == [["bank", "model"], ["bank", "sensitivities", "allocation", "model"]]
    assert made[0] == made[1] and len(made[0]) == 2
    written = pieces.sensitivities.stat().st_mtime_ns
    run(["fit", "--config", str(path)])
    assert pieces.sensitivities.stat().st_mtime_ns == written and not pieces.bank.exists()
    run(["fit", "--config", str(path), "--run.name", "whole"])
    whole = RunFolder(tmp_path / "runs" / "whole")
    for part in ("plan", "allocation", "sensitivities"):
        assert getattr(pieces, part).read_text() == getattr(whole, part).read_text()
    trained, expected = adapters(pieces.path), adapters(whole.path)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())
    curves = [scalars(folder.tensorboard, "train/loss") for folder in (pieces, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == 6
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (pieces.model / name).read_bytes() == (whole.model / name).read_bytes()
    kept = ("name", "parameters", "tensor_bytes", "average_bits", "results")
    assert [[row[key] for key in kept] for row in stages(pieces.path)] == [
        [row[key] for key in kept] for row in stages(whole.path)
    ]


@pytest.mark.slow
def test_two_gloo_ranks_decide_as_one(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(["fit", *arguments, "--run.name", "1"])
    two_ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--run.name", "2"]
    done = in_own_process("-m", "qpruner", "fit", *arguments, *two_ranks)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("1", "2"))
    assert one.plan.read_text() == two.plan.read_text()
    assert (one.model / "model.safetensors").read_bytes() == (two.model / "model.safetensors").read_bytes()
    alone, shared = (Sensitivities.read(folder.sensitivities) for folder in (one, two))
    assert alone.made_from == shared.made_from and alone.precisions == shared.precisions
    for first, second in zip(alone.rises or (), shared.rises or (), strict=True):
        assert first.item == second.item
        # Gradients are summed over micro-batches and ranks in float32, in another order here and there, and in their
        # product with rounding errors terms cancel: 3e-6 between one process and two, 8e-6 with three. Summed in
        # float64 all are equal, for twice the memory that the gradients of a block take.
        for measure, rel in (("kl", 1e-6), ("loss", 1e-6), ("first_order", 1e-5)):
            assert getattr(first, measure) == pytest.approx(getattr(second, measure), rel=rel, abs=1e-12)
    assert len(alone.rises or ()) == 2 and not two.bank.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["budget", "{average_bits: 4}"], "The budget is 4 bits per weight, and the cheapest plan has"),
        (["budget", "{share: 0.1, bytes: 5 MB}"], "Give exactly one"),
        (["budget", "null"], "allocation is 'sensitivity' and there is no budget"),
        (["bits", "4"], "the budget decides on the bits"),
        (["deciding.widths", "[4, 7]"], "deciding.widths asks for 7"),
        (["deciding.leave_alone", "[2]"], "deciding.leave_alone names 2; the model has layers 0 to 1"),
        (["deciding.solver", "best"], "exact"),
        (["allocation", "sensitive"], "sensitivity"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_told_before_any_model_is_loaded(
    arguments: list[str], wrong: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments, f"--trainer.callbacks.{wrong[0]}", wrong[1]])
    assert said in str(caught.value)


def test_too_little_text_is_told_before_anything_is_measured(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.callbacks.report.evaluate", None)
    few = ["--trainer.callbacks.deciding.calibration.num_sequences", "49"]
    with pytest.raises(UserError, match="asks for 49 sequences of 12 tokens; .* enough for 48"):
        run(["fit", *arguments, *few])
