"""Export to a dense folder of 16 bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exports import source_of
from support.families import KEPT, KEPT_EXPERTS, logits_of, random_tokens
from support.quantized import INT8, NF4
from transformers import AutoModelForCausalLM

from qpruner.dense_copy import merge_run
from qpruner.errors import UserError
from qpruner.export.dense import Dense
from qpruner.export.source import Source
from qpruner.files import read_json
from qpruner.model_folder import load_compressed, read_plan

UNIFORM = [((0, 2), tuple(range(20)))] * 3


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_it_is_the_model_with_its_adapters_rounded_once(tmp_path: Path, family: str) -> None:
    source = source_of(tmp_path / "m", family, kept=KEPT, precision=NF4, embedding=INT8, lora={})
    written = Dense().write(source, tmp_path / "out", torch.bfloat16)
    dense = load_compressed(tmp_path / "out")
    for name, held in dense.named_parameters():
        assert held.dtype == torch.bfloat16
        assert torch.equal(held, source.weight(name).bfloat16()), name
        assert torch.equal(written.read(name), held.float())
    assert written.predicted_bytes == sum(parameter.nbytes for parameter in dense.parameters())
    on_disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written.predicted_bytes < on_disk < written.predicted_bytes + 10_000
    assert written.changes[1].startswith(f"{len(source.adapters)} adapters are in")


def test_ranks_of_adapters_go_with_them(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "llama", lora={})
    ranked = replace(source, plan=source.plan.with_ranks([1, 2, 3]))
    Dense().write(ranked, tmp_path / "out", torch.bfloat16)
    assert read_plan(tmp_path / "out").ranks == [None] * 3


def test_equal_widths_load_without_this_package(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "qwen3", kept=UNIFORM, precision=NF4, lora={}, tie_word_embeddings=True)
    Dense().write(source, tmp_path / "out", torch.float16)
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == "qwen3"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()
    expected = logits_of(load_compressed(tmp_path / "m"), random_tokens())
    assert 0 < (logits_of(model) - expected).norm() / expected.norm() < 0.01


def test_a_tied_head_with_an_adapter_has_a_weight_of_its_own(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", tie_word_embeddings=True, lora={"target_modules": ["lm_head"]})
    Dense().write(source, tmp_path / "out", torch.bfloat16)
    again = Source.read(tmp_path / "out")
    assert not again.tied
    assert torch.equal(again.weight("lm_head.weight"), source.weight("lm_head.weight").bfloat16().float())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"precision": NF4, "embedding": INT8}),
        ("gemma2", {"precision": INT8, "embedding": INT8, "tie_word_embeddings": True}),
        ("gpt2", {}),
        ("llama", {"tie_word_embeddings": True, "lora": {"target_modules": ["lm_head", "q_proj"]}}),
        ("mixtral", {"precision": NF4, "kept": KEPT_EXPERTS}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_merge_of_the_run_gives_the_same_tensors(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    source = source_of(tmp_path / "m", family, **{"kept": KEPT, "lora": {}, **changes})
    Dense().write(source, tmp_path / "exported", torch.bfloat16)
    merge_run(tmp_path / "m", tmp_path / "merged", "bfloat16")
    exported, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "merged"))
    assert exported.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in exported.items())
    for name in source.adapters:
        base, held = (source.base(f"{name}.weight"), exported[f"{name}.weight"].float())
        assert not torch.equal(held, base.bfloat16().float()), name
    configs = (read_json(tmp_path / name / "config.json") for name in ("exported", "merged"))
    assert next(configs) == next(configs)


def test_what_float16_cannot_hold_is_told(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m")
    with torch.no_grad():
        source.network.lm_head.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"in float16, lm_head.weight hold values .* --dtype bfloat16"):
        Dense().write(source, tmp_path / "out", torch.float16)
