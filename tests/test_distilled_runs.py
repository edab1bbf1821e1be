"""Runs that learn from the dense model, from the command line: phase after phase, cut off and gone on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.runs import adapters, stages

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.records.folder import RunFolder
from qpruner.records.report import scalars
from qpruner.training import teaching
from qpruner.training.module import LoRAFinetuner


class PowerCut(Exception):
    pass


@pytest.fixture
def config(phased_config: dict[str, Any]) -> dict[str, Any]:
    """Pruning in training, then quantization; the teacher of both phases is recorded."""
    options = {"logits": 1.0, "hidden": 0.5, "cross_entropy": 0.2, "temperature": 1.5, "top_k": 32}
    phased_config["model"]["distillation"] = {**options, "teacher": "recorded"}
    return phased_config


@pytest.mark.slow
def test_the_dense_model_teaches_all_phases_and_says_it_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load, step = teaching.load_teacher, LoRAFinetuner.training_step

    def counted(config: Any, name: str, **options: Any) -> Any:
        loaded.append(name)
        return load(config, name, **options)

    monkeypatch.setattr(teaching, "load_teacher", counted)
    run(["fit", *arguments])
    whole = RunFolder(tmp_path / "runs" / "x")
    assert len(loaded) == 1 and len(list(whole.teacher.iterdir())) == 1  # both phases read the same rows
    for phase in whole.all_phases:
        for name in ("train/loss", "train/kl", "train/hidden"):
            curve = scalars(phase.tensorboard, name)
            first, *others = [value for _, value in curve]
            assert len(others) == 5 and min(others) > 0, name
            if phase.phase == 1 and name != "train/loss":  # nothing is pruned yet, and adapters have no effect
                assert first < 1e-6

    def cut_off(self: LoRAFinetuner, batch: Any, batch_idx: int) -> Any:
        if self.continues_from is not None and self.global_step == 4:  # in the second phase
            raise PowerCut
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LoRAFinetuner, "training_step", cut_off)
        with pytest.raises(PowerCut):
            run(["fit", *arguments, "--run.name", "cut"])
    run(["fit", *arguments, "--run.name", "cut"])
    cut = RunFolder(tmp_path / "runs" / "cut")
    assert len(loaded) == 2
    assert all(torch.equal(adapters(cut.path)[name], tensor) for name, tensor in adapters(whole.path).items())
    assert [row["results"] for row in stages(cut.path)] == [row["results"] for row in stages(whole.path)]


@pytest.mark.slow
def test_options_stand_in_files_and_on_the_command_line(
    arguments: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    online = ["--model.distillation.teacher", "online", "--model.distillation.hidden", "0"]
    run(["fit", *arguments, *online])
    folder = RunFolder(tmp_path / "runs" / "x")
    bound = yaml.safe_load(folder.config.read_text())["model"]["distillation"]
    defaults = {"base": None, "dtype": "auto", "device": None}
    assert bound == {**config["model"]["distillation"], **defaults, "teacher": "online", "hidden": 0.0}
    assert not folder.teacher.exists()
    with pytest.raises(UserError, match="distillation"):  # the folder is bound to them
        run(["fit", *arguments])
    run(["fit", *arguments, *online, "--run.name", "plain", "--model.distillation", "null"])
    assert not scalars(RunFolder(tmp_path / "runs" / "plain").tensorboard, "train/kl")


def test_a_teacher_that_cannot_teach_ends_a_run_before_it_begins(arguments: list[str], tmp_path: Path) -> None:
    for option, said in {
        "temperature=0": "distillation.temperature is 0",
        "base=/nowhere": "'/nowhere', is not there. Give one as --model.distillation.base",
    }.items():
        with pytest.raises(UserError, match=said):
            run(["fit", *arguments, f"--model.distillation.{option}"])
    assert not (tmp_path / "runs" / "x" / "manifest.json").exists()
