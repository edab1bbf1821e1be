"""Runs that hold weights in two and three bits, rounded by text, from the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.bases import copy_base
from support.families import logits_of
from support.forks import in_fork
from support.runs import KILL_AT, adapters, in_own_process, payload, stages
from transformers import AutoModelForCausalLM

from qpruner.__main__ import main
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.folder_manifest import read_manifest
from qpruner.model_folder import build_skeleton, load_compressed, read_base_config
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.pricing import price
from qpruner.records.folder import RunFolder
from qpruner.training.module import LoRAFinetuner

TWO, THREE = Precision("affine", 2, 32), Precision("affine-double", 3, 32)
TEXT = {"num_sequences": 8, "length": 12, "batch_size": 24}
"""84 tokens that decide over up to 48 channels of the tiny Llama."""
OPTION = "--trainer.callbacks."
NAMES = ["dense", "pruned", "quantized", "quantized + adapters", "recovered"]
TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Pruning with compensation, two bits in the first layer and three in the second, and a fit of six steps."""
    pruning = config_that_prunes["trainer"]["callbacks"][0]["init_args"]
    pruning |= {"compensation": "sequential", "compensation_text": TEXT}
    options = {"bits": [2, 3], "formats": {2: "affine"}, "group": 32, "calibrated": {"text": TEXT}}
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": options}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    return config_that_prunes


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: more threads add in another order


