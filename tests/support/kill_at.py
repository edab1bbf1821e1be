"""Runs the command line and kills it, as a power cut would: ``kill_at.py MOMENT NUMBER ARGUMENTS``."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric.plugins.io.torch_io as torch_io

from qpruner import __main__ as command_line
from qpruner import model_folder
from qpruner.callbacks import bits_under_budget, checkpoint, pruning
from qpruner.search import trial
from qpruner.training.module import LoRAFinetuner


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(_: Any, path: str) -> None:
    Path(path).write_bytes(b"PK half a checkpoint")
    die()


def at_call(number: int, function: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return then(*args, **kwargs) if calls == number else function(*args, **kwargs)

    return counted


moment, number, *arguments = sys.argv[1:]
match moment:
    case "training":
        LoRAFinetuner.training_step = at_call(int(number), LoRAFinetuner.training_step, die)  # type: ignore[method-assign]
    case "validation":
        LoRAFinetuner.validation_step = at_call(int(number), LoRAFinetuner.validation_step, die)  # type: ignore[method-assign]
    case "scoring":
        pruning.score_units = at_call(int(number), pruning.score_units, die)
    case "measuring":
        bits_under_budget.measured_rises = at_call(int(number), bits_under_budget.measured_rises, die)
    case "trial":
        trial.evaluate = at_call(int(number), trial.evaluate, die)
    case "keeping":
        model_folder.entries_of = at_call(int(number), model_folder.entries_of, die)
    case "writing":
        torch_io._atomic_save = at_call(int(number), torch_io._atomic_save, half_written)
    case "replacing":
        checkpoint.os.replace = at_call(int(number), os.replace, die)  # type: ignore[attr-defined]
sys.argv = ["qpruner", *arguments]
command_line.main()
