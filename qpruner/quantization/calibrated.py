"""Rounding that is judged by text, block by block, on what the blocks before really give.

In each block the units are rounded in the order in which text passes: ``qkv``, ``o``, ``gate_up``, ``down``. All text
passes through the block with the units so far packed, and the inputs that reach the next unit are summed up, beside
those that it gets in the model before quantization. `qpruner.quantization.rounding` makes codes of these sums. So at
any time the errors of everything before are there, and the target may be the dense model's outputs in spite of them.

One sequence in eight is held out. Where a linear's calibrated codes are worse on it than plainly rounded ones, these
are taken, and the log says so.

Some tokens, such as the first of a sequence, carry activations hundreds of times larger than the rest (arXiv
2402.17762). What comes next takes a norm of the hidden states, so that what counts of an error of ``o`` or ``down`` is
its share of them: see `Tokens`.

What is rounded of a block is on disk before the next one is begun. A calibration that was cut off reads it and lets
text pass through it; each file names the one before by its hash, so that a prefix that changed is noticed.

Shapes: B sequences of a micro-batch, T tokens, I inputs and O outputs of a linear, G groups of its rows.
"""

"""Rounding that is judged by text, block by block, on what the blocks before really give.

In each block the units are rounded in the order in which text passes: ``qkv``, ``o``, ``gate_up``, ``down``. All text
passes through the block with the units so far packed, and the inputs that reach the next unit are summed up, beside
those that it gets in the model before quantization. `qpruner.quantization.rounding` makes codes of these sums. So at
any time the errors of everything before are there, and the target may be the dense model's outputs in spite of them.

One sequence in eight is held out. Where a linear's calibrated codes are worse on it than plainly rounded ones, these
are taken, and the log says so.

Some tokens, such as the first of a sequence, carry activations hundreds of times larger than the rest (arXiv
2402.17762). What comes next takes a norm of the hidden states, so that what counts of an error of ``o`` or ``down`` is
its share of them: see `Tokens`.

What is rounded of a block is on disk before the next one is begun. A calibration that was cut off reads it and lets
text pass through it; each file names the one before by its hash, so that a prefix that changed is noticed.

Shapes: B sequences of a micro-batch, T tokens, I inputs and O outputs of a linear, G groups of its rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qpruner.adapters.lora import is_target
from qpruner.anatomy import unit_linears
from qpruner.calibration.blocks import BlockRunner, block_runner, watching
from qpruner.calibration.gram import MASSIVE_POSITIONS
from qpruner.calibration.input_sums import InputSums
from qpruner.calibration.output_gradients import output_weights
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.errors import UserError, check_ranges, listed
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.quantization.apply import Factors, LoftQSettings, check_rank, linear_precisions
from qpruner.quantization.calibrated_layers import CalibratedLayers, Layer, Outcome, RoundedLinear
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.formats import GridFormat, format_for, rebuild
from qpruner.quantization.rounding import RoundingConfig, corrected_weight, error, round_weight

Tokens = Literal["equal", "skip", "normed"]
"""How much a token counts: all the same; all but the first four of a sequence; or, in ``o`` and ``down``, one over the
mean square of the hidden states that leave the dense block, since a norm is taken of these."""
HELD_OUT = 8
"""Every eighth sequence is held out."""
NORMED_UNITS = ("o", "down")


@dataclass(frozen=True)
class CalibratedConfig:
    """How weights are rounded by text.

    Args:
        rounding: how codes and grids are chosen from what is known of a linear's inputs.
        output_groups: number of groups of a linear's outputs that each weigh tokens by the gradient of the loss at the
            end of the model; 0 leaves the loss out.
        adapters: what adapters start as: the low-rank matrix nearest to what rounding left of a weight (``weight``), or
            the one whose outputs on the text are (``calibrated``).
        tokens: how much each token counts; ``equal``, ``skip`` (the first four of a sequence do not) or ``normed``
            (in ``o`` and ``down`` by one over the mean square of the hidden states).
        text: calibration text.

    Raises:
        UserError: a number of groups below 0.
    """

    rounding: RoundingConfig = RoundingConfig()
    output_groups: int = 1
    tokens: Tokens = "normed"
    adapters: Literal["weight", "calibrated"] = "calibrated"
    text: CalibrationConfig = CalibrationConfig(num_sequences=128, length=256)

    def __post_init__(self) -> None:
        check_ranges(self, "calibrated", output_groups=("at least 0", self.output_groups >= 0))

    def check_text(self, widest: int) -> None:
        """Makes sure that text is enough for Hessians that are no guess.

        Args:
            widest: largest number of inputs of a linear.

        Raises:
            UserError: fewer tokens that decide than a linear has inputs, or no sequence to hold out.
        """
        text = self.text
        deciding = text.num_sequences - text.num_sequences // HELD_OUT
        if text.num_sequences < HELD_OUT or deciding * text.length < widest:
            must_decide = -(-widest // text.length)
            needed = max(HELD_OUT, must_decide + (must_decide - 1) // (HELD_OUT - 1))
            raise UserError(
                f"calibrated.text has {text.num_sequences} sequences of {text.length} tokens, of which "
                f"{deciding * text.length:,} tokens decide, since one sequence in eight is held out; the widest linear "
                f"has {widest:,} inputs and needs as many. Give at least {needed} sequences."
            )


@dataclass(frozen=True)
class Calibrated:
    """What calibration left of a model.

    Args:
        factors: factors that adapters start from, by the name of their linear.
        outcomes: what came of each linear that was rounded by text, by name.
        resumed: numbers of the layers that were read from the disk.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.outcomes:
            return "Rounded no linear by text: none is held in a format with a grid."
        worse = [name for name, outcome in self.outcomes.items() if not outcome.kept]
        gains = [1 - outcome.calibrated / outcome.plain for outcome in self.outcomes.values() if outcome.kept]
        gained = f", which takes {sum(gains) / len(gains):.0%} off their error on held-out text" if gains else ""
        fallen = f"; plain rounding was no worse there for {listed(worse)}" if worse else ""
        return f"Rounded {len(gains)} of {len(self.outcomes)} linears by text{gained}{fallen}."


