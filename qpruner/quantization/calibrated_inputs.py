"""The inputs that reach the linears of a block while its units are rounded, one after the other.

Shapes: B sequences of a micro-batch, T tokens, I inputs of a linear, G groups of its outputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qpruner.calibration.blocks import BlockRunner, watching
from qpruner.calibration.gram import MASSIVE_POSITIONS
from qpruner.calibration.input_sums import InputSums
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.errors import UserError, check_ranges
from qpruner.offload import Shelf
from qpruner.quantization.rounding import RoundingConfig

Tokens = Literal["equal", "skip", "normed"]
"""How much a token counts: ``equal``, all count the same; ``skip``, the first four of a sequence do not count;
``normed``, in ``o`` and ``down`` each counts one over the mean square of the hidden state that leaves the dense block,
since the next module normalises it. Weights from the gradient of the loss account for the normalisation already, and
replace those of ``normed``."""
HELD_OUT = 8
"""Every eighth sequence is held out."""
NORMED_UNITS = ("o", "down")


@dataclass(frozen=True)
class CalibratedConfig:
    """How weights are rounded with calibration text.

    Args:
        rounding: how codes and grids are chosen from the statistics of a linear's inputs.
        output_groups: number of groups that the outputs of a linear are divided into; each group weights tokens by the
            gradient of the model's loss at its outputs. With 0, the loss is not used.
        adapters: initial values of the adapters: the low-rank matrix nearest to the rounding error of a weight
            (``weight``), or the one whose outputs on the text are nearest to those of this error (``calibrated``).
        tokens: how much each token counts: ``equal``, ``skip`` (the first four of a sequence do not count) or
            ``normed`` (in ``o`` and ``down``, one over the mean square of the hidden state after the block).
        text: calibration text.

    Raises:
        UserError: a number of groups below 0.
    """

    rounding: RoundingConfig = RoundingConfig()
    output_groups: int = 0
    tokens: Tokens = "normed"
    adapters: Literal["weight", "calibrated"] = "calibrated"
    text: CalibrationConfig = CalibrationConfig(num_sequences=128, length=256)

    def __post_init__(self) -> None:
        check_ranges(self, "calibrated", output_groups=("at least 0", self.output_groups >= 0))

    def check_text(self, widest: int) -> None:
        """Makes sure that there is enough text to estimate the Hessians.

        Args:
            widest: largest number of inputs of a linear.

        Raises:
            UserError: there are fewer tokens that are not held out than a linear has inputs, no tokens that count, or
                too few sequences to hold one out.
        """
        text = self.text
        deciding = text.num_sequences - text.num_sequences // HELD_OUT
        counted = text.length - (MASSIVE_POSITIONS if self.tokens == "skip" else 0)
        if counted < 1:
            raise UserError(
                f"calibrated.text has sequences of {text.length} tokens, of which tokens: skip leaves the first "
                f"{MASSIVE_POSITIONS} out. Give a length above that."
            )
        if text.num_sequences < HELD_OUT or deciding * counted < widest:
            must_decide = -(-widest // counted)
            needed = max(HELD_OUT, must_decide + (must_decide - 1) // (HELD_OUT - 1))
            raise UserError(
                f"calibrated.text has {text.num_sequences} sequences of {text.length} tokens, of which "
                f"{deciding * counted:,} tokens decide, since one sequence in eight is held out; the widest linear "
                f"has {widest:,} inputs and needs as many. Give at least {needed} sequences."
            )


@dataclass(frozen=True)
class SplitSums:
    """The sums over the sequences used for decisions, and over those that are held out.

    Args:
        decide: sums from which codes are chosen.
        held_out: sums with which codes are judged.
        shelf: place where the held-out sums are kept until they are needed: files, if the model is offloaded.
    """

    decide: InputSums
    held_out: InputSums
    shelf: Shelf


class BlockInputs:
    """Collects the inputs of one block's units while these are rounded.

    Args:
        runner: runner of the model.
        number: index of the block, from 0.
        calibration: this process's share of the text.
        config: options of the rounding.
    """

    def __init__(self, runner: BlockRunner, number: int, calibration: Calibration, config: CalibratedConfig) -> None:
        self._runner, self._number = runner, number
        self._calibration, self._config = calibration, config
        self._dense_inputs: dict[str, list[Tensor]] = {}
        self._squares: list[Tensor] = []

    def pass_dense(self, dense_states: list[Tensor], linears: Mapping[str, nn.Linear]) -> None:
        """Passes the dense model's states through the block, and remembers the inputs of its units.

        Args:
            dense_states: states that enter the block; they are replaced by those that leave it.
            linears: a linear of each unit whose inputs are wanted.

        Raises:
            UserError: states that leave the block are not finite.
        """
        self._dense_inputs = {unit: [] for unit in linears}

        def see(unit: str, inputs: Tensor, output: Tensor) -> None:
            self._dense_inputs[unit].append(self._runner.keep(inputs))

        with watching(dict(linears), see):
            for place, output in enumerate(self._runner.outputs(self._number, dense_states)):
                squares = output.float().square().mean(-1).cpu()  # [B, T]
                if not squares.isfinite().all():
                    raise UserError(
                        f"What layer {self._number} (from 0) makes of the calibration text is not finite. Load an "
                        f"undamaged model, or use --model.dtype bfloat16 or float32."
                    )
                self._squares.append(squares)
                dense_states[place] = self._runner.keep(output)

    def sums(
        self, unit: str, linear: nn.Linear, states: Sequence[Tensor], weights: Mapping[str, list[Tensor] | None]
    ) -> Iterator[tuple[str, SplitSums]]:
        """The sums over all text of the inputs of a unit, for each of its linears.

        Args:
            unit: unit that is rounded next; those before it are already packed.
            linear: a linear of the unit; all of them have the same inputs.
            states: hidden states that enter the block.
            weights: weights of tokens by the gradient of the loss, by name of the linear: a tensor [B, T, G] for each
                micro-batch; None for a linear that the loss does not weight.

        Yields:
            Name of each linear, and the sums for it.
        """
        if not weights:
            return
        seen: list[Tensor] = []
        with watching({unit: linear}, lambda _, inputs, __: seen.append(self._runner.keep(inputs))):
            for _ in self._runner.outputs(self._number, states):
                pass  # only what reaches the unit is wanted
        yield from self._of_linears(unit, linear, seen, weights)

    def dense_sums(
        self, unit: str, linear: nn.Linear, weights: Mapping[str, list[Tensor] | None]
    ) -> Iterator[tuple[str, SplitSums]]:
        """As `sums`, but of the inputs that the unit received in `pass_dense`, without another pass."""
        yield from self._of_linears(unit, linear, self._dense_inputs[unit], weights)

    def _of_linears(
        self, unit: str, linear: nn.Linear, seen: list[Tensor], weights: Mapping[str, list[Tensor] | None]
    ) -> Iterator[tuple[str, SplitSums]]:
        """The sums for each linear of a unit; linears that the loss does not weight share one object."""
        shared: SplitSums | None = None
        for name, of_outputs in weights.items():
            if of_outputs is not None:
                yield name, self._summed(unit, seen, linear.in_features, of_outputs)
            else:
                shared = shared or self._summed(unit, seen, linear.in_features, None)
                yield name, shared

    def _summed(self, unit: str, seen: list[Tensor], num_inputs: int, of_outputs: list[Tensor] | None) -> SplitSums:
        # The held-out sums come first, so that they can move to a file before the others are computed.
        held_out = self._part(unit, seen, num_inputs, of_outputs, held_out=True)
        shelf = Shelf(held_out.tensors, self._runner.offload)
        return SplitSums(self._part(unit, seen, num_inputs, of_outputs, held_out=False), held_out, shelf)

    def _part(
        self, unit: str, seen: list[Tensor], num_inputs: int, of_outputs: list[Tensor] | None, *, held_out: bool
    ) -> InputSums:
        processes = self._calibration.processes
        groups = self._config.output_groups if of_outputs is not None else 1
        beside_dense = self._config.rounding.alpha > 0
        # The dense model's own products are only needed for the error on held-out text.
        sums = InputSums.none(groups, num_inputs, processes.device, cross=beside_dense, dense=beside_dense and held_out)
        for place, batch in enumerate(self._calibration.batches):
            weights = self._token_weights(unit, place, by_loss=of_outputs is not None)  # [B, T, 1]
            if of_outputs is not None:
                weights = weights * of_outputs[place]
            numbers = batch.first + torch.arange(len(batch.tokens))
            rows = (numbers % HELD_OUT == HELD_OUT - 1) == held_out
            dense = self._dense_inputs[unit][place][rows].flatten(0, 1) if beside_dense else None
            sums.add_(
                seen[place][rows].flatten(0, 1).to(processes.device),
                None if dense is None else dense.to(processes.device),
                weights[rows].flatten(0, 1).to(processes.device),
            )
        return sums.over(processes)

    def _token_weights(self, unit: str, place: int, *, by_loss: bool) -> Tensor:
        """How much each token of a micro-batch counts, apart from its weight by the loss, [B, T, 1]."""
        squares = self._squares[place]
        weights = torch.ones_like(squares)
        if self._config.tokens == "skip":
            weights[:, :MASSIVE_POSITIONS] = 0
        elif self._config.tokens == "normed" and unit in NORMED_UNITS and not by_loss:  # gradients include the norm
            weights = torch.where(squares > 0, squares.reciprocal(), 0.0)
        return weights.unsqueeze(-1)
