"""Every file in configs/ is a complete run: it parses, its classes can be made, and it trains on a stand-in."""

import json
from pathlib import Path

import pytest

from qpruner.cli import QPrunerCLI, run
from qpruner.files import read_json

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.fixture
def local_data(tmp_path: Path) -> dict[str, list[str]]:
    """What takes the place of hub data, and of what only a large model has, by configuration."""
    records = [{"instruction": f"Name number {n}.", "output": f"It is {n}."} for n in range(300)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(f"The {split} split has words and words. " * 400)
    text = [f"--data.init_args.{split}={tmp_path / split}.txt" for split in ("train", "validation", "test")]
    alpaca = [f"--data.init_args.train={tmp_path / 'alpaca.json'}", "--data.init_args.held_out=0.1"]
    pruning = ["--trainer.callbacks.ratio=0.05", "--trainer.callbacks.calibration.length=8"]
    return {
        "alpaca": alpaca,
        "llm_pruner": [*alpaca, *pruning, "--trainer.callbacks.selection.leave_alone=[-1]"],
        "text": [*text, "--data.init_args.max_length=64"],
        "quickstart": [
            *pruning,
            "--data.num_train=40",
            "--data.num_validation=4",
            "--data.num_test=4",
            "--data.num_choices=2",
        ],
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_on_a_tiny_stand_in(
    path: Path, tiny_llama: Path, tmp_path: Path, local_data: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        [
            "fit",
            f"--config={path}",
            f"--run.dir={tmp_path / 'runs'}",
            f"--model.base={tiny_llama}",
            *local_data[path.stem],
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            "--trainer.limit_val_batches=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == path.stem
    summary = read_json(folder / "summary.json")
    pruned = ["pruned"] if "StructuredPruning" in path.read_text() else []
    assert [stage["name"] for stage in summary["stages"]] == ["dense", *pruned, "recovered"]
    assert all(stage["results"]["perplexity"] > 1 for stage in summary["stages"])


def test_configs_name_what_they_are_for() -> None:
    assert {path.stem for path in CONFIGS} >= {"alpaca", "llm_pruner", "quickstart", "text"}
    assert all(path.read_text().startswith("# ") for path in CONFIGS)
    assert QPrunerCLI.subcommands().keys() == {"fit", "validate", "test", "predict"}
