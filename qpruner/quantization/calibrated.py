"""Calibrated rounding: linears are rounded block by block, on text that has passed through the quantized blocks before.

In each block, the units are rounded in forward order: ``qkv``, ``o``, ``gate_up``, ``down``. All text passes through
the block with the units packed so far, and sums are accumulated over the inputs that reach the next unit and over those
that it receives in the model before quantization. `qpruner.quantization.rounding` turns these sums into codes. At every
point, all earlier errors are thus present, and the target may be the dense model's outputs in spite of them.

One sequence in eight is held out. Where a linear's calibrated codes are no better on these sequences than
round-to-nearest codes, the latter are used, and the log says so.

Some tokens, such as the first of a sequence, carry activations hundreds of times larger than the rest (arXiv
2402.17762). The next module normalizes the hidden states, so what counts is an error of ``o`` or ``down`` relative to
their size: see `Tokens`.

The rounded linears of a block are written to disk before the next block begins. When an interrupted calibration is
repeated, it reads them and passes the text through them; each file records the hash of the previous one, so that a
changed prefix is noticed.

Shapes: B sequences of a micro-batch, T tokens, I inputs and O outputs of a linear, G groups of its rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpruner.adapters.calibrated import calibrated_start
from qpruner.adapters.lora import is_target
from qpruner.anatomy import refuse_experts, unit_linears
from qpruner.calibration.blocks import block_runner
from qpruner.calibration.input_sums import InputSums
from qpruner.calibration.output_gradients import output_weights
from qpruner.calibration.text import Calibration
from qpruner.errors import listed
from qpruner.modeling_compressed import values
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.quantization.apply import Factors, LoftQSettings, check_rank, linear_precisions, starts_of
from qpruner.quantization.calibrated_inputs import BlockInputs, CalibratedConfig, SplitSums
from qpruner.quantization.calibrated_layers import CalibratedLayers, Layer, Outcome, RoundedLinear
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.formats import GridFormat, format_for, rebuild
from qpruner.quantization.rounding import check_finite, corrected_weight, error, round_weight


@dataclass(frozen=True)
class Calibrated:
    """The result of calibrated rounding of a model.

    Args:
        factors: initial factors of the adapters, by the name of their linear.
        outcomes: outcome of each linear that was rounded by text, by name.
        resumed: indices of the layers that were read from disk.
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

    Besides the model, memory holds the hidden states of the text twice, and for one block the inputs of its linears and
    their sums: up to five float64 matrices [I, I] for each group of outputs, of which three are for held-out text and
    lie in files if the model is offloaded. The text passes through each block up to six times. With
    ``config.output_groups``, it first passes once through the model and back, with the hidden states before every block
    in host memory, or in files if the model is offloaded.

    Args:
        model: narrowed and dense model, on the compute device.
        plan: plan with the widths that the model has.
        config: options of the rounding.
        adapters: how adapters start; None to start them at zero.
        calibration: this process's share of the text.
        layers: storage of the layers that are rounded already.

    Raises:
        UserError: the model has experts, no format offers a precision, an adapter's rank exceeds that of its linear, or
            a weight or what reaches a linear is not finite.
    """
    precisions = {name: each for name, each in linear_precisions(model, plan).items() if each != DENSE}
    starts = starts_of(model, plan, adapters)
    check_rank(model, starts)
    packing = Packing(model, config, starts)
    weights: dict[str, list[Tensor]] = {}
    if config.output_groups:
        linears = {name: model.get_submodule(name) for name in precisions}
        weights = output_weights(model, linears, calibration, config.output_groups)
    result = Calibrated()
    with block_runner(model, calibration) as runner:
        dense_states = runner.embed()
        quantize_tables_(model, plan.embedding, plan.head, device=calibration.processes.device)
        states = runner.embed()
        for number, units in enumerate(unit_linears(model)):
            with runner.working(number):
                block = BlockInputs(runner, number, calibration, config)
                beside_dense = units if config.rounding.alpha else {}
                firsts = {unit: model.get_submodule(names[0]) for unit, names in beside_dense.items()}
                calibration.processes.of_each(partial(block.pass_dense, dense_states, firsts))
                stored = layers.read(number, calibration.processes)
                layer: Layer = {} if stored is None else stored
                if stored is not None:
                    result.resumed.append(number)
                    for name, rounded in layer.items():
                        packing.place(name, precisions[name], rounded.state)
                else:
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
                    states[place] = runner.keep(output)
    return result


class Packing:
    """Rounds and packs linears, given sums over their inputs.

    Args:
        model: model whose linears are packed, one after the other.
        config: options of the rounding.
        starts: initialisation of each linear's adapter, by name of the linear; None to start it at zero.

    Raises:
        UserError: the layers of the model have experts.
    """

    def __init__(self, model: Any, config: CalibratedConfig, starts: Mapping[str, LoftQSettings | None]) -> None:
        refuse_experts(model.config, "Rounding by text", "the nearest values: leave calibrated out")
        self._model, self._config, self._starts = model, config, starts

    def place(self, name: str, precision: Precision, state: Mapping[str, Tensor]) -> None:
        """Replaces a dense linear by the packed linear of a state."""
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

    def round(self, name: str, precision: Precision, sums: SplitSums) -> RoundedLinear:
        """Rounds a linear, by text if its format has a grid, and initialises its adapter if it gets one.

        Args:
            name: name of the linear.
            precision: precision to round to.
            sums: sums over the inputs of the linear.

        Raises:
            UserError: the weight, or what reaches the linear, is not finite.
        """
        linear: Any = self._model.get_submodule(name)
        weight = linear.weight.detach().float().to(sums.decide.hessian.device)
        number_format, rounding, decide = format_for(precision), self._config.rounding, sums.decide
        target, outcome = weight, None
        if decide.cross is not None:
            check_finite(name, weight, decide.hessian, decide.cross)  # or the corrected weight would be blamed
            target = corrected_weight(weight, decide.hessian, decide.cross, rounding.alpha, rounding.damping)
        shape = linear.out_features, linear.in_features
        state = number_format.encode(weight, precision)
        if isinstance(number_format, GridFormat):
            if rounding.is_plain:
                by_text = number_format.encode(target, precision)  # plain rounding, which the format does itself
            else:
                rounded = round_weight(target, number_format, precision, decide.hessian, rounding, name=name)
                by_text = number_format.pack(rounded.codes, rounded.grid)
            plain, calibrated = (values(each, *shape, precision.to_data(), torch.float32) for each in (state, by_text))
            with sums.shelf.taken():
                outcome = Outcome.of(*(_error(weight, held, sums.held_out) for held in (plain, calibrated)))
            state = by_text if outcome.kept else state
        factors, start = None, self._starts[name]
        if start is not None and is_target(name, start.targets):
            held = values(state, *shape, precision.to_data(), torch.float32)
            hessian = decide.hessian.mean(0) if self._config.adapters == "calibrated" else None
            factors = self._start(name, target, held, hessian, start)
        return RoundedLinear({part: tensor.cpu() for part, tensor in state.items()}, factors, outcome)

    def _start(
        self, name: str, target: Tensor, values: Tensor, hessian: Tensor | None, adapters: LoftQSettings
    ) -> Factors:
        """The initial factors of an adapter that corrects rounded values towards a target weight, [O, I] each."""
        start = calibrated_start(
            target,
            values,
            hessian,
            name=name,
            rank=adapters.rank,
            scale=adapters.scale,
            damping=self._config.rounding.damping,
            seed=adapters.seed,
        )
        return start.lora_A.cpu(), start.lora_B.cpu()


def _error(weight: Tensor, values: Tensor, sums: InputSums) -> float:
    """Squared error of a linear's outputs with rounded values, divided by the squared norm of its true outputs."""
    size = sums.hessian if sums.dense is None else sums.dense
    whole = error(weight, torch.zeros_like(weight), size)
    return error(weight, values, sums.hessian, sums.cross, sums.dense) / whole if whole else 0.0
