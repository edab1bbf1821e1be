"""Searches of widths and bits together, from the command line: record, kill, warm start, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from support.forks import in_fork
from support.runs import KILL_AT, payload
from transformers import AutoConfig, AutoModelForCausalLM

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy import architecture_of
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.plan import UNITS, CompressionPlan
from qpruner.quantization.formats import precision_of
from qpruner.records.folder import RunFolder
from qpruner.records.search import SearchResults, pareto_front, trials_table, variants_table
from qpruner.search.parts import price_of_plan
from qpruner.search.trial import TrialRunner

TRIALS = 4
DENSE = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
"""Weights of the layers: of queries and outputs, keys and values, and 48 channels of the FFN."""


@pytest.fixture
def config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Four and eight bits, layers of half their width and more; four trials of a step each."""
    pruning = config_that_prunes["trainer"]["callbacks"][0]["init_args"]
    pruning |= {
        "ratio": 0.02,
        "selection": {"scope": "local", "round_to": 4},
        "compensation": "local",
        "compensation_text": {"num_sequences": 16, "length": 12},
    }
    quantization = {
        "allocation": "sensitivity",
        "budget": {"share": 0.4, "multiply_adds": 0.9},
        "deciding": {"granularity": "unit", "calibration": {"num_sequences": 8, "length": 12, "batch_size": 2}},
        "formats": {4: "affine"},
        "group": 32,
        "calibrated": {"text": {"num_sequences": 16, "length": 12}},
    }
    callbacks = config_that_prunes["trainer"]["callbacks"]
    callbacks.append({"class_path": "MixedPrecisionQuantization", "init_args": quantization})
    search = {"trials": TRIALS, "steps": 1, "finalists": 1, "finalist_seeds": 1, "structure": {"least": 0.5}}
    return {**config_that_prunes, "search": search}


