"""Compensation: the weights that remain make up for the pruned ones, in closed form, on calibration text.

The linears that write into the residual stream, ``o`` and ``down`` of each layer, are changed by least squares (see
`qpruner.calibration.regression`), layer by layer in forward order. Experts are left as they are: routing shifts as
earlier layers change, so that the tokens an expert received before say little about what it lacks now. What a linear's
outputs lack is defined in one of two ways:

- local: the output of the dense linear for the dense model's inputs, minus the output of the narrowed linear for those
  of the inputs that it still receives. Each layer is treated independently of the others.
- sequential: the dense model's hidden states after the linear, minus those of the narrowed model, whose earlier layers
  have already been changed. A linear thus makes up for its own loss and, as far as its inputs allow, for all errors of
  the layers before it. In a family that normalizes a linear's outputs before adding them to the residual stream, it
  makes up for its own loss only.

Some tokens, such as the first of a sequence, carry activations hundreds of times larger than the rest (arXiv
2402.17762) and would dominate every sum. The next module normalizes the hidden states, so what matters is the error
relative to their size: each token is weighted by one over the mean square of the dense model's hidden states after the
linear. A quarter of the sequences is held out; it selects the ridge and decides whether a linear is changed at all.

Shapes: B sequences of a micro-batch, T tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qpruner.anatomy import DecoderLayer, decoder_layers, family_of
from qpruner.calibration.blocks import BlockRunner, block_runner, watching
from qpruner.calibration.regression import Change, Fit, Sums, fit_
from qpruner.calibration.text import Calibration, CalibrationConfig, MicroBatch
from qpruner.errors import UserError
from qpruner.likelihood import causal_model
from qpruner.offload import Offload
from qpruner.plan import CompressionPlan
from qpruner.processes import Processes
from qpruner.pruning.selection import Kept

How = Literal["local", "sequential"]
Compensation = Literal["none", "local", "sequential"]
COMPENSATION_TEXT = CalibrationConfig(num_sequences=256, length=128)
"""Default calibration text of compensation: 32,768 tokens, enough for 24,576 FFN channels."""
HELD_OUT = 4
"""Every fourth sequence is held out."""


@dataclass(frozen=True)
class Stream:
    """How a family's linears write into the residual stream.

    Args:
        scale: factor by which the outputs are multiplied before they are added (Granite's ``residual_multiplier``).
        normed: whether the outputs are normalized before they are added (Gemma 2 and 3, OLMo 2), so that what the
            hidden states lack cannot be expressed in terms of the outputs.
    """

    scale: float
    normed: bool

    @classmethod
    def of(cls, model: Any) -> "Stream":
        causal = causal_model(model)
        return cls(getattr(causal.config, "residual_multiplier", 1.0), family_of(causal.config)[1].normed_outputs)

    def behind(self, entering: Tensor, seen: Mapping[str, "Seen"]) -> dict[str, Tensor]:
        """The hidden states after each linear of a layer, in units of its outputs; the outputs alone if normalized.

        Args:
            entering: hidden states that enter the layer, [B, T, H].
            seen: inputs and outputs of the linears, by name.
        """  # name: [B, T, H], float32
        outputs = {name: of_linear.outputs.float() for name, of_linear in seen.items()}
        if self.normed:
            return outputs
        behind_o = entering.to(outputs["o"]) / self.scale + outputs["o"]
        return {"o": behind_o} | ({"down": behind_o + outputs["down"]} if "down" in outputs else {})


@dataclass(frozen=True)
class Seen:
    """The inputs [B, T, I] and outputs [B, T, H] of a linear for a micro-batch."""

    inputs: Tensor
    outputs: Tensor


class OutputLinears:
    """Records the two output linears of one layer, dense or narrowed, in the forward pass; of a mixture only ``o``.

    Args:
        runner: block runner of the model.
        number: index of the layer.
        layer: the layer's projections.
    """

    def __init__(self, runner: BlockRunner, number: int, layer: DecoderLayer) -> None:
        self.linears: dict[str, nn.Linear] = {"o": layer.o}
        if not layer.experts:
            self.linears["down"] = layer.down
        self._runner, self._number = runner, number

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, moved off the device until it is needed again."""
        return self._runner.keep(tensor)

    def work(self, states: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[str, Seen]]]:
        """For each micro-batch, the output of the layer and the inputs and outputs of its linears."""
        seen: dict[str, Seen] = {}

        def see(name: str, inputs: Tensor, outputs: Tensor) -> None:
            seen[name] = Seen(inputs, outputs)

        with watching(self.linears, see):
            for output in self._runner.outputs(self._number, states):
                yield output, seen
                seen.clear()