def calibrate_(
    model: Any,
    plan: CompressionPlan,
    config: CalibratedConfig,
    adapters: LoftQSettings | None,
    calibration: Calibration,
    layers: CalibratedLayers,
) -> Calibrated:
    """Packs the linears of a model as a plan says, rounded by text; the same on all processes.

    Beside the model it holds the hidden states of the text twice, and of one block the inputs of its linears and their
    sums. The text passes through each block six times, and once more through the model and back where the loss counts.

    Args:
        model: narrowed and dense model, on the device that computes.
        plan: plan with the widths that the model has.
        config: options of the rounding.
        adapters: how adapters start; None to start them at zero.
        calibration: this process's share of the text.
        layers: place that keeps what is rounded already.

    Raises:
        UserError: no format offers a precision, the rank is above that of a linear, or what reaches a linear is not
            finite.
    """
    precisions = {name: each for name, each in linear_precisions(model, plan).items() if each != DENSE}
    check_rank(model, precisions, adapters)
    weights: dict[str, list[Tensor]] = {}
    if config.output_groups:
        linears = {name: model.get_submodule(name) for name in precisions}
        weights = output_weights(model, linears, calibration, config.output_groups)
    packing = _Packing(model, config, adapters)
    quantize_tables_(model, plan.embedding, plan.head, device=calibration.processes.device)
    result = Calibrated()
    with block_runner(model, calibration) as runner:
        states = runner.embed()
        dense_states = list(states)
        for number, units in enumerate(unit_linears(model)):
            block = _Block(runner, number, calibration, config)
            block.pass_dense(dense_states, {unit: model.get_submodule(names[0]) for unit, names in units.items()})
            layer = layers.read(number, calibration.processes)
            if layer is not None:
                result.resumed.append(number)
                for name, rounded in layer.items():
                    packing.place(name, precisions[name], rounded.state)
            else:
                layer: Layer = {}
                for unit, names in units.items():
                    members = {name: weights.get(name) for name in names if name in precisions}
                    for name, sums in block.sums(unit, model.get_submodule(names[0]), states, members):
                        pack = partial(packing.round, name, precisions[name], sums)
                        layer[name] = calibration.processes.of_first(pack)
                    for name in members:
                        packing.place(name, precisions[name], layer[name].state)
                layers.write(number, layer, calibration.processes)
            for name, rounded in layer.items():
                if rounded.factors is not None:
                    result.factors[name] = rounded.factors
                if rounded.outcome is not None:
                    result.outcomes[name] = rounded.outcome
            for place, output in enumerate(runner.outputs(number, states)):
                states[place] = output.cpu()
    return result


