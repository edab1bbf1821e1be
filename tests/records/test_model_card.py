"""The card beside a compressed model: figures, recipe, and a way to load it that works."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.summaries import SUMMARY

from qpruner.compressed import CompressedModel
from qpruner.folder_manifest import Step, read_manifest
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.records.folder import RunFolder
from qpruner.records.model_card import write_model_card
from qpruner.records.report import table


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "small")
    folder.path.mkdir()
    SUMMARY.write(folder.summary)
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    model.prune([([0], list(range(16))), ([0], list(range(12)))])
    plan: CompressionPlan = model.known_plan()
    plan = plan.with_precision([dict.fromkeys(UNITS, Precision("affine", 4, 32))] * len(plan.layers))
    model.quantize(plan, None, device=torch.device("cpu"))
    model.record(Step(name="StructuredPruning", options={"ratio": 0.1}))
    model.keep(folder.model, tokenizer=None)
    return folder


def test_the_card_has_the_figures_and_loads_the_model(run: RunFolder, tiny_llama: Path) -> None:
    write_model_card(run, SUMMARY)
    text = (run.model / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {  # of a base in a folder no name on the hub
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qpruner", "pruning", "quantization", "lora"],
    }
    assert body.startswith("\n# small\n")
    assert f"`{tiny_llama}`, compressed by qpruner: 1 KV groups and 12 to 16 FFN channels in each of its 2 la" in body
    assert table(SUMMARY) in body
    assert "1. `StructuredPruning(ratio=0.1)`" in body
    code = body.split("```python\n")[1].split("```")[0].replace("FOLDER", repr(str(run.model)))
    made: dict[str, Any] = {}
    exec(code.replace("tokenizer = ", "# "), made)
    assert type(made["model"]).__name__ == "CompressedLlamaForCausalLM"
    assert "`modeling_compressed.py` in the folder" in body


@pytest.mark.parametrize(("base", "on_hub"), [("org/model", True), ("qpruner/stories", False), ("./model", False)])
def test_only_models_of_the_hub_are_named_as_such(run: RunFolder, base: str, on_hub: bool) -> None:
    manifest = read_manifest(run.model)
    manifest["base"]["name"] = base
    (run.model / "manifest.json").write_text(json.dumps(manifest))
    write_model_card(run, SUMMARY)
    _, head, _ = (run.model / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head).get("base_model") == (base if on_hub else None)


def test_a_run_without_a_model_has_no_card(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "none")
    folder.path.mkdir()
    SUMMARY.write(folder.summary)
    write_model_card(folder, SUMMARY)
    assert list(tmp_path.rglob("README.md")) == []
