"""Runs that prune while they train, then quantize and recover in a second phase, from the command line."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.forks import in_fork
from support.runs import INT8, KILL_AT, NF4, QUANTIZATION, adapters, in_own_process, payload, stages

import qpruner
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json, write_json
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunFolder
from qpruner.records.report import scalars

PARTS = ("model.safetensors", "adapter/adapter_model.safetensors")
LATER = [f"{name} (phase 2)" for name in ("quantized", "quantized + LoftQ", "recovered")]
NAMES = ["dense", "pruned in training", *LATER]


@pytest.fixture
def config(phased_config: dict[str, Any]) -> dict[str, Any]:
    return phased_config


def of_first(folder: RunFolder) -> RunFolder:
    return RunFolder(folder.path, 1)


def test_a_run_prunes_in_training_then_quantizes_and_recovers(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    folder = RunFolder(tmp_path / "runs" / "x")
    first, rows = of_first(folder), stages(folder.path)
    assert [row["name"] for row in rows] == NAMES
    pruned, plan = CompressionPlan.read(first.plan), CompressionPlan.read(folder.plan)
    # The second phase keeps the units of the first, in fewer bits.
    assert plan == pruned.with_precision(
        [dict.fromkeys(layer.precision, one) for layer, one in zip(pruned.layers, (INT8, NF4), strict=True)]
    )
    assert plan.widths.kv_groups == (1, 1) and plan.widths.ffn_channels == (43, 43)
    gone = (
        2 * 32 * (8 * 6 + 5 * 3)
    )  # one group (rows of 2 heads of q, of k and v, columns of o), five channels, two layers
    assert rows[0]["parameters"] - rows[2]["parameters"] == gone
    # What the rows say is on disk, and both models load.
    for row, model in ((rows[1], first.model), (rows[4], folder.model)):
        stored = [payload(model / name) for name in PARTS]
        assert row["tensor_bytes"] == sum(stored)
        assert qpruner.load_compressed(model)(input_ids=torch.arange(20).view(2, 10)).logits.isfinite().all()
    assert not first.checkpoint.exists() and folder.checkpoint.exists() and folder.finished_phases == 1
    # What a person reads.
    log, report = folder.log.read_text(), folder.report.read_text()
    said = ["Phase 1 of 2", "Step 2: ", "Step 4: ", "Step 5: ", "Phase 2 of 2", "Pruned "]
    assert sorted(said, key=log.index) == [
        "Phase 1 of 2",
        "Step 2: ",
        "Step 4: ",
        "Step 5: ",
        "Pruned ",
        "Phase 2 of 2",
    ]
    assert "](ratio.png)" in report and "`phases/1/model/`" in report
    ratios = scalars(first.tensorboard, "pruning/ratio")
    assert [step for step, _ in ratios] == [2, 4, 5]
    assert ratios[-1][1] == pytest.approx(gone / rows[0]["parameters"], rel=1e-6)
    assert [entry["phase"] for entry in read_json(folder.manifest)["compression"]] == [1, 2]


def test_a_second_phase_that_only_trains_goes_on_with_the_adapters(config: dict[str, Any], tmp_path: Path) -> None:
    del config["phases"][0]["callbacks"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path)])
    folder = RunFolder(tmp_path / "runs" / "x")
    assert [row["name"] for row in stages(folder.path)] == [*NAMES[:2], NAMES[-1]]
    first, begun = (qpruner.load_compressed(one.model) for one in (of_first(folder), folder))
    for name, weight in first.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(weight, begun.get_base_model().get_parameter(name))
    assert stages(folder.path)[2]["results"]["perplexity"] < stages(folder.path)[1]["results"]["perplexity"]


@pytest.mark.slow
def test_killed_in_each_phase_and_repeated_equals_uninterrupted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training between two events, while the narrowed model is written, in recovery and when that is written."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: more threads add in another order
    pieces, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    for moment, phases in (("training 5", 0), ("keeping 2", 0), ("training 3", 1), ("keeping 1", 1)):
        killed = in_fork(KILL_AT, *moment.split(), "fit", *arguments)
        assert killed.returncode == -9, killed.stderr
        assert pieces.finished_phases == phases
    run(["fit", *arguments])
    run(["fit", *arguments, "--run.name", "whole"])
    for one, other in ((pieces, whole), (of_first(pieces), of_first(whole))):
        for name in ("plan.json", *PARTS):
            assert (one.model / name).read_bytes() == (other.model / name).read_bytes()
        curves = [scalars(folder.tensorboard, "train/loss") for folder in (one, other)]
        assert curves[0] == curves[1] and len(curves[0]) == 6
    trained, expected = adapters(pieces.path), adapters(whole.path)
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())
    kept = ("name", "parameters", "tensor_bytes", "average_bits", "results")
    assert [[row[key] for key in kept] for row in stages(pieces.path)] == [
        [row[key] for key in kept] for row in stages(whole.path)
    ]


@pytest.mark.slow
def test_two_gloo_ranks_prune_as_one(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows on each of two ranks are the four rows of one: the same units go, the same adapters come of it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = [*arguments, "--model.lora.dropout", "0"]
    run(["fit", *shared, "--run.name", "1"])
    two_ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.loader.batch_size", "2"]
    done = in_own_process("-m", "qpruner", "fit", *shared, *two_ranks, "--run.name", "2")
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("1", "2"))
    assert of_first(one).plan.read_text() == of_first(two).plan.read_text()
    assert one.plan.read_text() == two.plan.read_text()
    assert [row["name"] for row in stages(two.path)] == NAMES


@pytest.mark.slow
def test_a_quantized_base_is_pruned_and_quantized_anew(config: dict[str, Any], tmp_path: Path) -> None:
    """4 bits from the start: packed in training and after it, and made dense between the phases."""
    config["trainer"]["callbacks"].insert(0, {**QUANTIZATION, "init_args": {"bits": 4}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path)])
    folder = RunFolder(tmp_path / "runs" / "x")
    assert [row["name"] for row in stages(folder.path)] == ["dense", "quantized", "quantized + LoftQ", *NAMES[1:]]
    pruned = CompressionPlan.read(of_first(folder).plan)
    assert {one for layer in pruned.layers for one in layer.precision.values()} == {NF4}
    assert "rounded anew: their weights changed by" in folder.log.read_text()
    assert not of_first(folder).base.exists()
    stored = [
        payload(of_first(folder).model / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors")
    ]
    assert stages(folder.path)[3]["tensor_bytes"] == sum(stored)


@pytest.mark.slow
def test_a_phase_that_only_trains_a_quantized_base_has_one_row_killed_or_not(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config["trainer"]["callbacks"].insert(0, QUANTIZATION)
    del config["phases"][0]["callbacks"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    killed = in_fork(KILL_AT, "training", "7", "fit", "--config", str(path))  # the first of phase 2
    assert killed.returncode == -9, killed.stderr
    run(["fit", "--config", str(path)])
    names = ["dense", "quantized", "quantized + LoftQ", "pruned in training", "recovered (phase 2)"]
    assert [row["name"] for row in stages(tmp_path / "runs" / "x")] == names
    run(["fit", "--config", str(path), "--run.name", "whole"])  # with the adapters of the first phase
    killed_adapters, expected = (adapters(tmp_path / "runs" / name) for name in ("x", "whole"))
    assert all(torch.equal(killed_adapters[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_packed_tables_are_made_dense_between_the_phases(config: dict[str, Any], tmp_path: Path) -> None:
    """The tied embedding and head of 8 bits in the first phase, too, which the second holds in 4."""
    tables = {"bits": 16, "embedding": 8, "head": 8}
    config["trainer"]["callbacks"].insert(0, {**QUANTIZATION, "init_args": tables})
    config["phases"][0]["callbacks"] = [{**QUANTIZATION, "init_args": {"bits": 8, "embedding": 4, "head": 4}}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path)])
    folder = RunFolder(tmp_path / "runs" / "x")
    first, last = CompressionPlan.read(of_first(folder).plan), CompressionPlan.read(folder.plan)
    assert (first.embedding, first.head, last.embedding, last.head) == (INT8, INT8, NF4, NF4)
    assert last == first.with_precision(
        [dict.fromkeys(layer.precision, INT8) for layer in first.layers], embedding=NF4, head=NF4
    )
    assert [row["name"] for row in stages(folder.path)] == ["dense", "quantized", "pruned in training", *LATER]
    before, after = (row["results"]["perplexity"] for row in stages(folder.path)[2:4])
    assert after == pytest.approx(before, rel=0.1)
    run(["merge", str(folder.path), str(tmp_path / "merged")])
    merged, packed = (qpruner.load_compressed(one) for one in (tmp_path / "merged", folder.model))
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        one, other = (model.float()(input_ids=tokens).logits for model in (merged, packed))
    assert (one - other).norm() / other.norm() < 0.01


def test_what_belongs_to_one_trainer_is_made_anew_for_each_phase(config: dict[str, Any], tmp_path: Path) -> None:
    """A strategy and a logger that are given by their classes, and callbacks of the user that remember."""
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 1e6}}
    config["trainer"] |= {
        "strategy": {"class_path": "SingleDeviceStrategy", "init_args": {"device": "cpu"}},
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}},
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "callbacks": [*config["trainer"]["callbacks"], stopping],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path)])
    folder = RunFolder(tmp_path / "runs" / "x")
    assert [row["name"] for row in stages(folder.path)] == NAMES
    steps = []
    for number in (0, 1):
        with (tmp_path / "csv" / "lightning_logs" / f"version_{number}" / "metrics.csv").open() as file:
            steps.append([int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]])
    # The first validation is the best, the second is not better; so in each phase.
    assert [len(phase) for phase in steps] == [2, 2]


@pytest.mark.slow
def test_a_checkpoint_that_is_given_begins_the_first_phase_alone(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    folder = RunFolder(tmp_path / "runs" / "x")
    shutil.copy(folder.checkpoint, given := tmp_path / "given.ckpt")
    summary = read_json(folder.summary)
    # As if it was killed when the second phase began.
    write_json(folder.summary, summary | {"finished": False, "stages": summary["stages"][:2]})
    folder.checkpoint.unlink()
    shutil.rmtree(folder.model)
    of_first(folder).checkpoint.parent.mkdir(exist_ok=True)
    of_first(folder).checkpoint.write_text("left by a process that was killed before it could remove it")
    run(["fit", *arguments, "--ckpt_path", str(given)])
    assert not of_first(folder).checkpoint.exists()
    assert [row["results"] for row in stages(folder.path)] == [row["results"] for row in summary["stages"]]


@pytest.mark.slow
def test_evaluation_measures_what_there_is(arguments: list[str], tmp_path: Path) -> None:
    """In the middle of pruning with its masks, then the result of each phase; all as the run measured them."""
    folder = RunFolder(tmp_path / "runs" / "x")
    killed = in_fork(KILL_AT, "training", "6", "fit", *arguments)
    assert killed.returncode == -9, killed.stderr
    run(["test", *arguments])
    names = [row["name"] for row in read_json(folder.path / "test.json")["stages"]]
    assert names == ["dense", "recovered"]
    run(["fit", *arguments])
    run(["test", *arguments])
    measured = read_json(folder.path / "test.json")["stages"]
    expected = [stages(folder.path)[place] for place in (0, 2, 4)]
    for one, other in zip(measured, expected, strict=True):
        assert one["results"]["perplexity"] == pytest.approx(other["results"]["perplexity"], rel=1e-6)
        assert one["tensor_bytes"] == other["tensor_bytes"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--trainer.callbacks.ratio", "0.9"], "The ratio is 0.9"),
        (["--trainer.callbacks.selection.leave_alone", "[0, 1]"], "names every layer"),
        (
            ["--model.lora.target_modules", "[q_proj, v_proj]"],
            "LoRAGuidedPruning scores FFN channels by the adapters on",
        ),
        (
            ["--trainer.callbacks+=StructuredPruning", "--trainer.callbacks.ratio", "0.1"],
            "a fit prunes at most once, then",
        ),
        (
            ["--phases", "[{max_epochs: 1, callbacks: [{class_path: StructuredPruning, init_args: {ratio: 0.1}}]}]"],
            "Phase 2",
        ),
        (["--phases", "[{max_epochs: null}]"], "A phase has neither max_epochs nor max_steps"),
        (["--trainer.callbacks", "[]"], "its first compresses nothing"),
        (["--plan", "plan.json"], "--plan carries out a plan in one fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_mistakes_are_told_before_any_model_is_loaded(
    arguments: list[str], wrong: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments, *wrong])
    assert said in str(caught.value)


def test_a_schedule_longer_than_the_fit_is_told_before_anything_is_measured(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.callbacks.report.evaluate", None)
    with pytest.raises(UserError, match=r"every_n_steps is 40, and .* lie 5 of the fit's 6 optimizer steps"):
        run(["fit", *arguments, "--trainer.callbacks.schedule.every_n_steps", "40"])


def test_a_search_refuses_what_belongs_to_a_fit(arguments: list[str], tmp_path: Path) -> None:
    without_phases = [*arguments, "--phases", "[]"]
    with pytest.raises(UserError, match="LoRAGuidedPruning prunes in the course of a fit, and a search prunes before"):
        run(["search", *without_phases])
    with pytest.raises(UserError, match="LoRAGuidedPruning prunes in the course"):
        run(["search", *arguments])
    assert not (tmp_path / "runs" / "x" / "config.yaml").exists()
