"""Fits, plans and merges of bases that are quantized, bring code of their own, or do not fit their tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.bases import FOUR_BITS, copy_base, save_quantized

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.pretrained import load_tokenizer

CONFIGURATION = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "{model_type}"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
COMPRESSION = [
    {
        "class_path": "StructuredPruning",
        "init_args": {"ratio": 0.05, "criterion": "magnitude_l1", "compensation": "none"},
    },
    {"class_path": "MixedPrecisionQuantization"},
]


def arguments(base: Path, tmp_path: Path, *, callbacks: list[dict[str, Any]] | None = None, **model: Any) -> list[str]:
    """A fit of two steps."""
    config = {
        "run": {"name": "x", "dir": str(tmp_path / "runs")},
        "model": {"base": str(base), "lora": {"r": 2}, **model},
        "data": {
            "class_path": "StoriesDataModule",
            "init_args": {
                "max_length": 24, "num_train": 22, "num_validation": 6, "num_test": 6, "num_choices": 4,
                "loader": {"batch_size": 4},
            },
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": callbacks or [],
        },
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def with_code(base: Path, folder: Path, model_type: str) -> Path:
    """A base whose configuration, model and tokenizer are classes of its own."""
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    tokenizer = read_json(base / "tokenizer_config.json") | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    files = {
        "configuration_own.py": CONFIGURATION.format(model_type=model_type),
        "modeling_own.py": MODELING,
        "tokenization_own.py": TOKENIZATION,
        "tokenizer_config.json": json.dumps(tokenizer),
    }
    return copy_base(
        base, folder, files=files, model_type=model_type, auto_map=auto_map, architectures=["OwnForCausalLM"]
    )


def test_a_base_that_cannot_be_loaded_is_told_before_the_run_folder_is_claimed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", tie_word_embeddings=False)
    for callbacks in ([], COMPRESSION):
        with pytest.raises(UserError, match=r"1 tensor \(lm_head.weight\) missing"):
            run(["fit", *arguments(folder, tmp_path, callbacks=callbacks)])
    assert not (tmp_path / "runs").exists()


def test_a_quantized_base_is_compressed_and_leaves_no_trace(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_quantized(tiny_llama, tmp_path / "base", **FOUR_BITS)
    run(["fit", *arguments(base, tmp_path, callbacks=COMPRESSION)])
    folder = tmp_path / "runs" / "x"
    assert (folder / "run.log").read_text().count(
        "is quantized (bitsandbytes, 4 bits); its weights are made dense"
    ) == 1
    run(["merge", str(folder), str(tmp_path / "merged")])
    for config in (folder / "model" / "config.json", tmp_path / "merged" / "config.json"):
        assert "quantization_config" not in read_json(config)
    capsys.readouterr()
    run(["plan", "check", str(folder / "plan.json"), "--base", str(base)])
    assert "The plan fits" in capsys.readouterr().out


def test_code_of_its_own_reaches_configuration_model_and_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    base = with_code(tiny_llama, tmp_path / "base", "own")
    asked = r"it comes with code of its own. Read that code; if you trust it, give --model.trust_remote_code true"
    with pytest.raises(UserError, match=f"Cannot load a tokenizer from .*base': {asked}"):
        run(["fit", *arguments(base, tmp_path)])
    run(["fit", *arguments(base, tmp_path, trust_remote_code=True)])
    assert read_json(tmp_path / "runs" / "x" / "summary.json")["stages"][1]["name"] == "recovered"
    assert type(load_tokenizer(str(base), trust_remote_code=True)).__name__ == "OwnTokenizer"
    with pytest.raises(UserError, match=f"Cannot load a configuration from .*base': {asked}"):
        run(["plan", "ratios", str(base)])
    with pytest.raises(UserError, match="Models of type 'own' cannot be pruned"):
        run(["plan", "ratios", str(base), "--trust_remote_code"])


def test_a_known_family_with_code_of_its_own_is_compressed(tiny_llama: Path, tmp_path: Path) -> None:
    base = with_code(tiny_llama, tmp_path / "base", "llama")
    run(["fit", *arguments(base, tmp_path, callbacks=COMPRESSION, trust_remote_code=True)])
    run(["test", *arguments(base, tmp_path, callbacks=COMPRESSION, trust_remote_code=True)])
    fitted, tested = (read_json(tmp_path / "runs" / "x" / f"{name}.json")["stages"] for name in ("summary", "test"))
    assert tested[-1]["results"] == pytest.approx(fitted[-1]["results"], rel=1e-6)


def with_tokens(base: Path, folder: Path, *words: str, padding: str | None = None) -> Path:
    """A base whose tokenizer got words that the embedding did not."""
    copy_base(base, folder)
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_tokens(list(words))
    if padding:
        tokenizer.add_special_tokens({"pad_token": padding})
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_that_no_text_has_do_no_harm(tiny_llama: Path, tmp_path: Path) -> None:
    base = with_tokens(tiny_llama, tmp_path / "base", "unheard-of", padding="[PAD]")
    results = []
    for folder in (tiny_llama, base):
        run(["test", *arguments(folder, tmp_path)])  # rows of different lengths, and so padding
        results.append(read_json(tmp_path / "runs" / "x" / "test.json")["stages"][0]["results"])
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_tokens_of_the_data_that_the_model_does_not_know(tiny_llama: Path, tmp_path: Path) -> None:
    base = with_tokens(tiny_llama, tmp_path / "base", "went", "was")
    message = r"The data have the token 2049 \('was'\); .* has 2,050 tokens, and the embedding of the model has 2,048"
    for command in ("fit", "test"):
        with pytest.raises(UserError, match=message):
            run([command, *arguments(base, tmp_path)])
    assert not (tmp_path / "runs" / "x" / "summary.json").exists()
