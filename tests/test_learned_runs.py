"""Runs that learn their plan, from the command line."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.families import logits_of
from support.forks import in_fork
from support.runs import KILL_AT, adapters, in_own_process, payload, stages
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpruner.anatomy import architecture_of, unit_weights
from qpruner.commands import run
from qpruner.datamodules.base import LoaderConfig
from qpruner.datamodules.stories import StoriesDataModule
from qpruner.errors import UserError
from qpruner.joint.learner import Ground, PlanLearner
from qpruner.joint.space import unit_bytes
from qpruner.model_folder import build_skeleton, load_compressed, read_base_config
from qpruner.plan import CompressionPlan
from qpruner.pricing import price
from qpruner.pruning import order
from qpruner.records.folder import RunFolder

TEXT = {"num_sequences": 8, "length": 12, "batch_size": 24}
STEPS = 6
QUANTIZATION = "--trainer.callbacks."
TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Gates over units and two widths, then pruning with compensation, rounding by text and a fit of six steps."""
    pruning = config_that_prunes["trainer"]["callbacks"][0]["init_args"]
    pruning |= {"compensation": "sequential", "compensation_text": TEXT}
    options = {
        "budget": {"share": 0.2},
        "deciding": {"widths": [2, 4]},
        "group": 32,
        "calibrated": {"text": TEXT},
    }
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": options}
    config_that_prunes["trainer"]["callbacks"].append(quantization)
    config_that_prunes["joint"] = {"steps": STEPS, "loss": "kl", "start_rows": 4}
    return config_that_prunes


@pytest.fixture
def arguments(config: dict[str, Any], tmp_path: Path) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def assert_begins_with_the_last_rows(ground: Ground, base: Path) -> None:
    """Those of the last step's batch, whole, with its targets."""
    *_, last = StoriesDataModule(
        tokenizer=str(base), max_length=24, num_train=24, num_validation=6, num_test=6, num_choices=0, seed=0,
        loader=LoaderConfig(batch_size=4),
    ).train_dataloader()  # fmt: skip
    (batch,) = ground.text.batches
    assert batch["input_ids"].tolist() == last["input_ids"].tolist() and batch["input_ids"].shape == (4, 24)
    assert batch["labels"].tolist() == last["labels"].tolist()
    assert (ground.text.num_rows, ground.text.num_scored) == (4, 4 * 23)


def test_a_run_learns_a_plan_within_the_budget_and_carries_it_out(
    arguments: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grounds: list[Ground] = []
    monkeypatch.setattr("qpruner.runs.learning.Ground", lambda *parts: grounds.append(Ground(*parts)) or grounds[-1])
    run(["fit", *arguments])
    assert_begins_with_the_last_rows(grounds[0], tiny_llama)
    folder = RunFolder(tmp_path / "runs" / "x")
    plan = CompressionPlan.read(folder.learned_plan)
    dense = CompressionPlan.dense(plan.architecture, plan.base_sha256)
    limit = int(0.2 * unit_bytes(dense, 2))
    assert 0.9 * limit < unit_bytes(plan, 4) <= limit
    assert CompressionPlan.read(folder.model / "plan.json") == plan
    told = price(build_skeleton(read_base_config(str(tiny_llama))), plan)
    assert payload(folder.model / "model.safetensors") == told.units + told.rest
    assert [row["name"] for row in stages(folder.path)] == [
        "dense", "pruned", "quantized", "quantized + adapters", "recovered",
    ]  # fmt: skip
    assert torch.isfinite(logits_of(load_compressed(folder.model), TOKENS)).all()
    log = folder.log.read_text()
    assert f"Learned a plan of {unit_bytes(plan, 4):,} bytes for the decoder's units, within {limit:,}." in log
    assert not RunFolder(folder.learning).bank.exists()  # as large as the model, and of no use any more
    assert folder.learning_picture.stat().st_size > 10_000
    events = EventAccumulator(str(RunFolder(folder.learning).tensorboard)).Reload()
    assert {"train/loss", "train/kl", "joint/bytes", "joint/entropy"} <= {*events.Tags()["scalars"]}
    assert events.Tags()["images"] == ["joint/layers"]
    RunFolder(folder.learning).bank.mkdir()  # as if the run had been killed right after it wrote the plan
    run(["fit", *arguments])  # again, and nothing is left to do
    assert folder.log.read_text().count("Learned a plan") == 1
    assert not RunFolder(folder.learning).bank.exists()


@pytest.mark.parametrize(
    ("changes", "without_pruning"),
    [
        ({"joint.lifts": "true", "joint.loss": "cross_entropy"}, True),
        pytest.param({"joint.fixed_ratio": "true", "joint.gates": "hypernetwork"}, False, marks=pytest.mark.slow),
        pytest.param(
            {"joint.constraint": "penalty", "joint.estimator": "straight_through"}, False, marks=pytest.mark.slow
        ),
        pytest.param({"joint.lifts": "true", "joint.gates": "layers"}, False, marks=pytest.mark.slow),
    ],
    ids=["precision alone", "fixed ratio", "penalty", "all"],
)
def test_variants_end_within_the_budget(
    config: dict[str, Any], tmp_path: Path, changes: dict[str, str], without_pruning: bool
) -> None:
    if without_pruning:
        del config["trainer"]["callbacks"][0]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path), *(part for name, value in changes.items() for part in (f"--{name}", value))])
    folder = RunFolder(tmp_path / "runs" / "x")
    plan = CompressionPlan.read(folder.learned_plan)
    dense = CompressionPlan.dense(plan.architecture, None)
    assert unit_bytes(plan, 4) <= 0.2 * unit_bytes(dense, 2)
    assert (plan.widths == plan.architecture) == without_pruning
    if "joint.fixed_ratio" in changes:  # 5 % of all parameters, but for the rounding to legal widths
        skeleton = build_skeleton(read_base_config(config["model"]["base"]))
        gone = unit_weights(dense.widths) - unit_weights(plan.widths)
        assert gone / sum(parameter.numel() for parameter in skeleton.parameters()) == pytest.approx(0.05, abs=0.02)
    assert stages(folder.path)[-1]["name"] == "recovered"


