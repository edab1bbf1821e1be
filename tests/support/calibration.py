"""Calibration text of random tokens, shared by processes, and hooks that nobody took away."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qpruner.calibration.text import Calibration
from qpruner.processes import Processes
from support.families import random_tokens
from support.ranks import together

S, T = 6, 20


def calibration(size: int = 4, tokens: Tensor | None = None, **changes: Any) -> Calibration:
    """Text in micro-batches of some sequences, of one process unless told."""
    tokens = random_tokens(S, T) if tokens is None else tokens
    return Calibration.share(tokens, replace(Processes.alone(), **changes), size * tokens.shape[1])


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def in_processes(count: int, size: int, act: Callable[[Calibration], Any], tokens: Tensor | None = None) -> list[Any]:
    """What each of some processes finds, here threads that meet to sum."""

    def work(processes: Processes) -> Any:
        text = random_tokens(S, T) if tokens is None else tokens
        return act(Calibration.share(text, processes, size * text.shape[1]))

    answers = together(*[work] * count)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
