"""Runs the command line and kills it, as a power cut would: ``kill_at.py MOMENT NUMBER ARGUMENTS``."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric.plugins.io.torch_io as torch_io

from qpruner import __main__ as command_line
from qpruner import adapter_files, model_folder
from qpruner.callbacks import bits_under_budget, checkpoint, pruning, quantization
from qpruner.joint.learner import PlanLearner
from qpruner.quantization.calibrated_layers import CalibratedLayers
from qpruner.runs import fitting
from qpruner.runs.phases import Phase
from qpruner.search import trial
from qpruner.training.evaluation import Measures
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


def of_folders(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in place of `os.replace` for new folders alone."""
    replace = os.replace

    def sorted_out(source: Any, *args: Any, **kwargs: Any) -> Any:
        return (function if Path(source).is_dir() and Path(source).suffix == ".tmp" else replace)(
            source, *args, **kwargs
        )

    return sorted_out


moment, number, *arguments = sys.argv[1:]
match moment:
    case "training":
        LoRAFinetuner.training_step = at_call(int(number), LoRAFinetuner.training_step, die)  # type: ignore[method-assign]
    case "learning":
        PlanLearner.training_step = at_call(int(number), PlanLearner.training_step, die)  # type: ignore[method-assign]
    case "validation":
        LoRAFinetuner.validation_step = at_call(int(number), LoRAFinetuner.validation_step, die)  # type: ignore[method-assign]
    case "scoring":
        pruning.score_units = at_call(int(number), pruning.score_units, die)
    case "measuring":
        bits_under_budget.measured_rises = at_call(int(number), bits_under_budget.measured_rises, die)
    case "rounding":  # with the layers before written
        CalibratedLayers.write = at_call(int(number), CalibratedLayers.write, die)  # type: ignore[method-assign]
    case "answering":  # of questions
        Measures.option_log_likelihoods = at_call(int(number), Measures.option_log_likelihoods, die)  # type: ignore[method-assign]
    case "trial":
        trial.evaluate = at_call(int(number), trial.evaluate, die)
    case "keeping":
        model_folder.entries_of = adapter_files.entries_of = at_call(int(number), model_folder.entries_of, die)
    case "adapters":
        adapter_files._write_adapters = at_call(int(number), adapter_files._write_adapters, die)
    case "swapping":  # with the old folder gone and the new one not in its place
        os.replace = of_folders(at_call(int(number), os.replace, die))
    case "dropping":
        quantization.drop_scaffolding = at_call(int(number), quantization.drop_scaffolding, die)
    case "reporting":  # with all that a fit leaves written, and the run not called over
        fitting.write_report = at_call(int(number), fitting.write_report, die)
    case "card":  # of a model that has none yet
        fitting.write_model_card = at_call(int(number), fitting.write_model_card, die)
    case "ending":  # of a phase
        Phase.end = at_call(int(number), Phase.end, die)  # type: ignore[method-assign]
    case "writing":
        torch_io._atomic_save = at_call(int(number), torch_io._atomic_save, half_written)
    case "replacing":
        checkpoint.os.replace = at_call(int(number), os.replace, die)  # type: ignore[attr-defined]
sys.argv = ["qpruner", *arguments]
command_line.main()