@pytest.mark.slow
def test_a_hypernetwork_learns_for_several_budgets(arguments: list[str], tmp_path: Path) -> None:
    run(
        [
            "fit",
            *arguments,
            "--joint.gates",
            "hypernetwork",
            "--joint.further_budgets",
            "[{share: 0.15}, {share: 0.18}]",
        ]
    )
    folder = RunFolder(tmp_path / "runs" / "x")
    plans = [CompressionPlan.read(folder.plans / f"budget-{number}.json") for number in (1, 2)]
    whole = unit_bytes(CompressionPlan.dense(plans[0].architecture, None), 2)
    for plan, share in zip((CompressionPlan.read(folder.learned_plan), *plans), (0.2, 0.15, 0.18), strict=True):
        assert 0.9 * share * whole < unit_bytes(plan, 4) <= share * whole


@pytest.mark.slow
def test_killed_while_it_learns_and_repeated_equals_uninterrupted(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    killed = in_fork(KILL_AT, "learning", "4", "fit", "--config", str(path))
    assert killed.returncode == -9, killed.stderr
    pieces, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    assert RunFolder(pieces.learning).checkpoint.exists() and not pieces.learned_plan.exists()
    for name in ("x", "whole"):
        last = in_fork("-m", "qpruner", "fit", "--config", str(path), "--run.name", name)
        assert last.returncode == 0, last.stderr
    assert "Going on from" in pieces.log.read_text() and "Going on from" not in whole.log.read_text()
    of_gates = [
        torch.load(RunFolder(folder.learning).checkpoint, weights_only=True)["state_dict"] for folder in (pieces, whole)
    ]
    assert of_gates[0].keys() == of_gates[1].keys()
    assert all(torch.equal(of_gates[0][name], tensor) for name, tensor in of_gates[1].items())
    best, of_whole = (
        torch.load(RunFolder(folder.learning).checkpoint, weights_only=True)["best"] for folder in (pieces, whole)
    )
    assert (best["step"], best["loss"]) == (of_whole["step"], of_whole["loss"])
    assert pieces.learned_plan.read_text() == whole.learned_plan.read_text()
    trained, expected = adapters(pieces.path), adapters(whole.path)
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_gloo_ranks_learn_as_one(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(["fit", *arguments, "--run.name", "1", "--data.init_args.loader.batch_size", "4"])
    ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--run.name", "2"]
    done = in_own_process("-m", "qpruner", "fit", *arguments, *ranks, "--data.init_args.loader.batch_size", "2")
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("1", "2"))
    states = [torch.load(RunFolder(run.learning).checkpoint, weights_only=True)["state_dict"] for run in (one, two)]
    for name, values in states[0].items():  # a step of AdamW is 0.02, whatever the size of the gradient
        assert torch.allclose(values, states[1][name], rtol=0, atol=1e-4), name
    assert one.learned_plan.read_text() == two.learned_plan.read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({QUANTIZATION + "budget.share": "0.001"}, ["the cheapest plan takes", "the dearest"]),
        ({QUANTIZATION + "budget.share": "0.9"}, ["the cheapest plan takes", "the dearest"]),
        ({QUANTIZATION + "budget": "null"}, ["within a budget, and there is none", "share: 0.15"]),
        ({QUANTIZATION + "budget": "null", "--trainer.fast_dev_run": "1"}, ["within a budget, and there is none"]),
        ({QUANTIZATION + "deciding.widths": "[2, 7]"}, ["7; choose from"]),
        ({QUANTIZATION + "deciding.leave_alone": "[0]"}, ["deciding.leave_alone is [0]", "selection.leave_alone"]),
        ({"--joint.steps": "0"}, ["joint.steps is 0"]),
        ({"--joint.lr": "-1"}, ["joint.lr is -1"]),
        ({"--joint.start_rows": "0"}, ["joint.start_rows is 0", "at least 1"]),
        ({"--joint.gates": "simple"}, ["simple", "hypernetwork"]),
        ({"--joint.further_budgets": "[{share: 0.1}]"}, ["plain gates are not told the budget"]),
        (
            {"--joint.gates": "hypernetwork", "--joint.further_budgets": "[{share: 0.15}, {average_bits: 3}]"},
            ["further_budgets[1] of joint is 3 bits per weight, whatever is pruned", "Give a share"],
        ),
        (
            {"--joint.gates": "hypernetwork", "--joint.further_budgets": "[{share: 0.15, multiply_adds: 0.7}]"},
            ["further_budgets[0] of joint is 15.0 %", "70.0 % of the multiply-adds", "MixedPrecisionQuantization. Set"],
        ),
        (
            {"--joint.fixed_ratio": "true", QUANTIZATION + "budget.multiply_adds": "0.7"},
            ["joint.fixed_ratio is true", "budget.multiply_adds is 0.7", "Drop one of both"],
        ),
        ({"--joint.lifts": "true", QUANTIZATION + "deciding.widths": "[4, 16]"}, ["deciding.widths offers 16 bits"]),
        ({"--plan": "plan.json"}, ["--plan names 'plan.json'", "joint learns a plan"]),
        ({"--phases": "[{max_steps: 2}]"}, ["Leave --phases out"]),
    ],
    ids=lambda value: (
        " ".join(f"{name[-20:]}={given}" for name, given in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_mistakes_are_told_before_any_model_is_loaded(
    arguments: list[str], wrong: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments, *(part for name, value in wrong.items() for part in (name, value))])
    assert all(text in str(caught.value) for text in said), str(caught.value)


@pytest.mark.parametrize(
    ("budget", "prunes", "said"),
    [
        ({"average_bits": 3}, True, "3 bits per weight, whatever is pruned"),
        ({"share": 0.2, "multiply_adds": 0.8}, False, "budget.multiply_adds is 0.8, and nothing may be pruned"),
        ({"share": 0.2, "multiply_adds": 0.01}, True, "multiply-adds per token.*the narrowest layers have"),
    ],
)
def test_budgets_that_gates_cannot_meet_are_refused(
    config: dict[str, Any], tmp_path: Path, budget: dict[str, float], prunes: bool, said: str
) -> None:
    callbacks = config["trainer"]["callbacks"]
    callbacks[1]["init_args"]["budget"] = budget
    config["trainer"]["callbacks"] = callbacks if prunes else callbacks[1:]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=said):
        run(["fit", "--config", str(path)])