def compensate_(model: Any, dense: Any, kept: Kept, calibration: Calibration, how: How) -> dict[str, Fit]:
    """Changes ``o`` and ``down`` of every layer of a narrowed model, the same on all processes.

    Args:
        model: narrowed model, possibly with adapters, whose linears are not packed.
        dense: model before it was narrowed, on the same device.
        kept: [layers], indices of the KV groups and FFN channels of ``dense`` that ``model`` has, in its order. The
            hidden channels of both models are in the same order.
        calibration: this process's share of the text.
        how: whether the errors of earlier layers count, too (``sequential``) or not (``local``).

    Returns:
        The fit of each linear, by ``layer.projection``.
    """
    fits: dict[str, Fit] = {}
    stream, processes = Stream.of(model), calibration.processes
    layers = list(zip(decoder_layers(causal_model(dense)), decoder_layers(causal_model(model)), kept, strict=True))
    with block_runner(dense, calibration) as before, block_runner(model, calibration) as after:
        dense_states = before.embed()
        states = after.embed() if how == "sequential" else []
        for number, (whole, layer, units) in enumerate(layers):
            dense_layer, narrow = OutputLinears(before, number, whole), OutputLinears(after, number, layer)
            if how == "local":
                with after.working(number):
                    missing = _lost(dense_layer, narrow, dense_states, _places(whole, units), calibration, stream)
                    for name, linear in narrow.linears.items():
                        fits[f"{number}.{name}"] = _change_(
                            f"{number}.{name}", linear, missing.pop(name), processes, after.offload
                        )
                continue
            targets = _targets(dense_layer, dense_states, stream)
            with after.working(number):
                for name, linear in narrow.linears.items():
                    # The sums are not bound to a name here, so that those of one linear are freed before the next one's
                    # are made.
                    fits[f"{number}.{name}"] = _change_(
                        f"{number}.{name}",
                        linear,
                        _lacked(narrow, name, states, targets, calibration, stream),
                        processes,
                        after.offload,
                    )
                for place, (output, _) in enumerate(narrow.work(states)):
                    states[place] = after.keep(output)
    return fits


def shared_copy(model: nn.Module) -> Any:
    """A copy that shares its tensors with the model until either of the two is given new ones."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def places_among(before: CompressionPlan, after: CompressionPlan) -> Kept:
    """The indices of the units that a plan keeps, in its order, among those of an earlier plan of the same model."""
    return [
        (_places_of(later.kv_groups, earlier.kv_groups), _places_of(later.ffn_channels, earlier.ffn_channels))
        for earlier, later in zip(before.layers, after.layers, strict=True)
    ]


def _places_of(units: Sequence[int], among: Sequence[int]) -> list[int]:
    places = {unit: place for place, unit in enumerate(among)}
    return [places[unit] for unit in units]


def compensated_widths(layer: DecoderLayer) -> list[int]:
    """The number of inputs of each linear of a layer that compensation changes."""
    return [layer.o.in_features] + ([] if layer.experts else [layer.down.in_features])


def check_text(config: CalibrationConfig, widest: int) -> None:
    """Makes sure that there is enough text for least squares.

    Args:
        config: options of the calibration text.
        widest: largest number of inputs of ``o`` and ``down`` in a layer.

    Raises:
        UserError: there are fewer deciding tokens than a linear has inputs, or no sequence to hold out.
    """
    deciding = config.num_sequences - config.num_sequences // HELD_OUT
    if config.num_sequences < HELD_OUT or deciding * config.length < widest:
        must_decide = -(-widest // config.length)
        needed = max(HELD_OUT, must_decide + (must_decide - 1) // (HELD_OUT - 1))
        raise UserError(
            f"compensation_text has {config.num_sequences} sequences of {config.length} tokens, of which "
            f"{deciding * config.length:,} tokens decide, since a quarter of the sequences is held out; the widest "
            f"linear has {widest:,} inputs and needs as many. Give at least {needed} sequences, or use compensation "
            f"none."
        )


def describe(fits: Mapping[str, Fit], num_tokens: int) -> str:
    """A one-line summary of what compensation did."""
    changed = [fit for fit in fits.values() if fit.changes]
    left = [1 - fit.after / fit.before for fit in changed]
    gained = f"; what these lacked on held-out text is {sum(left) / len(left):.1%} less in the mean" if left else ""
    experts = "" if any(name.endswith("down") for name in fits) else "; experts stay as they are"
    return f"Compensated {len(changed)} of {len(fits)} linears on {num_tokens:,} tokens{gained}{experts}."


def _lost(
    dense: OutputLinears,
    narrow: OutputLinears,
    states: list[Tensor],
    places: Mapping[str, Tensor],
    calibration: Calibration,
    stream: Stream,
) -> dict[str, "SplitSums"]:
    """Sums of what each linear's outputs lost; ``states`` advance to the next dense layer."""
    device = calibration.processes.device
    sums = {name: SplitSums(linear.in_features, linear.out_features, device) for name, linear in narrow.linears.items()}

    def add(name: str, place: int, seen: dict[str, Seen]) -> None:
        inputs = seen[name].inputs[..., places[name].to(seen[name].inputs.device)]
        with torch.no_grad(), calibration.processes.forward_context():
            reached = narrow.linears[name](inputs)
        missing = seen[name].outputs.float() - reached.float()
        sums[name].add(calibration.batches[place], inputs, missing, stream.behind(states[place], seen)[name])

    for place, (output, seen) in enumerate(dense.work(states)):
        for name in sums:
            add(name, place, seen)
        states[place] = dense.keep(output)
    return sums


