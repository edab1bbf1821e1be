"""Commands that read files, print, and are done."""

import json
from pathlib import Path

import pytest
import torch
from support.families import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from qpruner.anatomy import architecture_of
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.memory import num_parameters
from qpruner.model_folder import load_compressed, save_base
from qpruner.plan import DENSE, CompressionPlan, Precision

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def plan(base: Path, tmp_path: Path) -> Path:
    """Three layers: two KV groups and half the channels in layer 0, in NF4 and int8; the others whole."""
    dense = CompressionPlan.dense(architecture_of(tiny_config("llama")), None)
    whole = (range(4), range(48))
    made = dense.keeping([((0, 3), range(24)), whole, whole]).with_precision(
        [{"qkv": NF4, "o": INT8, "gate_up": DENSE, "down": NF4}, *(dict(layer.precision) for layer in dense.layers[1:])]
    )
    made.write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_show_tells_what_each_layer_keeps(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "show", str(plan)])
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    assert rows[0] == ["layer", "KV groups", "FFN channels", "qkv", "o", "gate_up", "down"]
    assert rows[2] == ["0", "2 of 4", "24 of 48", "nf4 4/64", "int8 8", "dense 16", "nf4 4/64"]
    assert rows[3] == ["1", "4 of 4", "48 of 48", *["dense 16"] * 4]


def test_diff_names_every_change_and_ends_with_status_1(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["plan", "diff", str(plan), str(plan)])
    assert capsys.readouterr().out == "The plans are equal.\n"
    changed = json.loads(plan.read_text())
    changed["layers"][0] |= {"kv_groups": "0-1", "ffn_channels": "0-9 30"}
    changed["layers"][2]["precision"]["down"] = {"format": "int8", "bits": 8, "group": None}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit) as ended:
        run(["plan", "diff", str(plan), str(tmp_path / "changed.json")])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "layer 0: KV groups 3 no longer kept",
        "layer 0: KV groups 1 kept",
        "layer 0: FFN channels 10-23 no longer kept",
        "layer 0: FFN channels 30 kept",
        "layer 2: down dense 16 becomes int8 8",
    ]


def test_diff_of_plans_for_different_models_is_refused(plan: Path, tmp_path: Path) -> None:
    other = CompressionPlan.dense(architecture_of(tiny_config("llama", intermediate_size=40)), None)
    other.write(tmp_path / "other.json")
    with pytest.raises(UserError, match="models of different shapes: ffn_channels"):
        run(["plan", "diff", str(plan), str(tmp_path / "other.json")])


def test_check_states_what_is_left_and_its_bytes(plan: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "check", str(plan), "--base", str(base)])
    said = capsys.readouterr().out
    # Heads of 16, two queries to a group: a KV group is 6 x 16 rows and columns of 64; a channel is 3 of 64.
    gone = 64 * (2 * 16 * 6 + 24 * 3)
    dense = num_parameters(tiny_model("llama"))
    assert f"It takes {dense:,} to {dense - gone:,} parameters, {2 * dense:,} to {2 * (dense - gone):,} bytes" in said
    nf4 = lambda weights: weights // 2 + 4 * -(-weights // 64)  # noqa: E731
    layer_0 = nf4(64 * 64) + 2 * nf4(32 * 64) + (64 * 64 + 4 * 64) + 2 * 2 * (24 * 64) + nf4(24 * 64)
    others = 2 * 2 * 64 * (2 * 128 + 2 * 64 + 3 * 48)
    assert f"{layer_0 + others:,} in the decoder linears" in said
    tiny_model("qwen3").save_pretrained(base)
    with pytest.raises(UserError, match="for another model: model_type"):
        run(["plan", "check", str(plan), "--base", str(base)])


def test_ratios_are_listed_without_weights(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "model.safetensors").unlink()
    run(["plan", "ratios", str(base), "--step", "0.2", "--leave-alone", "0"])
    lines = capsys.readouterr().out.splitlines()
    total = num_parameters(tiny_model("llama"))
    assert lines[0] == f"{base} has {total:,} parameters. It can be pruned to:"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert len(rows) >= 2
    for ratio, parameters, *_ in rows:
        assert 0 <= 1 - int(parameters.replace(",", "")) / total - float(ratio) < 1e-4  # never above the highest
    run(["plan", "ratios", str(base), "--step", "0.2"])
    highest = capsys.readouterr().out.splitlines()[-1].strip("| ")
    assert highest.startswith("0.6934 ")  # of 0.69347
    with pytest.raises(UserError, match="--step is 2.0"):
        run(["plan", "ratios", str(base), "--step", "2"])


def test_merge_gives_a_dense_copy_of_the_same_function(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "run.name": "x",
        "run.dir": str(tmp_path),
        "model.base": str(tiny_llama),
        "model.lora.r": 2,
        "model.optimizer.lr": 0.05,
        "data": "StoriesDataModule",
        "data.num_train": 24,
        "data.num_validation": 2,
        "data.num_test": 4,
        "data.num_choices": 0,
        "data.max_length": 24,
        "trainer.callbacks+": "MixedPrecisionQuantization",
        "trainer.callbacks.bits": "[4, 8]",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 3,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    run(["fit", *(f"--{name}={value}" for name, value in options.items())])
    recovered = read_json(tmp_path / "x" / "summary.json")["stages"][-1]
    capsys.readouterr()
    run(["merge", str(tmp_path / "x"), str(tmp_path / "merged")])
    said = capsys.readouterr().out
    assert f"{recovered['results']['perplexity']:.4f} with adapters beside their base" in said
    tokens = torch.randint(0, 2048, (2, 9))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    with torch.no_grad():
        packed = load_compressed(tmp_path / "x" / "model")(input_ids=tokens).logits
        dense = merged.float()(input_ids=tokens).logits
    assert (dense - packed).norm() / packed.norm() < 0.01  # what rounding to bfloat16 costs
    with pytest.raises(UserError, match="is there already"):
        run(["merge", str(tmp_path / "x"), str(tmp_path / "merged")])
    with pytest.raises(UserError, match="There is no folder"):
        run(["merge", str(tmp_path / "nothing"), str(tmp_path / "elsewhere")])


def test_a_compressed_folder_is_a_base_that_can_be_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model.config)
    plan = CompressionPlan.dense(architecture, None)
    save_base(tmp_path / "model", model, plan, base_name="x", tokenizer=None)
    run(["plan", "ratios", str(tmp_path / "model")])
    assert f"has {num_parameters(model):,} parameters" in capsys.readouterr().out
