"""How the inputs of a model's linears vary together over calibration text: H = X^T X, those of one block at a time.

Once all text has passed through a block, the matrices of its linears are handed over and freed, so that besides weights
and kept states, memory holds the matrices of only one block at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.calibration.blocks import block_runner, linears_within, watching
from qpruner.calibration.products import add_gram_
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError

MASSIVE_POSITIONS = 4
"""Tokens at the start of a sequence to leave out: a few channels are a thousand times as large there as anywhere else
(massive activations, arXiv 2402.17762), and would be all that a sum of squares sees."""


@dataclass(frozen=True)
class Gram:
    """What the inputs X [tokens, in] of a linear sum to over all tokens of all processes, in float64.

    Args:
        products: matrix X^T X, [in, in].
        sums: sum of the inputs, [in].
        tokens: number of tokens.
    """

    products: Tensor
    sums: Tensor
    tokens: int

    @property
    def centred(self) -> Tensor:
        """The sum of (x - mean)(x - mean)^T, for linears whose bias takes in what inputs have in common."""  # [in, in]
        return self.products - torch.outer(self.sums, self.sums / max(self.tokens, 1))


Consume = Callable[[str, Gram], Tensor]


def check_length(length: int, skip_positions: int) -> None:
    """Makes sure that calibration sequences have tokens that count.

    Args:
        length: number of tokens of a sequence.
        skip_positions: number of tokens left out at the start of each.

    Raises:
        UserError: none would be left.
    """
    if length <= skip_positions:
        raise UserError(
            f"Calibration sequences have {length} tokens, of which the first {skip_positions} are left out. "
            f"Set calibration.length to more than {skip_positions}."
        )


def input_grams(
    model: Any, linears: dict[str, nn.Linear], calibration: Calibration, consume: Consume, *, skip_positions: int
) -> dict[str, Tensor]:
    """What is made of the inputs of each linear; the same on all processes if ``consume`` is the same function.

    Args:
        model: model that the text passes through.
        linears: linears within the model's blocks, by name.
        calibration: this process's share of the text.
        consume: makes a tensor of a linear's name and the `Gram` of its inputs. It is called once for each linear, from
            the first block to the last, before the text enters the next.
        skip_positions: number of tokens left out at the start of each sequence, such as `MASSIVE_POSITIONS`.

    Raises:
        UserError: sequences of which no token would be left.
    """
    processes, results = calibration.processes, {}
    for batch in calibration.batches:
        check_length(batch.tokens.shape[1], skip_positions)
    counted = sum(len(batch.tokens) * (batch.tokens.shape[1] - skip_positions) for batch in calibration.batches)
    tokens = int(processes.reduce(torch.tensor(float(counted), dtype=torch.float64, device=processes.device)))
    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number, block in enumerate(runner.blocks):
            members = linears_within(block, linears)
            sums = _BlockSums(members, processes.device, skip_positions)
            with runner.working(number):
                with watching(members, sums.add):
                    for place, output in enumerate(runner.outputs(number, states)):
                        states[place] = runner.keep(output)
                for name in members:
                    products, of_inputs = (processes.reduce(total) for total in sums.take(name))
                    results[name] = consume(name, Gram(products, of_inputs, tokens))
    return {name: results[name] for name in linears}


class _BlockSums:
    """Sums over the micro-batches of this process, of the inputs of one block's linears and of their products."""

    def __init__(self, linears: dict[str, nn.Linear], device: torch.device, skip_positions: int) -> None:
        self._skip = skip_positions
        self._sums = {
            name: (
                torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=device),
                torch.zeros(linear.in_features, dtype=torch.float64, device=device),
            )
            for name, linear in linears.items()
        }

    def add(self, name: str, inputs: Tensor, output: Tensor) -> None:
        seen = inputs[:, self._skip :].flatten(0, 1).float()  # [tokens, in]
        products, sums = self._sums[name]
        with torch.autocast(seen.device.type, enabled=False):  # products in single precision, their sums in double
            add_gram_(products, seen)
        sums += seen.sum(0, dtype=torch.float64)

    def take(self, name: str) -> tuple[Tensor, Tensor]:
        return self._sums.pop(name)