@dataclass(frozen=True)
class _SplitSums:
    """The sums over the sequences that decide, and over those that are held out."""

    decide: InputSums
    held_out: InputSums


class _Block:
    """One block while its units are rounded.

    Args:
        runner: runner of the model.
        number: place of the block.
        calibration: this process's share of the text.
        config: options of the rounding.
    """

    def __init__(self, runner: BlockRunner, number: int, calibration: Calibration, config: CalibratedConfig) -> None:
        self._runner, self._number = runner, number
        self._calibration, self._config = calibration, config
        self._dense_inputs: dict[str, list[Tensor]] = {}
        self._squares: list[Tensor] = []

    def pass_dense(self, dense_states: list[Tensor], linears: Mapping[str, nn.Linear]) -> None:
        """Lets the dense model's states through the block, and remembers what its units get.

        Args:
            dense_states: states that enter the block, which those that leave it take the place of.
            linears: a linear of each unit.
        """
        self._dense_inputs = {unit: [] for unit in linears}

        def see(unit: str, inputs: Tensor, output: Tensor) -> None:
            self._dense_inputs[unit].append(inputs.cpu())

        with watching(dict(linears) if self._config.rounding.alpha else {}, see):
            for place, output in enumerate(self._runner.outputs(self._number, dense_states)):
                self._squares.append(output.float().square().mean(-1).cpu())  # [B, T]
                dense_states[place] = output.cpu()

    def sums(
        self, unit: str, linear: nn.Linear, states: Sequence[Tensor], weights: Mapping[str, list[Tensor] | None]
    ) -> Iterator[tuple[str, _SplitSums]]:
        """The sums over all text of what reaches a unit, for each of its linears.

        Args:
            unit: unit whose turn it is; those before it are packed.
            linear: a linear of the unit, all of which get the same.
            states: states that enter the block.
            weights: how much each token counts for the outputs of each linear; None where all count the same.
        """
        if not weights:
            return
        seen: list[Tensor] = []
        with watching({unit: linear}, lambda _, inputs, __: seen.append(inputs.cpu())):
            for _ in self._runner.outputs(self._number, states):
                pass  # only what reaches the unit is wanted
        shared: _SplitSums | None = None
        for name, of_outputs in weights.items():
            if of_outputs is not None:
                yield name, self._summed(unit, seen, linear.in_features, of_outputs)
            else:
                shared = shared or self._summed(unit, seen, linear.in_features, None)
                yield name, shared

    def _summed(self, unit: str, seen: list[Tensor], num_inputs: int, of_outputs: list[Tensor] | None) -> _SplitSums:
        processes = self._calibration.processes
        groups = self._config.output_groups if of_outputs is not None else 1
        beside_dense = self._config.rounding.alpha > 0
        parts = [InputSums.none(groups, num_inputs, processes.device, beside_dense=beside_dense) for _ in range(2)]
        for place, batch in enumerate(self._calibration.batches):
            weights = self._token_weights(unit, place)  # [B, T, 1]
            if of_outputs is not None:
                weights = weights * of_outputs[place]
            numbers = batch.first + torch.arange(len(batch.tokens))
            held_out = numbers % HELD_OUT == HELD_OUT - 1
            for sums, rows in zip(parts, (~held_out, held_out), strict=True):
                dense = self._dense_inputs[unit][place][rows].flatten(0, 1) if beside_dense else None
                sums.add_(
                    seen[place][rows].flatten(0, 1).to(processes.device),
                    None if dense is None else dense.to(processes.device),
                    weights[rows].flatten(0, 1).to(processes.device),
                )
        return _SplitSums(*(sums.over(processes) for sums in parts))

    def _token_weights(self, unit: str, place: int) -> Tensor:
        """How much each token of a micro-batch counts, [B, T, 1]."""
        squares = self._squares[place]
        weights = torch.ones_like(squares)
        if self._config.tokens == "skip":
            weights[:, :MASSIVE_POSITIONS] = 0
        elif self._config.tokens == "normed" and unit in NORMED_UNITS:
            weights = torch.where(squares > 0, squares.reciprocal(), 0.0)
        return weights.unsqueeze(-1)