def test_one_width_and_no_pruning_leave_nothing_to_learn(config: dict[str, Any], tmp_path: Path) -> None:
    del config["trainer"]["callbacks"][0]
    config["trainer"]["callbacks"][0]["init_args"]["deciding"]["widths"] = [4]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="nothing to decide.*Add widths to deciding.widths, or StructuredPruning"):
        run(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    ("selection", "rank", "said"),
    [
        ({"uniform": True}, 2, "selection.uniform is true, and joint gives each layer widths of its own. Drop one"),
        ({"leave_alone": [2]}, 2, r"selection.leave_alone names layers \[2\]; the model has 0 to 1"),
        ({"leave_alone": [0, -1]}, 2, "selection.leave_alone names every layer"),
        ({"floor": 0.25}, 9, "LoRA rank 9 is above that of .*k_proj, which is 8. Lower --model.lora.r to at most 8"),
    ],
)
def test_selections_that_gates_cannot_follow_are_refused_before_any_model_is_loaded(
    config: dict[str, Any],
    tmp_path: Path,
    selection: dict[str, Any],
    rank: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    config["trainer"]["callbacks"][0]["init_args"]["selection"] = selection
    config["model"]["lora"]["r"] = rank
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=said):
        run(["fit", "--config", str(path)])


def test_lifts_without_a_known_order_of_hidden_channels_are_refused_before_any_model_is_loaded(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    holders = order._holders
    monkeypatch.setattr(order, "_holders", lambda model: [*holders(model)][:-1])  # as if a family had one linear more
    with pytest.raises(
        UserError, match=r"hidden channels of this compressed_llama .* whether .*down_proj.weight would"
    ):
        run(["fit", *arguments, "--joint.lifts", "true"])


@pytest.mark.slow
def test_layers_left_alone_and_floors_are_kept(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["callbacks"][0]["init_args"]["selection"] = {"leave_alone": [-1], "floor": 0.7}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path), "--trainer.callbacks.budget.share", "0.16"])
    plan = CompressionPlan.read(RunFolder(tmp_path / "runs" / "x").learned_plan)
    dense, widths = plan.architecture, plan.widths
    assert (widths.kv_groups[1], widths.ffn_channels[1]) == (dense.kv_groups[1], dense.ffn_channels[1])
    assert widths.kv_groups[0] >= 0.7 * dense.kv_groups[0] and widths.ffn_channels[0] >= 0.7 * dense.ffn_channels[0]
    assert unit_bytes(plan, 4) <= 0.16 * unit_bytes(CompressionPlan.dense(dense, None), 2)


