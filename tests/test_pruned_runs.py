"""Runs that prune, from the command line: the row, the folder, the plan, kills and ranks."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from support.figures import texts, widths
from support.forks import in_fork
from support.runs import KILL_AT, RESULTS, adapters, in_own_process

import qpruner
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.plan import CompressionPlan
from qpruner.pruning.compensation import COMPENSATION_TEXT

COMPENSATION = {"compensation": "sequential", "compensation_text": {"num_sequences": 16, "length": 12}}
ASKS = f"{COMPENSATION_TEXT.num_sequences} sequences of {COMPENSATION_TEXT.length} tokens"
TOKENS = COMPENSATION_TEXT.num_sequences * COMPENSATION_TEXT.length
COMPENSATES = [
    "--trainer.callbacks.compensation", "sequential",
    "--trainer.callbacks.compensation_text", "{num_sequences: 16, length: 12}",
]  # fmt: skip


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    return config_that_prunes


def test_a_run_measures_the_pruned_model_and_leaves_one_that_loads_anywhere(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, Figure]
) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    dense, pruned, recovered = read_json(folder / "summary.json")["stages"]
    assert [dense["name"], pruned["name"], recovered["name"]] == ["dense", "pruned", "recovered"]
    plan = CompressionPlan.read(folder / "plan.json")
    assert plan == CompressionPlan.read(folder / "model" / "plan.json")
    gone = sum(  # rows of q, k, v and columns of o; rows of gate and up and columns of down; 32 wide, heads of 8
        32 * (2 - len(layer.kv_groups)) * 8 * (2 + 1 + 1 + 2) + 32 * (48 - len(layer.ffn_channels)) * 3
        for layer in plan.layers
    )
    assert dense["parameters"] - pruned["parameters"] == gone
    assert gone / dense["parameters"] == pytest.approx(0.05, abs=0.002)
    assert dense["results"]["perplexity"] != pruned["results"]["perplexity"]
    assert recovered["results"]["perplexity"] < pruned["results"]["perplexity"]
    groups, channels = pictures["plan.png"].axes
    assert texts(groups) == [f"{len(layer.kv_groups)} of 2" for layer in plan.layers]
    assert widths(channels)[2:] == [len(layer.ffn_channels) / 48 for layer in plan.layers]  # before the grey whole
    assert "](plan.png)" in (folder / "report.md").read_text() and (folder / "plan.png").exists()
    log = (folder / "run.log").read_text()
    assert f"Pruned {dense['parameters']:,} to {pruned['parameters']:,} parameters" in log
    # The same logits in another process; nothing is read that could run code.
    there = in_own_process("-c", RESULTS, str(folder / "model"))
    assert there.returncode == 0, there.stderr
    monkeypatch.setattr(torch, "load", None)
    with torch.no_grad():
        logits = qpruner.load_compressed(folder / "model")(input_ids=torch.arange(20).view(2, 10)).logits
    assert there.stdout.split()[-1] == hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def test_test_measures_all_three_stages_again(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    run(["test", *arguments])
    fitted, tested = (read_json(folder / name)["stages"] for name in ("summary.json", "test.json"))
    for stage, expected in zip(tested, fitted, strict=True):
        assert stage["name"] == expected["name"] and stage["parameters"] == expected["parameters"]
        assert stage["results"] == pytest.approx(expected["results"], rel=1e-6)
    run(["predict", *arguments])
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("scope", "kills"),
    [
        pytest.param({"scope": "local"}, [("training", "1"), ("training", "4")], marks=pytest.mark.slow),
        pytest.param({"scope": "global"}, [("keeping", "1")], marks=pytest.mark.slow),
        pytest.param({"scope": "global", "uniform": True}, [("scoring", "1")], marks=pytest.mark.slow),
    ],
    ids=["local", "global", "uniform"],
)
def test_killed_and_repeated_equals_uninterrupted(
    config: dict[str, Any], tmp_path: Path, scope: dict[str, Any], kills: list[tuple[str, str]]
) -> None:
    """What was kept is taken from the folder, compensated as it is; what was scored and not kept is scored again."""
    config["trainer"]["callbacks"][0]["init_args"] |= {"selection": scope} | COMPENSATION
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    whole = in_fork("-m", "qpruner", "fit", "--config", str(path), "--run.name", "whole")
    assert whole.returncode == 0, whole.stderr
    for moment, number in kills:
        killed = in_fork(KILL_AT, moment, number, "fit", "--config", str(path))
        assert killed.returncode == -9, killed.stderr
    last = in_fork("-m", "qpruner", "fit", "--config", str(path))
    assert last.returncode == 0, last.stderr
    runs = tmp_path / "runs"
    assert (runs / "x" / "plan.json").read_text() == (runs / "whole" / "plan.json").read_text()
    found = adapters(runs / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in adapters(runs / "whole").items())
    stages = [read_json(runs / name / "summary.json")["stages"] for name in ("whole", "x")]
    assert [(s["name"], s["results"]) for s in stages[0]] == [(s["name"], s["results"]) for s in stages[1]]
    weights = Path("model", "model.safetensors")
    assert (runs / "x" / weights).read_bytes() == (runs / "whole" / weights).read_bytes()
    scored = 2 if kills[0][0] == "keeping" else 1
    log = (runs / "x" / "run.log").read_text()
    assert log.count("Pruned ") == log.count("Compensated ") == scored


@pytest.mark.slow  # `test_two_gloo_ranks_quantize_as_one` prunes, too
def test_two_gloo_ranks_make_the_plan_of_one(arguments: list[str], tmp_path: Path) -> None:
    for devices, begin in (("1", in_fork), ("2", in_own_process)):
        options = ["--trainer.strategy", "ddp", "--trainer.devices", devices, "--run.name", devices]
        done = begin("-m", "qpruner", "fit", *arguments, *options)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("1", "2"))
    assert (one / "plan.json").read_text() == (two / "plan.json").read_text()
    stages = [read_json(folder / "summary.json")["stages"] for folder in (one, two)]
    for alone, shared in zip(*stages, strict=True):
        assert alone["parameters"] == shared["parameters"]
        if alone["name"] != "recovered":  # two ranks train on batches twice as large
            assert alone["results"] == pytest.approx(shared["results"], rel=1e-6)


def test_a_given_plan_replaces_what_was_configured(
    arguments: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    plan = CompressionPlan.read(folder / "plan.json")
    edited = plan.keeping([([0], range(20)), (range(len(plan.layers[1].kv_groups)), range(30))])
    edited.write(tmp_path / "edited.json")
    given = ["--plan", str(tmp_path / "edited.json"), "--run.name", "y"]
    run(["fit", *arguments, *given])
    log = (tmp_path / "runs" / "y" / "run.log").read_text()
    assert "replaces StructuredPruning(ratio=0.05, criterion='param_first', " in log
    assert CompressionPlan.read(tmp_path / "runs" / "y" / "plan.json") == edited
    model = qpruner.load_compressed(tmp_path / "runs" / "y" / "model").get_base_model()
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [20, 30]
    assert "Compensated" not in log
    # Also where nothing was configured, with the default compensation.
    config["trainer"].pop("callbacks")
    config["data"]["init_args"]["num_train"] = -(-TOKENS // 24)  # which are all long enough
    config["trainer"] |= {"max_steps": 1, "val_check_interval": 1}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(tmp_path / "bare.yaml"), "--plan", str(folder / "plan.json"), "--run.name", "z"])
    assert CompressionPlan.read(tmp_path / "runs" / "z" / "plan.json") == plan
    assert f" of 4 linears on {TOKENS:,} tokens" in (tmp_path / "runs" / "z" / "run.log").read_text()
    # Another plan for the same run is refused by name.
    with pytest.raises(UserError, match=r"plan: was .*edited.json, is now"):
        run(["fit", *arguments, "--run.name", "y", "--plan", str(folder / "plan.json")])


def test_changed_pruning_options_are_refused_by_name(arguments: list[str]) -> None:
    run(["fit", *arguments])
    with pytest.raises(UserError, match=r"trainer.callbacks.0.init_args.ratio: was 0.05, is now 0.08") as caught:
        run(["fit", *arguments, "--trainer.callbacks.ratio", "0.08"])
    assert "criterion" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--trainer.callbacks.ratio", "0.9"], "at most 0.1"),
        (["--trainer.callbacks.ratio", "1"], "ratio 1.0"),
        (["--trainer.callbacks.ratio", "-0.1"], "ratio -0.1"),
        (["--trainer.callbacks.ratio", "0"], "ratio 0.0"),
        (["--trainer.callbacks.criterion", "param_frist"], "Did you mean 'param_first'?"),
        (["--trainer.callbacks.criterium", "param_first"], "Did you mean 'trainer.callbacks.criterion'?"),
        (["--trainer.callbacks.selection.scope", "globl"], "Did you mean 'global'?"),
        (["--trainer.callbacks.selection.leave_alone", "[0,1]"], "names every layer"),
        (["--trainer.callbacks.selection.leave_alone", "[7]"], "the model has 0 to 1"),
        (["--trainer.callbacks.compensation", "sequentiel"], "Did you mean 'sequential'?"),
        (["--trainer.callbacks.compensation", "local"], f"{ASKS}; the 24 training rows have 576 tokens"),
        (["--trainer.callbacks.compensation", "local"], "It is the compensation that asks (compensation_text)"),
        (
            [*COMPENSATES, "--trainer.callbacks.compensation_text.length", "3"],
            "Give at least 21 sequences, or use comp",
        ),
        ([*COMPENSATES, "--trainer.callbacks.compensation_text.num_sequences", "3"], "Give at least 5 sequences"),
        (["--plan", "nothing.json"], "Cannot read 'nothing.json'"),
    ],
)
def test_mistakes_are_told_before_any_model_is_loaded(
    arguments: list[str], wrong: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments, *wrong])
    assert said in str(caught.value)


def test_a_plan_for_another_model_is_refused(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    plan = str(tmp_path / "runs" / "x" / "plan.json")
    with pytest.raises(UserError, match="for another model: hidden_size is 32 there and 128 here"):
        run(["fit", *arguments, "--model.base", "qpruner/stories", "--plan", plan, "--run.name", "y"])


def test_a_run_that_failed_before_it_compressed_anything_may_change_its_options(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="999 tokens; the 24 training rows have 576 tokens, enough for 0"):
        run(["fit", *arguments, "--trainer.callbacks.calibration.length", "999"])
    run(["fit", *arguments])


def test_a_pruned_model_is_a_base_like_any_other(arguments: list[str], tmp_path: Path) -> None:
    """Pruning a pruned model again, from its folder."""
    run(["fit", *arguments, "--trainer.callbacks.selection.scope", "global"])
    first = tmp_path / "runs" / "x"
    with pytest.warns(UserWarning, match="without its adapters"):
        run(["fit", *arguments, "--model.base", str(first / "model"), "--run.name", "y"])
    widths = CompressionPlan.read(first / "plan.json").widths
    again = CompressionPlan.read(tmp_path / "runs" / "y" / "plan.json")
    assert again.architecture == widths
    assert sum(again.widths.ffn_channels) <= sum(widths.ffn_channels)
    assert os.path.getsize(tmp_path / "runs" / "y" / "model" / "model.safetensors") < os.path.getsize(
        first / "model" / "model.safetensors"
    )


def test_restart_throws_nothing_away_before_the_options_are_known_to_be_good(
    arguments: list[str], tmp_path: Path
) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    for wrong in (["--trainer.callbacks.ratio", "0.97"], ["--plan", "nothing.json"]):
        with pytest.raises(UserError):
            run(["fit", *arguments, "--restart", *wrong])
    with pytest.raises(UserError, match="lies in the folder of this run"):
        run(["fit", *arguments, "--restart", "--model.base", str(folder / "model")])
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in (".lock", "run.log")}
    assert {path: before[path] for path in after} == after
    run(["fit", *arguments, "--restart", "--plan", str(folder / "plan.json")])  # read before it goes


def test_a_rehearsal_touches_no_run(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments, "--trainer.fast_dev_run", "1"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_goes_on_without_the_dense_model_and_without_its_plan_file(
    config: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """It ends with the weights of the run that the plan came from, compensated as that has them."""
    config["trainer"]["callbacks"][0]["init_args"] |= COMPENSATION
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    base = shutil.copytree(tiny_llama, tmp_path / "dense")
    run(["fit", *arguments, "--run.name", "first"])
    plan = shutil.copy(tmp_path / "runs" / "first" / "plan.json", tmp_path / "given.json")
    fit = ["fit", *arguments, "--model.base", str(base), "--plan", str(plan)]
    killed = in_fork(KILL_AT, "training", "4", *fit)
    assert killed.returncode == -9, killed.stderr
    shutil.rmtree(base)
    Path(plan).unlink()
    run(fit)
    runs, weights = tmp_path / "runs", Path("model", "model.safetensors")
    assert read_json(runs / "x" / "summary.json")["finished"]
    assert (runs / "x" / weights).read_bytes() == (runs / "first" / weights).read_bytes()
    assert (runs / "x" / "run.log").read_text().count("Compensated ") == 1
    (planned,) = read_json(runs / "x" / "manifest.json")["compression"]
    assert {name: planned[name] for name in COMPENSATION} == {
        "compensation": "sequential", "compensation_text": {"num_sequences": 16, "length": 12, "batch_size": 4096}
    }  # fmt: skip


def test_the_manifest_says_how_the_base_was_compressed(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    (pruning,) = read_json(tmp_path / "runs" / "x" / "manifest.json")["compression"]
    assert pruning["callback"] == "StructuredPruning" and pruning["ratio"] == 0.05
    assert pruning["calibration"] == {"num_sequences": 6, "length": 8, "batch_size": 2}
    assert pruning["compensation"] == "none"
