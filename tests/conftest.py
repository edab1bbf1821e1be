"""Small real things to test with: a random Llama that takes milliseconds, and stories to feed it."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
import yaml
from matplotlib.figure import Figure
from support.runs import QUANTIZATION
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.records.pictures import save_figure

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # in models as small as these a second thread only waits


@pytest.fixture(autouse=True)
def _own_cache_and_seed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads what another or the user left behind; all of them share the tokens of this session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    # Where transformers keeps code that comes with a model: a package, which Python imports once from one place.
    modules = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setenv("HF_MODULES_CACHE", modules)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    # A fit without a folder of its own keeps its base under the working directory.
    # Not `mktemp`, which counts the folders of all tests before.
    bases = tmp_path_factory.getbasetemp() / "bases"
    bases.mkdir(exist_ok=True)
    monkeypatch.setattr("qpruner.training.compressible.BASES", mkdtemp(dir=bases))
    # Only a machine that loses its power forgets what was not synchronized, and waiting for the disk takes long.
    monkeypatch.setattr(os, "fsync", lambda file: None)
    torch.manual_seed(0)
    yield
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, width 32, 4 heads on 2 key-value heads) and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(EMBEDDED).save_pretrained(folder)
    return folder


@pytest.fixture
def stories(tiny_llama: Path) -> StoriesDataModule:
    """Five training batches an epoch, and a little to validate and test on."""
    return StoriesDataModule(
        tokenizer=str(tiny_llama),
        max_length=24,
        num_train=22,
        num_validation=6,
        num_test=6,
        num_choices=4,
        loader=LoaderConfig(batch_size=4, eval_tokens_per_batch=96),
    )


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved from now on, by the names of their files."""
    figures: dict[str, Figure] = {}

    def keep_and_save(figure: Figure, path: Path) -> None:
        figures[path.name] = figure
        save_figure(figure, path)

    for module in ("report", "search"):
        monkeypatch.setattr(f"qpruner.records.{module}.save_figure", keep_and_save)
    return figures


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    """A fit of ten steps that takes a second."""
    return {
        "run": {"name": "x", "dir": str(tmp_path / "runs"), "checkpoint_every_n_steps": 2},
        "model": {"base": str(tiny_llama), "lora": {"r": 2}, "optimizer": {"lr": 0.01}},
        "data": {
            "class_path": "StoriesDataModule",
            "init_args": {
                "max_length": 24,
                "num_train": 22,
                "num_validation": 6,
                "num_test": 6,
                "num_choices": 4,
                "loader": {"batch_size": 4},
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.fixture
def config_that_prunes(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    """Pruning and a fit of six steps."""
    return {
        "run": {"name": "x", "dir": str(tmp_path / "runs"), "checkpoint_every_n_steps": 2},
        "model": {"base": str(tiny_llama), "lora": {"r": 2}, "optimizer": {"lr": 0.01}},
        "data": {
            "class_path": "StoriesDataModule",
            "init_args": {
                "max_length": 24,
                "num_train": 24,
                "num_validation": 6,
                "num_test": 6,
                "num_choices": 0,
                "loader": {"batch_size": 4},
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "StructuredPruning",
                    "init_args": {
                        "ratio": 0.05,
                        "criterion": "param_first",
                        "selection": {"scope": "local"},
                        "calibration": {"num_sequences": 6, "length": 8, "batch_size": 2},
                        "compensation": "none",
                    },
                }
            ],
        },
    }


@pytest.fixture
def phased_config(config_that_prunes: dict[str, Any]) -> dict[str, Any]:
    """Six steps in which 5 % go; then 8 bits in the first layer and 4 in the second, and six steps more."""
    schedule = {"warmup": 0.0, "cooldown": 0.2, "every_n_steps": 2}  # events after steps 2, 4 and 5
    guided = {
        "class_path": "LoRAGuidedPruning",
        "init_args": {"ratio": 0.05, "schedule": schedule, "selection": {"scope": "local"}},
    }
    config_that_prunes["trainer"]["callbacks"] = [guided]
    config_that_prunes["phases"] = [{"max_epochs": 1, "optimizer": {"lr": 0.005}, "callbacks": [QUANTIZATION]}]
    return config_that_prunes


@pytest.fixture
def arguments(config: dict[str, Any], tmp_path: Path) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]
