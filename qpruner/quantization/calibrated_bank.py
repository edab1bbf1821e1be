"""The linears of a model in many precisions, rounded by text that passes through the dense model once.

A bank serves plans that are not known yet, so there is no quantized prefix: each linear is rounded by its inputs in the
dense model, whatever precisions the other linears have. The inputs of each linear are summed once, and every precision
is rounded by these sums (`qpruner.quantization.rounding`). Held-out text decides whether plain codes are used instead,
as when a plan is carried out (`qpruner.quantization.calibrated`). Only ``rounding.alpha`` has no effect: as the inputs
are those of the dense model, there are no earlier errors to compensate for.

**Why.** At few bits, plain rounding costs many times what rounding by text does, and the factor differs between
linears: an allocation by the costs of plain codes spends too much of the budget on linears that text rounds well.
**Cost.** One rounding for each linear and precision. The text passes through the model once; with
``config.output_groups``, it passes once more forward and backward.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from qpruner.anatomy import unit_linears
from qpruner.calibration.blocks import block_runner
from qpruner.calibration.output_gradients import output_weights
from qpruner.calibration.text import Calibration
from qpruner.plan import Precision
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.calibrated import Packing
from qpruner.quantization.calibrated_inputs import BlockInputs, CalibratedConfig, SplitSums
from qpruner.quantization.calibrated_layers import RoundedLinear


@dataclass(frozen=True)
class TextRounding:
    """How the codes of a bank are rounded by text, as plain data without the text itself.

    Args:
        config: options of the rounding; ``rounding.alpha`` has no effect.
        made_from: plain data that identifies the text and how the model computes on it, so that a stored bank is reused
            only for the same.
    """

    config: CalibratedConfig
    made_from: Mapping[str, Any]

    @property
    def origin(self) -> list[Any]:
        """Plain data that distinguishes this rounding from others."""
        return [asdict(self.config), self.made_from]


@dataclass(frozen=True)
class BankText(TextRounding):
    """A `TextRounding` together with the text, from which a bank is filled.

    Args:
        calibration: this process's share of the text.
    """

    calibration: Calibration


def rounded_layers(
    model: Any,
    precisions: Sequence[Precision],
    text: BankText,
    adapters: LoftQSettings | None,
    layers: Collection[int],
) -> Iterator[tuple[int, dict[tuple[str, Precision], RoundedLinear]]]:
    """The linears of some layers in all precisions, layer by layer, the same on all processes.

    Besides the model, memory holds the hidden states of the text, and for one block the inputs of its linears and their
    sums.

    Args:
        model: narrowed and dense model, on the compute device; it is left unchanged.
        precisions: precisions to round to, without dense. Rounding is plain in formats that have no grid.
        text: text and options of the rounding.
        adapters: how adapters start; None to start them at zero.
        layers: numbers of the layers to round.

    Yields:
        Number of each layer, in ascending order, and its linears by name and precision.

    Raises:
        UserError: the model has experts, the text has fewer tokens that are not held out than a linear has inputs, or a
            weight or what reaches a linear is not finite.
    """
    if not layers:
        return
    config = replace(text.config, rounding=replace(text.config.rounding, alpha=0.0))
    units_of, calibration = unit_linears(model), text.calibration
    linears = {
        name: model.get_submodule(name) for layer in layers for names in units_of[layer].values() for name in names
    }
    config.check_text(max(linear.in_features for linear in linears.values()))
    weights: dict[str, list[Tensor]] = {}
    if config.output_groups:
        weights = output_weights(model, linears, calibration, config.output_groups)
    packing = Packing(model, config, dict.fromkeys(linears, adapters))

    def in_each(name: str, sums: SplitSums) -> dict[tuple[str, Precision], RoundedLinear]:
        return {(name, precision): packing.round(name, precision, sums) for precision in precisions}

    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number in range(max(layers) + 1):
            units = units_of[number] if number in layers else {}
            firsts = {unit: linears[names[0]] for unit, names in units.items()}
            with runner.working(number):
                block = BlockInputs(runner, number, calibration, config)
                calibration.processes.of_each(partial(block.pass_dense, states, firsts))
                layer: dict[tuple[str, Precision], RoundedLinear] = {}
                for unit, names in units.items():
                    for name, sums in block.dense_sums(unit, firsts[unit], {name: weights.get(name) for name in names}):
                        layer |= calibration.processes.of_first(partial(in_each, name, sums))
            if units:
                yield number, layer
