"""Trained adapters as a GGUF file of their own, which llama.cpp adds to what the base computes (``--lora``)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.export.gguf_names import Entry
from qpruner.export.source import LowRank, Source


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


def alpha_of(adapters: Mapping[str, LowRank]) -> float:
    """The alpha that a file states for all adapters: that of the first."""
    first = next(iter(adapters.values()))
    return first.scale * len(first.lora_A)


def factors_of(entry: Entry, source: Source, alpha: float) -> Factors | None:
    """The adapter on a tensor of a file; None where none of its parameters has one.

    That of several stacked parameters has the A of all of them below one another, and a B of blocks.
    """
    parts = [(part, source.adapter(part.parameter)) for part in entry.parts]
    present = [adapter for _, adapter in parts if adapter is not None]
    if not present:
        return None
    rank = sum(len(adapter.lora_A) for adapter in present)
    lora_B, first_row, first = torch.zeros(entry.shape(source)[0], rank), 0, 0
    for part, adapter in parts:
        rows = source.shape(part.parameter)[0]
        if adapter is not None:
            columns = slice(first, first + len(adapter.lora_A))
            block = part.to_file(adapter.lora_B.float()) * (adapter.scale * rank / alpha)
            lora_B[first_row : first_row + rows, columns] = block
            first = columns.stop
        first_row += rows
    return Factors(entry.name, torch.cat([adapter.lora_A.float() for adapter in present]), lora_B)


def tensors_of(factors: list[Factors]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of adapters by their names."""
    for each in factors:
        yield f"{each.name}.lora_a", each.lora_A
        yield f"{each.name}.lora_b", each.lora_B
