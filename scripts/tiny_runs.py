"""Tiny runs for scripts that repeat them often: a random Llama, and configurations of seconds on it."""

import json
import os
import sys
from pathlib import Path
from threading import RLock
from typing import Any

TEXT = {"num_sequences": 16, "length": 12, "batch_size": 4}
PRUNING = {
    "class_path": "StructuredPruning",
    "init_args": {"ratio": 0.05, "calibration": TEXT, "compensation_text": TEXT},
}
UNDER_A_BUDGET = {
    "allocation": "sensitivity",
    "budget": {"average_bits": 5.5},
    "deciding": {"granularity": "unit", "widths": [3, 4, 8], "calibration": TEXT},
}
BY_TEXT = {"bits": [2, 3], "formats": {2: "affine"}, "group": 32, "calibrated": {"text": TEXT}}
CALLBACKS = {"fit": UNDER_A_BUDGET, "search": UNDER_A_BUDGET, "calibration": BY_TEXT}
"""Options of `MixedPrecisionQuantization` in each kind of run; a calibration is a fit that rounds codes by text."""


def tiny_base(folder: Path) -> Path:
    """A folder with a random Llama of two layers, 32 channels and 2,048 tokens, and the embedded tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qpruner.pretrained import EMBEDDED, load_tokenizer

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(1)
        sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        load_tokenizer(EMBEDDED).save_pretrained(folder)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=256)).save_pretrained(folder)
    return folder


def write_config(path: Path, kind: str, base: Path, *, steps: int = 12, trials: int = 12) -> Path:
    """Writes the configuration of a run, and returns its path.

    Args:
        path: file to write; the run lies beside it, in a folder ``run``.
        kind: fit, search or calibration.
        base: folder of the model.
        steps: optimizer steps of a fit; a trial has one.
        trials: number of trials of a search.
    """
    data = {"max_length": 24, "num_train": 24, "num_validation": 6, "num_test": 6, "num_choices": 0}
    trainer: dict[str, Any] = {"accelerator": "cpu", "limit_val_batches": 1, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    quantization = {"class_path": "MixedPrecisionQuantization", "init_args": CALLBACKS[kind]}
    config: dict[str, Any] = {
        "run": {"name": "run", "dir": str(path.parent), "checkpoint_every_n_steps": max(steps // 50, 2)},
        "model": {"base": str(base), "lora": {"r": 2}, "optimizer": {"lr": 0.01}},
        "data": {"class_path": "StoriesDataModule", "init_args": {**data, "loader": {"batch_size": 4}}},
        "trainer": {**trainer, **quiet, "callbacks": [PRUNING, quantization]},
    }
    if kind == "search":
        config["search"] = {"trials": trials, "steps": 1, "finalists": 2, "finalist_seeds": 2}
    else:
        config["trainer"]["max_steps"] = steps
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2))  # which is YAML, too
    return path


def command_of(kind: str) -> str:
    return "search" if kind == "search" else "fit"


def run_command(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """Runs the command line in this process, a copy of one that has imported it, and ends the process.

    Args:
        words: words behind ``qpruner``.
        log: file that gets what is printed.
        environment: variables of the environment to set.
    """
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.argv = ["qpruner", *words]
    from qpruner.__main__ import main

    main()


def import_libraries() -> None:
    """Imports what a command does, so that copies of this process begin at once; computes with one thread."""
    import peft  # noqa: F401
    import tensorboard  # noqa: F401
    import torch
    from tqdm import tqdm
    from transformers.models.llama import modeling_llama  # noqa: F401

    from qpruner import cli  # noqa: F401
    from qpruner.quiet import quieten
    from qpruner.search import trial  # noqa: F401

    quieten()
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # its own lock is one of all copies, who would wait for one that was killed with it
