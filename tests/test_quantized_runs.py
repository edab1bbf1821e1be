"""Runs that prune and quantize, from the command line: the rows, the folder, the plan, kills and ranks."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from support.figures import cells
from support.forks import in_fork
from support.runs import INT8, KILL_AT, NAMES, NF4, RESULTS, adapters, in_own_process, payload, stages

import qpruner
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Pruning, 8 bits in the first layer and 4 in the second, and a fit of six steps."""
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": {"bits": [8, 4]}}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    return config_that_prunes


def int8_bits(rows: int, columns: int) -> int:
    return rows * columns * 8 + rows * 32


def nf4_bits(rows: int, columns: int) -> int:
    """Two codes to a byte, and a float32 for each 64 weights that were begun."""
    return -(-rows * columns // 2) * 8 + -(-rows * columns // 64) * 32


def shapes(plan: CompressionPlan, layer: int) -> list[tuple[int, int]]:
    """Of a layer of the tiny llama: 32 wide, heads of 8, two query heads to a group."""
    keys, channels = 8 * len(plan.layers[layer].kv_groups), len(plan.layers[layer].ffn_channels)
    return [(2 * keys, 32), (keys, 32), (keys, 32), (32, 2 * keys), (channels, 32), (channels, 32), (32, channels)]


def test_a_run_measures_every_stage_and_leaves_a_model_that_loads_anywhere(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, Figure]
) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    rows = stages(folder)
    assert [row["name"] for row in rows] == NAMES
    dense, pruned, quantized, loftq, recovered = rows
    plan = CompressionPlan.read(folder / "plan.json")
    assert plan == CompressionPlan.read(folder / "model" / "plan.json")
    assert [layer.precision for layer in plan.layers] == [dict.fromkeys(UNITS, one) for one in (INT8, NF4)]
    # Average bits.
    bits = sum(int8_bits(*shape) for shape in shapes(plan, 0)) + sum(nf4_bits(*shape) for shape in shapes(plan, 1))
    weights = sum(rows * columns for layer in (0, 1) for rows, columns in shapes(plan, layer))
    assert [row["average_bits"] for row in rows[:2]] == [None, 32]
    assert [row["average_bits"] for row in rows[2:]] == [pytest.approx(bits / weights)] * 3
    # Parameters and bytes.
    base = payload(folder / "model" / "model.safetensors")
    added = payload(folder / "model" / "adapter" / "adapter_model.safetensors")
    assert pruned["tensor_bytes"] - quantized["tensor_bytes"] == (32 * weights - bits) / 8
    assert quantized["tensor_bytes"] == base
    assert loftq["tensor_bytes"] == recovered["tensor_bytes"] == base + added
    assert quantized["parameters"] == pruned["parameters"]
    assert loftq["parameters"] == recovered["parameters"] == pruned["parameters"] + added / 4
    # What each does.
    perplexities = [row["results"]["perplexity"] for row in rows]
    assert len(set(perplexities)) == 5
    assert recovered["results"]["perplexity"] < loftq["results"]["perplexity"]
    log = (folder / "run.log").read_text()
    assert log.count("Quantized ") == 1 and f"{bits / weights:.2f} bits per weight" in log
    report = (folder / "report.md").read_text()
    assert all(f"| {name} " in report for name in NAMES) and f"{base:,}" in report and "plan.png" in report
    assert cells(pictures["plan.png"].axes[2]) == [[8] * 4, [4] * 4] and (folder / "plan.png").exists()
    # The same logits in another process; nothing is read that could run code.
    there = in_own_process("-c", RESULTS, str(folder / "model"))
    assert there.returncode == 0, there.stderr
    monkeypatch.setattr(torch, "load", None)
    with torch.no_grad():
        logits = qpruner.load_compressed(folder / "model")(input_ids=torch.arange(20).view(2, 10)).logits
    assert there.stdout.split()[-1] == hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def test_test_measures_dense_quantized_and_recovered_again(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    run(["test", *arguments])
    fitted = {stage["name"]: stage for stage in stages(folder)}
    tested = read_json(folder / "test.json")["stages"]
    assert [stage["name"] for stage in tested] == ["dense", "quantized", "recovered"]
    for stage in tested:
        expected = fitted[stage["name"]]
        assert all(stage[key] == expected[key] for key in ("parameters", "tensor_bytes", "average_bits"))
        assert stage["results"] == pytest.approx(expected["results"], rel=1e-6)


@pytest.mark.slow
def test_killed_and_repeated_equals_uninterrupted(config: dict[str, Any], tmp_path: Path) -> None:
    """Before the base is kept, before the first step and after a checkpoint; the base is quantized twice in all."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    first = in_fork("-m", "qpruner", "fit", "--config", str(path), "--run.name", "whole")
    assert first.returncode == 0, first.stderr
    for moment, number in (("keeping", "1"), ("training", "1"), ("training", "4")):
        killed = in_fork(KILL_AT, moment, number, "fit", "--config", str(path))
        assert killed.returncode == -9, killed.stderr
    last = in_fork("-m", "qpruner", "fit", "--config", str(path))
    assert last.returncode == 0, last.stderr
    whole, pieces = (tmp_path / "runs" / name for name in ("whole", "x"))
    assert (pieces / "plan.json").read_text() == (whole / "plan.json").read_text()
    found, expected = adapters(pieces), adapters(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (pieces / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    kept = ("name", "parameters", "tensor_bytes", "average_bits", "results")
    assert [[row[key] for key in kept] for row in stages(pieces)] == [
        [row[key] for key in kept] for row in stages(whole)
    ]
    assert [(folder / "run.log").read_text().count("Quantized ") for folder in (whole, pieces)] == [1, 2]


def test_two_gloo_ranks_quantize_as_one(arguments: list[str], tmp_path: Path) -> None:
    for devices, begin in (("1", in_fork), ("2", in_own_process)):
        options = ["--trainer.strategy", "ddp", "--trainer.devices", devices, "--run.name", devices]
        done = begin("-m", "qpruner", "fit", *arguments, *options)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("1", "2"))
    assert (one / "plan.json").read_text() == (two / "plan.json").read_text()
    base = Path("model", "model.safetensors")
    assert (one / base).read_bytes() == (two / base).read_bytes()
    for alone, shared in zip(stages(one), stages(two), strict=True):
        assert all(alone[key] == shared[key] for key in ("name", "parameters", "tensor_bytes", "average_bits"))
        if alone["name"] != "recovered":  # two ranks train on batches twice as large
            assert alone["results"] == pytest.approx(shared["results"], rel=1e-6)


def test_a_given_plan_quantizes_as_it_says(arguments: list[str], config: dict[str, Any], tmp_path: Path) -> None:
    run(["fit", *arguments])
    plan = CompressionPlan.read(tmp_path / "runs" / "x" / "plan.json")
    units = [dict(zip(UNITS, (DENSE, NF4, INT8, NF4), strict=True)), dict.fromkeys(UNITS, Precision("fp4", 4, 32))]
    edited = plan.with_precision(units)
    edited.write(tmp_path / "edited.json")
    run(["fit", *arguments, "--plan", str(tmp_path / "edited.json"), "--run.name", "y"])
    folder = tmp_path / "runs" / "y"
    assert "replaces MixedPrecisionQuantization(bits=[8, 4]" in (folder / "run.log").read_text()
    assert CompressionPlan.read(folder / "plan.json") == edited
    assert [row["name"] for row in stages(folder)] == NAMES
    layers = qpruner.load_compressed(folder / "model").get_base_model().model.layers
    assert layers[0].mlp.up_proj.base_layer.precision == INT8
    assert layers[1].self_attn.q_proj.base_layer.precision == Precision("fp4", 4, 32)
    assert type(layers[0].self_attn.q_proj.base_layer) is torch.nn.Linear
    # Also where nothing was configured to quantize.
    config["trainer"]["callbacks"].pop()
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(config))
    given = ["--plan", str(tmp_path / "edited.json"), "--run.name", "z"]
    run(["fit", "--config", str(tmp_path / "bare.yaml"), *given])
    assert stages(tmp_path / "runs" / "z")[2]["results"] == stages(folder)[2]["results"]


@pytest.mark.parametrize(
    ("precision", "said"),
    [(Precision("nf4", 5), "nf4 has no 5 bits"), (Precision("nf5", 4), "Did you mean 'nf4'")],
    ids=str,
)
def test_a_plan_with_a_precision_that_is_not_offered_is_told_before_any_model_is_loaded(
    arguments: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    precision: Precision,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qpruner.anatomy import architecture_of
    from qpruner.model_folder import read_base_config

    plan = CompressionPlan.dense(architecture_of(read_base_config(str(tiny_llama))), None)
    plan.with_precision([dict.fromkeys(UNITS, precision)] * 2).write(tmp_path / "plan.json")
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    with pytest.raises(UserError, match=said):
        run(["fit", *arguments, "--plan", str(tmp_path / "plan.json")])


def test_fewer_bits_in_formats_of_ones_own_choice(arguments: list[str], tmp_path: Path) -> None:
    options = {"bits": "[2, 3]", "formats": "{3: affine}", "group": "32"}
    given = [part for name, value in options.items() for part in (f"--trainer.callbacks.{name}", value)]
    run(["fit", *arguments, *given])
    folder = tmp_path / "runs" / "x"
    expected = Precision("affine-double", 2, 32), Precision("affine", 3, 32)
    plan = CompressionPlan.read(folder / "model" / "plan.json")
    assert [layer.precision for layer in plan.layers] == [dict.fromkeys(UNITS, one) for one in expected]
    layers = qpruner.load_compressed(folder / "model").get_base_model().model.layers
    assert tuple(layer.mlp.up_proj.base_layer.precision for layer in layers) == expected
    loftq, recovered = stages(folder)[3:]
    assert recovered["results"]["perplexity"] < loftq["results"]["perplexity"]
    run(["fit", *arguments, *given])  # goes on, as nothing has changed
    with pytest.raises(UserError, match=r"init_args.formats.3: was affine, is now symmetric"):
        run(["fit", *arguments, *given, "--trainer.callbacks.formats", "{3: symmetric}"])


def test_changed_bits_are_refused_by_name(arguments: list[str]) -> None:
    run(["fit", *arguments])
    with pytest.raises(UserError, match=r"init_args.bits: was \[8, 4\], is now \[4, 4\]") as caught:
        run(["fit", *arguments, "--trainer.callbacks.bits", "[4,4]"])
    assert "formats" not in str(caught.value) and "ratio" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["bits", "7"], "bits asks for 7; choose from 1, 2, 3, 4, 5, 6, 8, 16"),
        (["bits", "[8,4,4]"], "bits has 3 entries; the model has 2 layers"),
        (["bits", "[8,7]"], "bits asks for 7"),
        (["bits", "{qkv: 4, o: 4}"], "bits names qkv, o; it must name each unit of a layer: qkv, o, gate_up, down"),
        (["bits", "four"], "bits"),
        (["formats", "{4: nf5}"], "nf4"),
        (["group", "48"], "nf4 has no groups of 48"),
        (["loftq_iterations", "-1"], "loftq_iterations is -1"),
        (["loftq_iteration", "2"], "Did you mean 'trainer.callbacks.loftq_iterations'?"),
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


def test_pruning_behind_quantization_is_told_before_any_model_is_loaded(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    config["trainer"]["callbacks"].reverse()
    (tmp_path / "reversed.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="packed weights cannot be scored"):
        run(["fit", "--config", str(tmp_path / "reversed.yaml")])
