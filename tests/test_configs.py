"""Every file in configs/ is a complete run: it parses, its classes can be made, and it trains on a stand-in."""

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.commands import run
from qpruner.files import read_json
from qpruner.memory import num_parameters
from qpruner.model_folder import load_base
from qpruner.plan import CompressionPlan
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.records.search import SearchResults

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


SEARCHES = [path for path in CONFIGS if "\nsearch:\n" in path.read_text()]


LAYERS = {
    **dict.fromkeys(("quickstart", "budget", "low_bits", "loraprune", "search", "joint", "joint_search"), 6),
    **{"llama32_1b": 16, "qwen3_06b": 28},
}
"""Of the models that configurations are for; 32 where nothing is said."""
QUICK = ("quickstart", "text")
"""Configurations that `make test` runs; most others have other numbers, or runs with tests of their own."""


@pytest.fixture
def local_data(tmp_path: Path) -> dict[str, list[str]]:
    """What takes the place of hub data, by configuration."""
    records = [{"instruction": f"Name number {n}.", "output": f"It is {n}. " * 60} for n in range(300)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(f"The {split} split has words and words. " * 400)
    words = [f"wind {number}" for number in range(40)]  # about half of them choose
    questions = {
        "boolq": [{"passage": f"There is {word} today.", "question": f"is there {word}", "label": 1} for word in words],
        "winogrande": [
            {"sentence": f"The {word} came because _ was late.", "option1": word, "option2": "it", "answer": "2"}
            for word in words
        ],
    }
    for task, asked in questions.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "validation.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in asked))
    text = [f"--data.init_args.{split}={tmp_path / split}.txt" for split in ("train", "validation", "test")]
    alpaca = [f"--data.init_args.train={tmp_path / 'alpaca.json'}", "--data.init_args.held_out=0.02"]
    return {path.stem: alpaca for path in CONFIGS} | {
        "qpruner3_llama2_7b_tasks": [*alpaca, f"--data.init_args.tasks.folder={tmp_path}"],
        "text": [*text, "--data.init_args.max_length=64"],
        "budget": ["--data.num_train=350", "--data.num_validation=4", "--data.num_test=4", "--data.num_choices=2"],
        "search": ["--data.num_train=350", "--data.num_validation=4", "--data.num_test=4"],
        "joint_search": ["--data.num_train=350", "--data.num_validation=4", "--data.num_test=4"],
        "loraprune": ["--data.num_train=40", "--data.num_validation=4", "--data.num_test=4", "--data.num_choices=2"],
        "low_bits": [
            *("--data.num_train=90", "--data.num_validation=4", "--data.num_test=4", "--data.num_choices=2"),
            "--trainer.callbacks.calibrated.text.num_sequences=16",
            "--trainer.callbacks.deciding.calibration.num_sequences=2",
        ],
        "joint": [
            *("--data.num_train=400", "--data.num_validation=4", "--data.num_test=4", "--data.num_choices=2"),
            *("--joint.steps=2", "--joint.start_rows=4"),
            *("--trainer.callbacks.calibrated.text.num_sequences=16", "--trainer.callbacks.budget.share=0.2"),
        ],
        "quickstart": ["--data.num_train=350", "--data.num_validation=4", "--data.num_test=4", "--data.num_choices=2"],
    }


SHORT_SCHEDULE = ["--trainer.max_steps=3", "--trainer.callbacks.schedule.every_n_steps=1"]
"""Of pruning in training, with an event before the last."""


def stand_in(folder: Path, layers: int) -> Path:
    """A random Llama of as many layers as the model that a configuration is for, and of no width."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(EMBEDDED).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in QUICK else [pytest.mark.slow])
        for path in CONFIGS
        if path not in SEARCHES
    ],
    ids=lambda path: path.stem,
)
def test_config_runs_on_a_tiny_stand_in(path: Path, tmp_path: Path, local_data: dict[str, list[str]]) -> None:
    prunes_in_training = "LoRAGuidedPruning" in path.read_text()
    run(
        [
            "fit",
            f"--config={path}",
            f"--run.dir={tmp_path / 'runs'}",
            f"--model.base={stand_in(tmp_path / 'model', LAYERS.get(path.stem, 32))}",
            "--model.gradient_checkpointing=false",
            "--model.lora.r=4",  # no more than a layer of no width has channels left
            *local_data[path.stem],
            "--trainer.accelerator=cpu",
            *(SHORT_SCHEDULE if prunes_in_training else ["--trainer.max_steps=1"]),
            "--trainer.accumulate_grad_batches=1",
            "--trainer.limit_val_batches=1",
            "--trainer.limit_test_batches=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == path.stem
    summary = read_json(folder / "summary.json")
    pruned = ["pruned"] if "StructuredPruning" in path.read_text() else []
    quantizes = "class_path: MixedPrecisionQuantization" in path.read_text()
    start = "adapters" if "calibrated:" in path.read_text() else "LoftQ"
    quantized = ["quantized", f"quantized + {start}"] if quantizes else []
    expected = ["dense", *pruned, *quantized, "recovered"]
    if prunes_in_training:
        pruned = ["pruned in training"]
        later = [*quantized, "recovered"] if "phases:" in path.read_text() else []
        expected = ["dense", *pruned, *(f"{name} (phase 2)" for name in later)]
    assert [stage["name"] for stage in summary["stages"]] == expected
    assert all(stage["results"]["perplexity"] > 1 for stage in summary["stages"])
    if pruned and "joint:" not in path.read_text():  # which learns how much goes
        ratio = float(re.search(r"ratio: ([\d.]+)", path.read_text())[1])  # type: ignore[index]
        sizes = {stage["name"]: stage["parameters"] for stage in summary["stages"]}
        dense = sizes["dense"]
        narrow = num_parameters(load_base(folder / "model").network)
        assert narrow == sizes.get("pruned", narrow)
        assert 1 - narrow / dense == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow]) for path in SEARCHES],  # tests of searches run others
    ids=lambda path: path.stem,
)
def test_search_runs_on_a_tiny_stand_in(path: Path, tmp_path: Path, local_data: dict[str, list[str]]) -> None:
    layers = LAYERS.get(path.stem, 32)
    run(
        [
            "search",
            f"--config={path}",
            f"--run.dir={tmp_path / 'runs'}",
            f"--model.base={stand_in(tmp_path / 'model', layers)}",
            "--model.gradient_checkpointing=false",
            "--model.lora.r=4",  # no more than a layer of no width has channels left
            *local_data[path.stem],
            "--trainer.accelerator=cpu",
            "--trainer.accumulate_grad_batches=1",
            "--trainer.limit_val_batches=1",
            "--trainer.enable_progress_bar=false",
            "--search.trials=2",
            "--search.steps=1",
            "--search.finalists=1",
            "--search.finalist_seeds=1",
        ]
    )
    folder = tmp_path / "runs" / path.stem
    results = SearchResults.read(folder / "search.json")
    assert {"boolq/accuracy", "winogrande/accuracy"} <= results.trials[0].scores.keys() or "tasks" not in path.stem
    assert len(results.trials) == 2 and len(results.items) >= layers - 6
    assert results.bits == ((2, 3, 4) if path.stem == "joint_search" else (4, 8))
    assert bool(results.parts) == (path.stem == "joint_search")
    assert CompressionPlan.read(folder / "plan.json").architecture.num_layers == layers


def test_configs_name_what_they_are_for() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "alpaca", "budget", "llama32_1b", "llm_pruner", "loraprune", "loraprune_llama2_7b", "quickstart",
        "qpruner2_llama2_7b_20", "qpruner3_llama2_7b_20", "qpruner3_llama2_7b_tasks",
        "joint_search", "qwen3_06b", "search", "text",
        *(f"qpruner_llama2_7b_{share}" for share in (20, 30, 50)),
    }  # fmt: skip
    assert all(path.read_text().startswith("# ") for path in CONFIGS)
