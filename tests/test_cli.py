"""The command line as a person uses it: in this process where it is the same, in one of its own where it is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from support.forks import in_fork
from support.runs import KILL_AT, adapters, in_own_process

from qpruner.cli import QPrunerCLI
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.records.report import scalars


def test_fit_leaves_a_whole_run_and_repeating_it_does_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["fit", *arguments])
    folder = tmp_path / "runs" / "x"
    printed = capsys.readouterr().out
    summary = read_json(folder / "summary.json")
    dense, recovered = summary["stages"]
    assert (dense["name"], recovered["name"]) == ("dense", "recovered")
    assert recovered["parameters"] - dense["parameters"] == sum(t.numel() for t in adapters(folder).values())
    assert recovered["results"]["perplexity"] < dense["results"]["perplexity"]
    assert summary["protocol"] == "one document a row, cut at 24 tokens, first token of a row not scored"
    assert f"{recovered['results']['perplexity']:.3f}" in printed and "6 x" not in printed
    assert dense["results"]["tokens"] == 6 * 23
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "loss.png", "manifest.json", "model", "report.md", "run.log",
        "summary.json", "tensorboard",
    }  # fmt: skip
    assert [step for step, _ in scalars(folder / "tensorboard", "train/loss")] == list(range(10))
    assert [step for step, _ in scalars(folder / "tensorboard", "train/tokens_per_second")] == list(range(10))
    assert "Evaluating the dense model" in (folder / "run.log").read_text()
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    run(["fit", *arguments])
    assert f"{recovered['results']['perplexity']:.3f}" in capsys.readouterr().out
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert len(read_json(folder / "manifest.json")["sessions"]) == 1
    # The saved configuration is one that can be given again.
    run(["fit", "--config", str(folder / "config.yaml")])
    with pytest.raises(UserError, match=r"model.lora.r: was 2, is now 4"):
        run(["fit", *arguments, "--model.lora.r", "4"])
    run(["fit", *arguments, "--model.lora.r", "4", "--restart"])
    assert read_json(folder / "summary.json")["stages"][1]["parameters"] > recovered["parameters"]


def test_what_could_not_be_saved_is_told_before_the_run_begins(
    arguments: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "generation_config.json").write_text('{"max_new_tokens": 0}')
    compressing = ["--trainer.callbacks+=MixedPrecisionQuantization", "--trainer.callbacks.bits", "8"]
    with pytest.raises(UserError, match="generation_config.json of .*base' cannot be used"):
        run(["fit", *arguments, "--model.base", str(base), *compressing])
    assert not (tmp_path / "runs").exists()


def test_evaluation_commands_measure_the_base_and_what_the_run_trained(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    run(["test", *arguments])
    (untrained,) = read_json(folder / "test.json")["stages"]
    run(["fit", *arguments])
    fitted = read_json(folder / "summary.json")["stages"]
    assert untrained["results"]["perplexity"] == pytest.approx(fitted[0]["results"]["perplexity"], rel=1e-6)
    run(["test", *arguments])
    stages = read_json(folder / "test.json")["stages"]
    for stage, expected in zip(stages, fitted, strict=True):
        assert stage["name"] == expected["name"] and stage["parameters"] == expected["parameters"]
        assert stage["results"] == pytest.approx(expected["results"], rel=1e-6)
    run(["validate", *arguments])
    dense, recovered = read_json(folder / "validate.json")["stages"]
    assert recovered["results"]["perplexity"] < dense["results"]["perplexity"]
    run(["predict", *arguments])
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [r["row"] for r in records[:6]] == list(range(6)) and [r["example"] for r in records[6:]] == list(range(4))
    assert sum(r["nll"] for r in records[:6]) / sum(r["tokens"] for r in records[:6]) == pytest.approx(
        fitted[1]["results"]["loss"], rel=1e-6
    )
    right = sum(r["option"] == r["gold"] for r in records[6:])
    assert right / 4 == fitted[1]["results"]["accuracy"]
    with pytest.raises(UserError, match="r 2 there, 4 here"):
        run(["test", *arguments, "--model.lora.r", "4"])


def test_report_is_made_again_from_the_folder(arguments: list[str], tmp_path: Path) -> None:
    run(["fit", *arguments])
    report = tmp_path / "runs" / "x" / "report.md"
    text = report.read_text()
    report.unlink()
    run(["report", str(report.parent)])
    assert report.read_text() == text
    with pytest.raises(UserError, match="no fit has measured anything"):
        run(["report", str(tmp_path)])


@pytest.mark.slow  # one kill at each of many moments is in test_killed_runs.py
def test_killed_four_times_and_repeated_equals_uninterrupted(arguments: list[str], tmp_path: Path) -> None:
    """kill -9 while training, in validation, in the middle of writing a checkpoint and before it takes its place."""
    fit = ["fit", *arguments]
    whole = in_fork("-m", "qpruner", *fit, "--run.name", "whole")
    assert whole.returncode == 0, whole.stderr
    for moment, number in (("training", "4"), ("validation", "3"), ("writing", "1"), ("replacing", "2")):
        killed = in_fork(KILL_AT, moment, number, *fit)
        assert killed.returncode == -9, killed.stderr
    last = in_fork("-m", "qpruner", *fit)
    assert last.returncode == 0, last.stderr
    assert "Going on from" in last.stdout + last.stderr
    runs = tmp_path / "runs"
    expected, found = adapters(runs / "whole"), adapters(runs / "x")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for tag in ("train/loss", "val/loss", "val/perplexity"):
        assert scalars(runs / "x" / "tensorboard", tag) == scalars(runs / "whole" / "tensorboard", tag)
    stages = [read_json(runs / name / "summary.json")["stages"] for name in ("whole", "x")]
    assert [s["results"] for s in stages[0]] == [s["results"] for s in stages[1]]
    assert len(read_json(runs / "x" / "manifest.json")["sessions"]) == 5


@pytest.mark.slow
def test_two_gloo_ranks_train_and_report_once(arguments: list[str], tmp_path: Path) -> None:
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.num_train", "40", "--data.num_test", "7"]
    done = in_own_process("-m", "qpruner", "fit", *arguments, *two)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "x"
    summary = read_json(folder / "summary.json")
    assert read_json(folder / "manifest.json")["sessions"][0]["devices"] == "2 x cpu"
    # Seven test rows on two ranks: each once, as on one rank.
    assert [stage["results"]["tokens"] for stage in summary["stages"]] == [7 * 23, 7 * 23]
    alone = ["--data.num_train", "40", "--data.num_test", "7"]
    run(["test", *arguments, *alone])
    for stage, expected in zip(read_json(folder / "test.json")["stages"], summary["stages"], strict=True):
        assert stage["results"] == pytest.approx(expected["results"], rel=1e-6)


def test_seeds_reach_module_and_data(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QPrunerCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = QPrunerCLI(["fit", *arguments, "--seed_everything", "7"])
    assert (cli.model.seed, cli.datamodule.seed) == (7, 7)
    assert cli.run.model is cli.model and cli.run.data is cli.datamodule
    assert cli.trainer_options()["use_distributed_sampler"] is False


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model.lora.rr", "3"], "no option 'model.lora.rr'. Did you mean 'model.lora.r'"),
        (["--model.optimiser.lr", "3"], "Did you mean 'model.optimizer.lr'"),
        (["--data.num_trian", "5"], "no option 'data.num_trian' of StoriesDataModule. Did you mean 'data.num_train'"),
        (["--data", "StoryDataModule"], "no class 'StoryDataModule'. Did you mean 'StoriesDataModule'"),
        (["--data.max_length", "1"], "max_length is 1; a row needs at least 2"),
        (["--model.lora.r", "0"], "lora.r is 0; it must be at least 1"),
        (["--model.optimizer.name", "sgd"], "adamw_8bit"),
        (["--run.name", "a/b"], "run.name is 'a/b'"),
        (["--run.dir", "/dev/null/x"], "Cannot write the run folder"),
        (["--model.base", "./nothing"], "There is no folder './nothing'"),
        (["--config", "nothing.yaml"], "There is no file 'nothing.yaml'"),
    ],
)
def test_mistakes_are_told_in_a_line_before_any_work(
    arguments: list[str], tmp_path: Path, wrong: list[str], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments, *wrong])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4
    assert not (tmp_path / "runs" / "x" / "config.yaml").exists()


def test_an_unknown_key_in_a_file_is_named_with_the_nearest(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["lora"]["alhpa"] = 3
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"model.lora.alhpa'. Did you mean 'model.lora.alpha'"):
        run(["fit", "--config", str(path)])


def test_a_mistake_ends_the_program_with_status_2_and_without_a_traceback(arguments: list[str]) -> None:
    done = in_fork("-m", "qpruner", "fit", *arguments, "--model.lora.rank", "3")
    assert done.returncode == 2
    assert "qpruner: error: There is no option 'model.lora.rank'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_option_of_ours_is_explained(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from qpruner import datamodules

    monkeypatch.setattr(QPrunerCLI, "_run_subcommand", lambda self, subcommand: None)
    for command in ("fit", "validate", "test", "predict"):
        cli = QPrunerCLI([command, *arguments])
        ours = [a for a in cli._parser(command)._actions if a.dest.startswith(("model", "run", "restart"))]
        assert len(ours) > 15
        assert [a.dest for a in ours if not a.help] == []
    for name in datamodules.__all__:
        parser = ArgumentParser()
        parser.add_class_arguments(getattr(datamodules, name))
        unexplained = [a.dest for a in parser._actions if not a.help or a.help == "%(default)s"]
        assert unexplained == []
    assert isinstance(cli.config, Namespace)