class _Packing:
    """Makes codes of what is known of a linear's inputs.

    Args:
        model: model whose linears are packed, one after the other.
        config: options of the rounding.
        adapters: how adapters start; None to start them at zero.
    """

    def __init__(self, model: Any, config: CalibratedConfig, adapters: LoftQSettings | None) -> None:
        self._model, self._config, self._adapters = model, config, adapters

    def place(self, name: str, precision: Precision, state: Mapping[str, Tensor]) -> None:
        """Puts a packed linear into the place of a dense one."""
        linear: Any = self._model.get_submodule(name)
        device = linear.weight.device
        packed = rebuild(
            {part: tensor.to(device) for part, tensor in state.items()},
            linear.out_features,
            linear.in_features,
            precision=precision,
            bias=None if linear.bias is None else linear.bias.detach().clone(),
            dtype=linear.weight.dtype,
        )
        self._model.set_submodule(name, packed.train(linear.training))

    def round(self, name: str, precision: Precision, sums: _SplitSums) -> RoundedLinear:
        """A linear's codes, by text where its format has a grid, and what its adapter starts from.

        Raises:
            UserError: the weight, or what reaches the linear, is not finite.
        """
        linear: Any = self._model.get_submodule(name)
        weight = linear.weight.detach().float().to(sums.decide.hessian.device)
        number_format, rounding = format_for(precision), self._config.rounding
        state, outcome, target = number_format.encode(weight, precision), None, weight
        if isinstance(number_format, GridFormat):
            decide = sums.decide
            target = weight
            if decide.cross is not None:
                target = corrected_weight(weight, decide.hessian, decide.cross, rounding.alpha, rounding.damping)
            rounded = round_weight(target, number_format, precision, decide.hessian, rounding, name=name)
            plain = number_format.decode(state, *weight.shape, precision)
            outcome = Outcome.of(_error(weight, plain, sums.held_out), _error(weight, rounded.values, sums.held_out))
            if outcome.kept:
                state = number_format.pack(rounded.codes, rounded.grid)
        factors = None
        if self._adapters is not None and is_target(name, self._adapters.targets):
            left = target - number_format.decode(state, *weight.shape, precision)
            factors = self._start(name, left, sums.decide.hessian.mean(0), self._adapters)
        return RoundedLinear({part: tensor.cpu() for part, tensor in state.items()}, factors, outcome)

    def _start(self, name: str, left: Tensor, hessian: Tensor, adapters: LoftQSettings) -> Factors:
        """The start of an adapter from what rounding left of a weight, [O, I], over inputs with a Hessian [I, I]."""
        root = root_of(hessian, self._config.rounding.damping) if self._config.adapters == "calibrated" else None
        lora_A, lora_B = low_rank_start(left, root, rank=adapters.rank, scale=adapters.scale, name=name, seed=adapters.seed)
        return lora_A.cpu(), lora_B.cpu()


def _error(weight: Tensor, values: Tensor, sums: InputSums) -> float:
    """Squared error of a linear with other values on some text, over the square of what it should give."""
    size = sums.hessian if sums.dense is None else sums.dense
    return error(weight, values, sums.hessian, sums.cross, sums.dense) / error(weight, torch.zeros_like(weight), size)
