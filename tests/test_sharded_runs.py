"""Runs from the command line whose model is split among devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.runs import NAMES, QUANTIZATION, SPOIL_ON_RANK, in_own_process, stages

from qpruner.adapter_files import ADAPTER_WEIGHTS
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.records.folder import RunFolder
from qpruner.training.compressible import CompressibleModule

SPLIT = ["--trainer.strategy", "ModelParallelStrategy", "--trainer.devices", "2"]


@pytest.fixture
def arguments(config: dict[str, Any], tmp_path: Path) -> list[str]:
    """Pruned and quantized, with uneven adapters."""
    pruning = {"ratio": 0.1, "calibration": {"num_sequences": 6, "length": 8}, "compensation": "none"}
    callbacks = [{"class_path": "StructuredPruning", "init_args": pruning}, QUANTIZATION]
    config["trainer"]["callbacks"] = callbacks
    config["trainer"] |= {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": 4}
    config["model"]["lora"] = {"r": 3}
    config["data"]["init_args"]["loader"] = {"batch_size": 2}
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


@pytest.mark.slow
def test_stopped_and_repeated_equals_uninterrupted_ddp(arguments: list[str], tmp_path: Path) -> None:
    """A loss of one rank that is no number stops both; the next session goes on from the checkpoint."""
    spoiled = in_own_process(SPOIL_ON_RANK, "fit", *arguments, *SPLIT, env={"SPOILED_RANK": "1", "SPOILED_STEP": "6"})
    assert spoiled.returncode == 2 and "Traceback" not in spoiled.stderr, spoiled.stderr
    assert "error: The training loss of optimizer step 6 is not finite" in spoiled.stderr
    split, whole = (RunFolder(tmp_path / "runs" / name) for name in ("x", "ddp"))
    assert not split.finished
    for options in (SPLIT, ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--run.name", "ddp"]):
        done = in_own_process("-m", "qpruner", "fit", *arguments, *options)
        assert done.returncode == 0, done.stderr
    assert split.finished and "Going on from" in split.log.read_text()
    assert (split.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    found, expected = (load_file(folder.model / ADAPTER_WEIGHTS) for folder in (split, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # micro-batches are added in another order
    rows = [stages(folder.path) for folder in (split, whole)]
    assert [row["name"] for row in rows[0]] == NAMES
    for row, other in zip(*rows, strict=True):
        assert all(row[key] == other[key] for key in ("name", "parameters", "tensor_bytes", "average_bits"))
        assert row["results"] == pytest.approx(other["results"], rel=1e-5)
    done = in_own_process("-m", "qpruner", "test", *arguments, *SPLIT)
    assert done.returncode == 0, done.stderr
    measured = read_json(split.test_summary)["stages"]
    assert [row["name"] for row in measured] == ["dense", "quantized", "recovered"]
    assert measured[-1]["results"] == pytest.approx(rows[0][-1]["results"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"callbacks": [{"class_path": "LoRAGuidedPruning", "init_args": {"ratio": 0.1}}]},
            "trainer.callbacks has LoRAGuidedPruning, which scores and masks units across whole layers.*Use ddp",
        ),
        ({"precision": "64-true"}, "precision='64-true'.*32-true, bf16-mixed, bf16-true"),
    ],
)
def test_what_cannot_be_split_is_refused_before_the_model_is_loaded(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(CompressibleModule, "load_base", lambda self: pytest.fail("the model was loaded"))
    config["trainer"] |= {**options, "strategy": "fsdp2"}
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=said):
        run(["fit", "--config", str(path)])


def test_a_plan_is_not_learned_on_a_split_model(config: dict[str, Any], tmp_path: Path) -> None:
    budgeted = {"class_path": "MixedPrecisionQuantization", "init_args": {"budget": {"share": 0.5}}}
    config["trainer"] |= {"callbacks": [budgeted], "strategy": "fsdp2"}
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "joint": {}}))
    with pytest.raises(UserError, match="joint puts gates on whole layers.*Learn the plan with ddp"):
        run(["fit", "--config", str(path)])