def _targets(dense: OutputLinears, states: list[Tensor], stream: Stream) -> list[dict[str, Tensor]]:
    """The dense model's hidden states after each linear, by micro-batch; ``states`` advance to the next layer."""
    targets = []
    for place, (output, seen) in enumerate(dense.work(states)):
        targets.append({name: dense.keep(hidden) for name, hidden in stream.behind(states[place], seen).items()})
        states[place] = dense.keep(output)
    return targets


def _lacked(
    narrow: OutputLinears,
    name: str,
    states: list[Tensor],
    targets: list[dict[str, Tensor]],
    calibration: Calibration,
    stream: Stream,
) -> "SplitSums":
    """Sums of what a linear's outputs lack relative to the targets, which are consumed."""
    linear = narrow.linears[name]
    sums = SplitSums(linear.in_features, linear.out_features, calibration.processes.device)

    # A function, so that no tensor is still referenced when the block runs again.
    def add(place: int, seen: dict[str, Seen]) -> None:
        target = targets[place].pop(name).to(calibration.processes.device)
        missing, inputs = target - stream.behind(states[place], seen)[name], seen[name].inputs
        seen.clear()
        sums.add(calibration.batches[place], inputs, missing, target)

    for place, (_, seen) in enumerate(narrow.work(states)):
        add(place, seen)
    return sums


def _places(layer: DecoderLayer, units: tuple[Sequence[int], Sequence[int]]) -> dict[str, Tensor]:
    """The input columns of a dense layer's linears that belong to the given units."""
    groups, channels = units
    parts = {part.name: part for part in layer.outputs}
    places = {"o": parts["o"].places(groups)}
    return places | ({} if layer.experts else {"down": parts["down"].places(channels)})


class SplitSums:
    """Sums over the sequences that determine a linear's change, and over those that are held out."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.sums, self.held_out = (Sums.none(num_inputs, num_outputs, device) for _ in range(2))

    def add(self, batch: MicroBatch, inputs: Tensor, missing: Tensor, behind: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            batch: micro-batch that the tokens belong to.
            inputs: inputs of the linear, [B, T, I].
            missing: what its outputs lack, [B, T, H].
            behind: the dense model's hidden states after the linear, [B, T, H]; see `Stream.behind`.
        """
        size = behind.square().mean(-1)  # [B, T]
        weights = torch.where(size > 0, size.reciprocal(), 0.0)
        numbers = batch.first + torch.arange(len(inputs), device=inputs.device)
        held_out = numbers % HELD_OUT == HELD_OUT - 1
        for sums, rows in ((self.sums, ~held_out), (self.held_out, held_out)):
            sums.add_(inputs[rows].flatten(0, 1), missing[rows].flatten(0, 1), weights[rows].flatten())

    def over(self, processes: Processes) -> dict[str, Sums]:
        """The sums over the tokens of all processes: for the sequences that ``decide``, and for those ``held_out``."""
        return {"decide": self.sums.over(processes), "held_out": self.held_out.over(processes)}


def _change_(name: str, linear: nn.Linear, sums: SplitSums, processes: Processes, offload: Offload | None) -> Fit:
    """Changes a linear, or the base layer of its adapter, by the sums of all processes."""
    base: nn.Linear = getattr(linear, "base_layer", linear)
    decides, held_out = sums.over(processes).values()
    # The sum of float64 sums over float32 numbers is finite where all of them are, and takes no memory.
    if not all(bool(tensor.sum().isfinite()) for tensor in (*decides.tensors, *held_out.tensors)):
        raise UserError(
            f"What reaches {name} (layer.projection) in compensation is not finite, or what it should give is not. "
            f"Use --model.dtype bfloat16 or float32, another base model, or compensation none."
        )

    def find() -> tuple[Change | None, Fit]:
        change, fit = fit_(decides, held_out, bias=base.bias is not None, offload=offload)
        return None if change is None else change.cpu(), fit

    change, fit = processes.of_first(find)
    add_(base, change)
    return fit


def add_(linear: nn.Linear, change: Change | None) -> None:
    """Adds a change, if any, to a linear; a dense model that shares its tensors is left as it was."""
    if change is not None:
        linear.weight = _added(linear.weight, change.weight)
        if change.bias is not None:
            linear.bias = _added(linear.bias, change.bias)


def _added(parameter: Tensor, change: Tensor) -> nn.Parameter:
    """The sum, as a new parameter: a dense model may share the old one."""
    total = parameter.detach().to(torch.float64, copy=True).add_(change.to(parameter.device))
    return nn.Parameter(total.to(parameter.dtype), requires_grad=False)