def test_a_run_leaves_what_was_told_and_a_model_that_loads_and_merges(
    arguments: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: list[LoRAFinetuner] = []
    monkeypatch.setattr(LoRAFinetuner, "on_train_epoch_start", lambda module: modules.append(module))
    run(["fit", *arguments])
    folder = RunFolder(tmp_path / "runs" / "x")
    rows = stages(folder.path)
    assert [row["name"] for row in rows] == NAMES
    plan = CompressionPlan.read(folder.model / "plan.json")
    assert [layer.precision for layer in plan.layers] == [dict.fromkeys(UNITS, one) for one in (TWO, THREE)]
    # The bytes that the plan was priced at, which is known without any weights.
    skeleton = build_skeleton(read_base_config(str(tiny_llama)))
    told = price(skeleton, plan, rank=2, targets=modules[0].lora.target_modules)
    stored = [payload(folder.model / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors")]
    assert stored == [told.units + told.rest, told.adapters]
    assert rows[-1]["tensor_bytes"] == told.total and rows[-1]["average_bits"] == pytest.approx(told.average_bits)
    # The function of the module, in another object and in a dense copy of it.
    expected = logits_of(modules[0].model.eval(), TOKENS)
    assert torch.equal(logits_of(load_compressed(folder.model), TOKENS), expected)
    run(["merge", str(folder.path), str(tmp_path / "merged")])
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").float(), TOKENS)
    assert 0 < (merged - expected).norm() / expected.norm() < 0.01  # what rounding to bfloat16 costs
    # Rounded by text, which the manifest tells, with nothing left of the way there.
    (calibrated,) = (step["options"]["calibrated"] for step in read_manifest(folder.model)["recipe"][1:])
    assert calibrated["text"] == TEXT and calibrated["rounding"]["method"] == "gptq"
    assert "of 14 linears by text, which takes" in folder.log.read_text() and not folder.calibrated.exists()


@pytest.mark.slow
def test_killed_while_layers_are_rounded_and_repeated_equals_uninterrupted(
    config: dict[str, Any], tmp_path: Path, one_thread: None
) -> None:
    """With the first layer on disk; then with the quantized base kept, and the layers not dropped."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    pieces, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    written = []
    for moment in ("rounding 2", "dropping 1"):
        killed = in_fork(KILL_AT, *moment.split(), "fit", "--config", str(path))
        assert killed.returncode == -9, killed.stderr
        written.append({file.name: file.stat().st_mtime_ns for file in pieces.calibrated.iterdir()})
    assert [len(files) for files in written] == [1, 2] and written[0].items() < written[1].items()
    for name in ("x", "whole"):
        last = in_fork("-m", "qpruner", "fit", "--config", str(path), "--run.name", name)
        assert last.returncode == 0, last.stderr
    assert not pieces.calibrated.exists()
    trained, expected = adapters(pieces.path), adapters(whole.path)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())
    for name in ("plan.json", "model.safetensors", "adapter/adapter_model.safetensors"):
        assert (pieces.model / name).read_bytes() == (whole.model / name).read_bytes()
    kept = ("name", "parameters", "tensor_bytes", "average_bits", "results")
    assert [[row[key] for key in kept] for row in stages(pieces.path)] == [
        [row[key] for key in kept] for row in stages(whole.path)
    ]
    assert [folder.log.read_text().count("linears by text") for folder in (pieces, whole)] == [1, 1]


@pytest.mark.slow
def test_two_gloo_ranks_round_as_one(arguments: list[str], tmp_path: Path, one_thread: None) -> None:
    run(["fit", *arguments, "--run.name", "1"])
    two_ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--run.name", "2"]
    done = in_own_process("-m", "qpruner", "fit", *arguments, *two_ranks)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("1", "2"))
    assert one.plan.read_text() == two.plan.read_text() and not two.calibrated.exists()
    alone, shared = (load_file(folder.model / "model.safetensors") for folder in (one, two))
    packed = [name for name, tensor in alone.items() if tensor.dtype == torch.uint8]
    assert alone.keys() == shared.keys() and len(packed) >= 14
    # Sums over micro-batches are added in another order, which decides where a weight lies between two values.
    same = sum(int((alone[name] == shared[name]).sum()) for name in packed)
    assert same / sum(alone[name].numel() for name in packed) > 0.98
    for first, second in zip(stages(one.path), stages(two.path), strict=True):
        assert all(first[key] == second[key] for key in ("name", "parameters", "tensor_bytes", "average_bits"))
        if first["name"] != "recovered":  # two ranks train on batches twice as large
            assert first["results"] == pytest.approx(second["results"], rel=1e-3)


@pytest.mark.slow
def test_a_plan_is_carried_out_with_the_calibration_that_is_configured_and_changes_of_it_are_refused(
    arguments: list[str], tmp_path: Path
) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    for name, value, was in (("rounding.grid", "mse", "neuqi"), ("tokens", "equal", "normed")):
        said = rf"init_args.calibrated.{name}: was {was}, is now {value}"
        with pytest.raises(UserError, match=said):
            run(["fit", *arguments, f"{OPTION}calibrated.{name}", value])
    with pytest.raises(UserError, match=r"init_args.calibrated.rounding.method: was gptq, is now None"):
        run(["fit", *arguments, f"{OPTION}calibrated", "null"])
    run(["fit", *arguments, "--plan", str(folder / "plan.json"), "--run.name", "y"])
    other = tmp_path / "runs" / "y"
    assert (other / "plan.json").read_text() == (folder / "plan.json").read_text()
    assert "of 14 linears by text" in (other / "run.log").read_text()
    assert [(row["name"], row["results"]) for row in stages(other)] == [
        (row["name"], row["results"]) for row in stages(folder)
    ]
    # A plan may have nothing to round by text, as that of a budget may.
    units = [dict.fromkeys(UNITS, Precision("nf4", 4, 64))] * 2
    CompressionPlan.read(folder / "plan.json").with_precision(units).write(tmp_path / "edited.json")
    run(["fit", *arguments, "--plan", str(tmp_path / "edited.json"), "--run.name", "z"])
    assert "Rounded no linear by text" in (tmp_path / "runs" / "z" / "run.log").read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": "7"}, ["bits asks for 7; choose from 1, 2, 3, 4, 5, 6, 8, 16"]),
        ({"group": "48"}, ["has no groups of 48", "32, 64, 128"]),
        ({"formats": "{2: nf4}"}, ["nf4 has no 2 bits. Give 4 bits", "another format"]),
        ({"calibrated.rounding.grid": "minmx"}, ["minmx", "minmax"]),
        ({"calibrated.rounding.damping": "-1"}, ["damping is -1"]),
        ({"calibrated.text.num_sequences": "4"}, ["has 4 sequences of 12 tokens", "Give at least 8 sequences"]),
        ({"calibrated.text.length": "4"}, ["28 tokens decide", "has 43 inputs", "Give at least 12 sequences"]),
        ({"calibrated.text.num_sequences": "49"}, ["asks for 49 sequences of 12 tokens", "enough for 48"]),
        (
            {"bits": "[4, 8]", "formats": "{4: nf4}"},
            ["held in int8 and nf4 alone", "formats of affine, affine-double, symmetric"],
        ),
        ({"bits": "16"}, ["held in dense alone", "leave calibrated out"]),
        (
            {"bits": "null", "budget": "{average_bits: 6.5}", "deciding.widths": "[4, 8]", "formats": "{4: nf4}"},
            ["held in int8 and nf4 alone"],
        ),
    ],
    ids=lambda value: " ".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_before_any_model_is_loaded(
    arguments: list[str], wrong: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments, *(part for name, value in wrong.items() for part in (f"{OPTION}{name}", value))])
    assert all(text in str(caught.value) for text in said), str(caught.value)


def test_a_mistake_ends_the_program_with_status_2_and_without_a_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["qpruner", "fit", *arguments, f"{OPTION}calibrated.text.num_sequences", "4"]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.setattr("qpruner.__main__.quieten", lambda: None)  # for all that this process logs after it
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in said
    assert "qpruner: error: calibrated.text has 4 sequences" in said


def test_text_is_counted_before_anything_is_pruned_where_scores_decide_on_the_widths(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the widths of the dense model then, which no pruning is above."""
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    pruning, quantization = (callback["init_args"] for callback in config["trainer"]["callbacks"])
    pruning["selection"] = {"scope": "global"}
    quantization["calibrated"] = {"text": {**TEXT, "length": 4}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="has 48 inputs and needs as many. Give at least 13 sequences"):
        run(["fit", "--config", str(path)])


def test_a_weight_that_is_not_finite_is_told_before_anything_is_rounded(
    arguments: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        return weights

    base = copy_base(tiny_llama, tmp_path / "base", weights=spoiled)
    monkeypatch.setattr("qpruner.quantization.calibrated.round_weight", None)
    with pytest.raises(UserError, match=r"1 tensors are not, model.layers.1.mlp.up_proj.weight the first. Give an"):
        run(["fit", *arguments, "--model.base", str(base)])
