"""Fidelity of an export: logits with the weights that the engine reads, compared with the model's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import family_of
from qpruner.export.source import Source
from qpruner.model_folder import build_skeleton

Read = Callable[[str], Tensor]

SENTENCES = (
    "The river rises in the hills above the town and runs for ninety miles before it meets the sea.",
    "When the bell rang, the children put down their books, ran to the window and looked out at the snow.",
    "A loaf of bread needs flour, water, salt and yeast; the rest is patience and a hot oven.",
    "In 1969 two people walked on the Moon while a third circled above them and waited for their return.",
    "She asked him whether the train had left, and he said that it was late, as it was every Friday.",
    "To find the area of a circle, multiply the square of its radius by pi, which is about 3.1416.",
    "The old library keeps its maps in flat drawers, where neither light nor damp can reach them.",
    "My neighbour grows tomatoes, beans and two kinds of pumpkin, and gives away most of what she picks.",
)
"""Text for a model whose own data is not available."""


@dataclass(frozen=True)
class LogitErrors:
    """How the logits of an export differ from those of its model.

    Args:
        largest: largest absolute difference of a logit.
        mean: mean absolute difference of a logit.
        spread: standard deviation of the model's own logits, beside which a difference is large or small.
        agreement: share of positions with the same most likely next token, from 0 to 1.
        num_tokens: number of tokens that were read.
    """

    largest: float
    mean: float
    spread: float
    agreement: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.largest:.2g} at most and {self.mean:.2g} in the mean, where their standard "
            f"deviation is {self.spread:.2g}; the likeliest next token is the same at {self.agreement:.1%} of "
            f"{self.num_tokens} positions"
        )


def logit_errors(source: Source, read: Read, tokens: Tensor) -> LogitErrors:
    """Compares the logits of an export with those of its model, both computed by torch in float32.

    Args:
        source: model that was exported.
        read: function that gives the values that the engine computes with; see `Written`.
        tokens: text to read, [N, T].
    """
    expected = logits(source, source.weight, tokens)
    measured = logits(source, read, tokens)
    difference = (measured - expected).abs()
    agreement = (measured.argmax(2) == expected.argmax(2)).float().mean()
    return LogitErrors(
        float(difference.max()), float(difference.mean()), float(expected.std()), float(agreement), tokens.numel()
    )


@torch.no_grad()
def logits(source: Source, read: Read, tokens: Tensor) -> Tensor:
    """The logits of the dense model with given weights, those of one module in memory at a time.

    Args:
        source: model that defines the shape of the dense one.
        read: function that gives the value of a parameter by its name.
        tokens: text to read, [N, T].
    """  # float32 [N, T, vocabulary]
    network = build_skeleton(source.dense_config).eval()
    with _reading_as_needed(network, source, read):
        logits: Tensor = network(input_ids=tokens, use_cache=False).logits
    return logits.float()


@contextmanager
def _reading_as_needed(network: Any, source: Source, read: Read) -> Iterator[None]:
    """Gives each module its parameters just before it computes, and removes them afterwards."""
    _, family = family_of(source.config)
    renamed = {f"{family.head}.weight": f"{family.embedding}.weight"} if source.tied else {}

    def take(name: str, module: nn.Module, *rest: object) -> None:
        for kind, held in list(module.named_parameters(recurse=False)):
            path = f"{name}.{kind}"
            value = read(renamed.get(path, path))
            assert value.shape == held.shape, f"{path} has shape {list(value.shape)}, not {list(held.shape)}"
            setattr(module, kind, nn.Parameter(value, requires_grad=False))

    def leave(module: nn.Module, *rest: object) -> None:
        module.to("meta")

    handles = []
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(partial(take, name)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sentences(tokenizer: Any) -> Tensor:
    """The `SENTENCES` as tokens, each cut to the length of the shortest; int64 [N, T]."""
    rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows])


def any_tokens(vocabulary: int, num_sequences: int = 8, length: int = 32) -> Tensor:
    """Meaningless tokens, for a model without a tokenizer; int64 [num_sequences, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (num_sequences, length), generator=generator)
