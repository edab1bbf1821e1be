"""Trained adapters as a separate GGUF file, whose output llama.cpp adds to that of the base (``--lora``)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.adapters.lora import Adapter
from qpruner.export.gguf_names import Entry
from qpruner.export.source import Source


@dataclass(frozen=True)
class Factors:
    """The adapter on a tensor of a file: ``alpha / r * B A`` is added to it.

    Args:
        name: name of the tensor.
        lora_A: factor A, float32 [r, in].
        lora_B: factor B, float32 [out, r], its rows in the order of the tensor's.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor


def alpha_of(adapters: Mapping[str, Adapter]) -> float:
    """The alpha that a file states for all adapters: that of the first."""
    first = next(iter(adapters.values()))
    return first.scale * len(first.lora_A)


def factors_of(entry: Entry, source: Source, alpha: float) -> Factors | None:
    """The adapter on a tensor of a file; None where none of its parameters has one.

    For several stacked parameters, A stacks the factors A of all of them, and B is block-diagonal.
    """
    parts = [(part, source.adapter(part.parameter)) for part in entry.parts]
    rank = sum(len(adapter.lora_A) for _, adapter in parts if adapter is not None)
    if not rank:
        return None
    lora_B, row, column = torch.zeros(entry.shape[0], rank), 0, 0
    for part, adapter in parts:
        if adapter is not None:
            end = column + len(adapter.lora_A)
            block = part.rows(adapter.lora_B.float()) * (adapter.scale * rank / alpha)
            lora_B[row : row + part.num_rows, column:end] = block
            column = end
        row += part.num_rows
    lora_A = [part.columns(adapter.lora_A.float()) for part, adapter in parts if adapter is not None]
    return Factors(entry.name, torch.cat(lora_A), lora_B)


def tensors_of(factors: Sequence[Factors]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of adapters by their names."""
    for each in factors:
        yield f"{each.name}.lora_a", each.lora_A
        yield f"{each.name}.lora_b", each.lora_B