@pytest.mark.slow
def test_multiply_adds_are_bounded_beside_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["callbacks"][1]["init_args"]["budget"] = {"share": 0.2, "multiply_adds": 0.6}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run(["fit", "--config", str(path)])
    plan = CompressionPlan.read(RunFolder(tmp_path / "runs" / "x").learned_plan)
    dense = CompressionPlan.dense(plan.architecture, None)
    assert unit_weights(plan.widths) <= 0.6 * unit_weights(dense.widths)
    assert unit_bytes(plan, 4) <= 0.2 * unit_bytes(dense, 2)


@pytest.mark.parametrize("kind", ["bf16", "16"])
def test_gates_in_half_precision_are_refused_before_anything_is_thrown_away(
    arguments: list[str], tmp_path: Path, kind: str
) -> None:
    before = tmp_path / "runs" / "x" / "learned.json"
    before.parent.mkdir(parents=True)
    before.write_text("of an earlier run")
    with pytest.raises(UserError, match=f"--trainer.precision is {kind}-true, .* too coarse .* Use {kind}-mixed, with"):
        run(["fit", *arguments, "--trainer.precision", f"{kind}-true", "--restart"])
    assert before.read_text() == "of an earlier run"


def test_a_search_learns_nothing(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="joint learns a plan in `qpruner fit`"):
        run(["search", *arguments])


@pytest.mark.parametrize("every", ["2", "50"])  # 50: no checkpoint comes before the end
def test_numbers_that_are_not_finite_end_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    loss = PlanLearner.loss

    def broken(learner: PlanLearner, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, parts = loss(learner, batch)
        return total * (float("nan") if learner.global_step == 2 else 1.0), parts

    monkeypatch.setattr(PlanLearner, "loss", broken)
    said = r"loss at step 3 of the gates is not finite. Lower joint.lr, which is 0.02"
    with pytest.raises(UserError, match=said):
        run(["fit", *arguments, "--run.checkpoint_every_n_steps", every])
    assert not RunFolder(tmp_path / "runs" / "x").learned_plan.exists()


def test_a_restart_learns_anew_and_throws_no_base_away(
    arguments: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "runs" / "x" / "mine"
    shutil.copytree(tiny_llama, base)
    with pytest.raises(UserError, match="--restart would throw away the base"):
        run(["fit", *arguments, "--restart", "--model.base", str(base)])
    assert base.exists()
    folder = RunFolder(tmp_path / "runs" / "y")
    plan = CompressionPlan.dense(architecture_of(read_base_config(str(tiny_llama))), None)
    folder.path.mkdir(parents=True)
    plan.write(folder.learned_plan)  # of an earlier session
    learnt: list[int] = []
    monkeypatch.setattr(PlanLearner, "compare_with_best", lambda learner: learnt.append(learner.global_step))
    with pytest.raises(AssertionError):  # no best gates: it learns again
        run(["fit", *arguments, "--restart", "--run.name", "y"])
    assert learnt and not folder.learned_plan.exists()