@pytest.fixture
def changed(config: dict[str, Any], tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a run whose configuration is changed first."""

    def arguments(change: Callable[[dict[str, Any]], object]) -> list[str]:
        content = yaml.safe_load(yaml.safe_dump(config))
        change(content)
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["--config", str(path)]

    return arguments


def finished(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The keys and scores of the trials in a ledger, without their seconds."""
    keys, scores = {}, {}
    for entry in map(json.loads, path.read_text().splitlines()[1:]):
        if entry["record"] == "started":
            keys[entry["trial"]] = entry["key"]
        elif entry["record"] == "finished":
            scores[entry["trial"]] = {name: value for name, value in entry["scores"].items() if name != "seconds"}
    return [(keys[number], scores[number]) for number in sorted(scores)]


def test_a_search_of_widths_and_bits_records_what_it_tried_and_its_plan_is_carried_out(
    arguments: list[str], changed: Callable[..., list[str]], tmp_path: Path, tiny_llama: Path, capsys: Any
) -> None:
    run(["search", *arguments])
    folder = RunFolder(tmp_path / "runs" / "x")
    results = SearchResults.read(folder.results)
    assert results.parts == tuple(f"layer {n} {kind}" for n in (0, 1) for kind in ("kv_groups", "ffn_channels"))
    assert results.units == (2, 48, 2, 48)
    assert len(results.trials) == TRIALS and len({(one.units, one.choices) for one in results.trials}) == TRIALS
    assert len({one.units for one in results.trials}) > 1
    for one in results.trials:
        assert one.scores["multiply_adds"] <= 0.9 * DENSE
        groups, channels = (sum(one.units[kind::2]) for kind in (0, 1))
        assert one.scores["multiply_adds"] == groups * (2 * 16 * 32 + 2 * 8 * 32) + channels * 3 * 32
    # The first trial is where the search starts, and the rows that nobody searched for are as wide.
    assert {one.name for one in results.variants} >= {"uniform", "mutual information", "sensitivity"}
    unsearched = [one for one in results.variants if not one.name.startswith("trial")]
    assert {one.units for one in unsearched} == {results.trials[0].units}
    assert next(one for one in unsearched if one.name == "sensitivity").choices == results.trials[0].choices
    assert len({*next(one for one in unsearched if one.name == "uniform").choices}) == 1
    report, printed = folder.report.read_text(), capsys.readouterr().out
    assert variants_table(results) in report and variants_table(results) in printed
    assert "multiply-adds | " in report and f"{results.winner.scores['multiply_adds']:,}" in report
    assert "and 90.0 % of the multiply-adds of the dense decoder linears" in report
    assert "µs a token, 256 at once" in report
    speeds = read_json(folder.structure / "speeds.json")["seconds"]
    # Plans of the front hold what was tried.
    by_name = {one.name: one for one in results.trials}
    for row in read_json(folder.pareto):
        plan = CompressionPlan.read(folder.path / row["plan"])
        units = [len(kept) for layer in plan.layers for kept in (layer.kv_groups, layer.ffn_channels)]
        assert tuple(units) == by_name[row["name"]].units
        linears = [
            f"{shape} {layer.precision[unit]}"
            for layer, groups, channels in zip(plan.layers, units[::2], units[1::2], strict=True)
            for unit, shapes in {
                "qkv": [f"{16 * groups} x 32", *[f"{8 * groups} x 32"] * 2],
                "o": [f"32 x {16 * groups}"],
                "gate_up": [f"{channels} x 32"] * 2,
                "down": [f"32 x {channels}"],
            }.items()
            for shape in shapes
        ]
        for place, (tokens, seconds) in enumerate(by_name[row["name"]].seconds.items()):
            assert seconds == pytest.approx(sum(speeds[name][place] for name in linears) / int(tokens))
    # A fit of the winner, by a configuration that has no search, has exactly its bytes.
    fit = changed(lambda content: (content.pop("search"), content["trainer"]["callbacks"].pop()))
    run(["fit", *fit, "--run.name", "fitted", "--plan", str(folder.plan)])
    fitted = RunFolder(tmp_path / "runs" / "fitted")
    assert CompressionPlan.read(fitted.plan) == CompressionPlan.read(folder.plan)
    stored = [payload(fitted.model / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors")]
    assert sum(stored) == results.winner.num_bytes
    run(["plan", "check", str(folder.plan), "--base", str(tiny_llama)])
    assert f"A token costs {results.winner.scores['multiply_adds']:,} multiply-adds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("searches_widths", "affordable"),
    [
        pytest.param(True, 1, marks=pytest.mark.slow, id="widths"),
        pytest.param(False, 4, id="bits"),
        # Below four bits with the highest rank in all layers.
        pytest.param(False, 2, marks=pytest.mark.slow, id="low"),
    ],
)
def test_ranks_of_adapters_are_searched_and_carried_out(
    changed: Callable[..., list[str]], tmp_path: Path, tiny_llama: Path, searches_widths: bool, affordable: int
) -> None:
    """The fit of the winner has its bytes, and PEFT alone gives the adapters the ranks of its plan."""
    config, lora = AutoConfig.from_pretrained(tiny_llama), LoRAConfig(r=4)
    whole = CompressionPlan.dense(architecture_of(config), None)
    at_four = whole.with_precision([dict.fromkeys(UNITS, precision_of(4, 32, {4: "affine"}))] * 2)
    budget = price_of_plan(config, torch.float32, at_four, lora).total - 6000
    if not searches_widths:
        budget = price_of_plan(config, torch.float32, at_four, replace(lora, r=affordable)).total

    def change(content: dict[str, Any]) -> None:
        content["model"]["lora"]["r"] = 4
        content["trainer"]["callbacks"][1]["init_args"]["budget"] = {"bytes": budget}
        content["search"] |= {"ranks": [1, 4, 2], "trials": 6, "optimizer": "random"}
        if not searches_widths:
            content["search"].pop("structure")
            content["trainer"]["callbacks"].pop(0)

    run(["search", *changed(change)])
    folder = RunFolder(tmp_path / "runs" / "x")
    results = SearchResults.read(folder.results)
    assert results.ranked == (0, 1) and bool(results.parts) == searches_widths
    assert len({one.ranks for one in results.trials}) > 1
    assert {*chain(*(one.ranks for one in results.trials))} <= {1, 2, 4}
    assert all(one.num_bytes <= budget for one in results.trials)
    assert "ranks of adapters" in variants_table(results)
    unsearched = next(one for one in results.variants if one.name == "uniform")
    assert unsearched.ranks == (affordable, affordable)
    lower = {one.name: one for one in results.trials if one.ranks != (4, 4)}
    row = next(row for row in read_json(folder.pareto) if row["name"] in lower)
    tried, plan = lower[row["name"]], CompressionPlan.read(path := folder.path / row["plan"])
    assert tuple(plan.ranks) == tried.ranks
    fit = changed(lambda content: (change(content), content.pop("search")))
    run(["fit", *fit, "--run.name", "fitted", "--plan", str(path)])
    fitted = RunFolder(tmp_path / "runs" / "fitted")
    assert CompressionPlan.read(fitted.plan) == plan
    stored = [payload(fitted.model / name) for name in ("model.safetensors", "adapter/adapter_model.safetensors")]
    assert sum(stored) == tried.num_bytes
    base = AutoModelForCausalLM.from_pretrained(fitted.model, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(base, fitted.model / "adapter")
    for number, rank in enumerate(plan.ranks):
        layer = adapted.get_base_model().model.layers[number].self_attn.q_proj
        assert len(layer.lora_A["default"].weight) == rank and layer.scaling["default"] == lora.alpha / lora.r


@pytest.mark.slow
def test_killed_and_continued_equals_uninterrupted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second trial; scores, sums and sensitivities are not made again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pieces, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "whole"))
    killed = in_fork(KILL_AT, "trial", "2", "search", *arguments)
    assert killed.returncode == -9, killed.stderr
    files = ("structure/*.safetensors", "prior/**/*.json", "prior/**/*.safetensors")
    kept = [path for pattern in files for path in pieces.path.glob(pattern)]
    assert any((pieces.structure / "columns").iterdir())
    assert {path.name for path in kept} >= {"scores.safetensors", "sums-000.safetensors", "sums-001.safetensors"}
    times = {path: path.stat().st_mtime_ns for path in kept}
    ran: list[dict[str, Any]] = []
    call = TrialRunner.__call__
    monkeypatch.setattr(TrialRunner, "__call__", lambda runner, key: (ran.append(key), call(runner, key))[1])
    run(["search", *arguments])
    assert ran[: TRIALS - 1] == [key for key, _ in finished(pieces.ledger)][1:]
    assert times == {path: path.stat().st_mtime_ns for path in kept}
    assert not (pieces.structure / "columns").exists()  # the search is finished
    run(["search", *arguments, "--run.name", "whole"])
    for part in ("ledger", "variants"):
        assert finished(getattr(pieces, part)) == finished(getattr(whole, part))
    assert pieces.plan.read_text() == whole.plan.read_text()


@pytest.mark.slow
def test_a_plan_is_among_the_first_that_are_tried(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["search", *arguments, "--search.trials", "1"])
    known = RunFolder(tmp_path / "runs" / "x")
    plan = CompressionPlan.read(known.plan)
    dense = CompressionPlan.dense(plan.architecture, plan.base_sha256)
    learned = dense.keeping([((1,), range(20, 48)), (plan.layers[1].kv_groups, plan.layers[1].ffn_channels)])
    eight = precision_of(8, 32, {})
    learned = learned.with_precision([dict.fromkeys(UNITS, eight), *(layer.precision for layer in plan.layers[1:])])
    learned.write(path := tmp_path / "learned.json")
    start = [*arguments, "--search.structure.start", str(path), "--run.name", "warm", "--search.trials", "2"]
    plans: list[CompressionPlan] = []
    plan_of = TrialRunner.plan_of
    monkeypatch.setattr(TrialRunner, "plan_of", lambda runner, key: (plans.append(plan_of(runner, key)), plans[-1])[1])
    run(["search", *start])
    first, second = SearchResults.read(RunFolder(tmp_path / "runs" / "warm").results).trials
    assert first.units == (1, 28, *SearchResults.read(known.results).trials[0].units[2:])
    assert first.choices[:4] == (1, 1, 1, 1)
    assert second.units == SearchResults.read(known.results).trials[0].units
    # It has the very units of that plan in layer 0, where both parts keep as many.
    assert (plans[0].layers[0].kv_groups, plans[0].layers[0].ffn_channels) == ((1,), tuple(range(20, 48)))


@pytest.mark.slow
def test_a_front_trades_loss_bytes_and_multiply_adds_of_widths_and_bits(arguments: list[str], tmp_path: Path) -> None:
    run(["search", *arguments, "--search.front", "true", "--search.trials", "6"])
    folder = RunFolder(tmp_path / "runs" / "x")
    results = SearchResults.read(folder.results)
    assert len({one.num_bytes for one in results.trials}) > 3 and len({one.units for one in results.trials}) > 1
    front = read_json(folder.pareto)
    assert [row["name"] for row in front] == [one.name for one in pareto_front(results.trials)]
    assert all(first["bytes"] <= second["bytes"] for first, second in pairwise(front))
    by_name = {one.name: one for one in results.trials}
    assert [row["multiply_adds"] for row in front] == [by_name[row["name"]].multiply_adds for row in front]
    assert trials_table(results) in folder.report.read_text()


@pytest.mark.slow
def test_two_workers_try_what_one_tries(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    random = [*arguments, "--search.optimizer", "random"]
    run(["search", *random, "--run.name", "one"])
    workers = ["--search.executor.kind", "processes", "--search.executor.workers", "2"]
    run(["search", *random, "--run.name", "two", *workers])
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("one", "two"))
    assert finished(one.ledger) == finished(two.ledger) and len(finished(one.ledger)) == TRIALS


def without_pruning(content: dict[str, Any]) -> None:
    content["trainer"]["callbacks"].pop(0)


def with_budget(**budget: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["trainer"]["callbacks"][1]["init_args"]["budget"] = budget

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_pruning, "search.structure asks which units stay, and trainer.callbacks has no callback that prunes"),
        (
            with_budget(share=0.01),
            r"The cheapest plan, with search\.structure\.least 0\.5 and every unit .* has [\d,]+",
        ),
        (
            with_budget(share=0.4, multiply_adds=0.3),
            r"narrowest structure with search\.structure\.least 0\.5 has [\d,]+",
        ),
        (with_budget(average_bits=5), "bits per weight say nothing of size. Give share or bytes"),
        (
            lambda content: content["search"]["structure"].update(start="nowhere.json"),
            r"'nowhere\.json'.* Correct the file, or give the plan\.json",
        ),
        (lambda content: content["model"]["lora"].update(r=12), "LoRA rank 12 is above that of .*, which is 8"),
    ],
)
def test_what_cannot_be_searched(change: Callable[[Any], None], said: str, changed: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=said):
        run(["search", *changed(change)])


@pytest.mark.parametrize("command", ["fit", "search"])
def test_a_budget_of_multiply_adds_where_nothing_prunes_by_it_is_refused(
    command: str, changed: Callable[..., list[str]]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["search"].pop("structure")
        if command == "fit":
            content.pop("search")

    with pytest.raises(UserError, match=r"budget\.multiply_adds is 0\.9, and .* bits alone, which change no multiply"):
        run([command, *changed(change)])
