"""The gates that are learned: the modules that emit their logits, and how logits become open or closed gates.

A logit is the logarithm of a gate's worth per byte that it costs; gates are open if their worth is above a threshold,
the same for all gates. So the threshold is the price of a byte: the dual variable of the budget, and moving it leads
from the cheapest plan to the most expensive.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qpruner.joint.space import Gates

OF_UNITS = ("groups", "channels", "lifted_groups", "lifted_channels")
"""Kinds with a gate for each KV group or FFN channel."""
INPUT, HIDDEN = 32, 64
"""Dimension of each input of the hypernetwork, and of the state of its recurrent network in each direction."""


class PlainGates(nn.Module):
    """A parameter for each gate.

    Args:
        shapes: shape of each kind of gates.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shifts = nn.ParameterDict({kind: nn.Parameter(torch.zeros(shape)) for kind, shape in shapes.items()})

    def forward(self, budget: float) -> Gates:
        """What is added to the start of the logits; the same for every budget."""
        return dict(self.shifts.items())


class LayerGates(nn.Module):
    """A parameter for the worth of all units of a layer, and one for each other gate.

    The initial logits decide which units of a layer stay; the gradients of its thousands of channels, mostly noise, are
    summed.

    Args:
        shapes: shape of each kind of gates.
        sizes: number of gates in each layer, by kind.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.sizes = {kind: torch.tensor(sizes[kind]) for kind in shapes if kind in OF_UNITS}
        self.rest = PlainGates({kind: shape for kind, shape in shapes.items() if kind not in OF_UNITS})
        self.of_layers = PlainGates({kind: (len(of_layers),) for kind, of_layers in self.sizes.items()})

    def forward(self, budget: float) -> Gates:
        """What is added to the start of the logits; the same for every budget."""
        layers = {
            kind: values.repeat_interleave(self.sizes[kind].to(values.device))
            for kind, values in self.of_layers(budget).items()
        }
        return {**layers, **self.rest(budget)}


class Hypernetwork(nn.Module):
    """Emits all gates from a recurrent network over the layers, so that what one gate learns reaches the others.

    Frozen random inputs [L, 1, 32] and the logarithm of the budget go through a bidirectional GRU with 64 units per
    direction, a layer norm, GELU, and a linear without bias for each layer.

    Source: Gao et al., DISP-LLM, 2024 (arXiv:2410.11988), its code; one step of the recurrent network is a layer here
    and a mask there, and the budget as an input is our addition.

    Args:
        shapes: shape of each kind of gates.
        sizes: number of gates in each layer, by kind; kinds that are missing belong to no layer, and their gates are
            parameters.
        seed: seed of the frozen inputs and of the initial parameters.
    """

    inputs: Tensor

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Sequence[int]], seed: int) -> None:
        super().__init__()
        self.sizes = {kind: list(of_layers) for kind, of_layers in sizes.items()}
        self.shapes = {kind: shapes[kind] for kind in self.sizes}
        self.whole = PlainGates({kind: shape for kind, shape in shapes.items() if kind not in self.sizes})
        per_layer = [sum(of_layers) for of_layers in zip(*self.sizes.values(), strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(per_layer), 1, INPUT))
            self.of_budget = nn.Linear(1, INPUT, bias=False)
            self.recurrent = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            self.norm = nn.LayerNorm(2 * HIDDEN)
            self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, number, bias=False) for number in per_layer)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)  # begins at the start of the logits

    def forward(self, budget: float) -> Gates:
        """What is added to the start of the logits, for the logarithm of a budget."""
        inputs = self.inputs + self.of_budget(self.inputs.new_tensor([[[budget]]]))
        states = nn.functional.gelu(self.norm(self.recurrent(inputs)[0][:, 0]))  # [L, 128]
        layers = [
            head(state).split([self.sizes[kind][number] for kind in self.shapes])
            for number, (head, state) in enumerate(zip(self.heads, states, strict=True))
        ]
        by_kind = zip(self.shapes, zip(*layers, strict=True), strict=True)
        of_layers = {kind: torch.cat(parts).view(self.shapes[kind]) for kind, parts in by_kind}
        return {**of_layers, **self.whole(budget)}


Estimator = Literal["reinmax", "straight_through"]


def sampled(logits: Gates, temperature: float, generator: torch.Generator) -> Gates:
    """Logits with logistic noise of a temperature; the same on all processes that have the same generator."""
    return {kind: values + temperature * _logistic(values, generator) for kind, values in logits.items()}


def opened(logits: Gates, noisy: Gates, temperature: float, estimator: Estimator) -> Gates:
    """Gates of 0 and 1, with a gradient through which their logits learn.

    An open gate is a sample of a Bernoulli variable with p = sigmoid(logit / temperature). ``straight_through`` takes
    the slope of the sigmoid at the noisy logit (Gumbel-sigmoid). ``reinmax`` takes that of the expected loss, to second
    order: with g the slope of the loss in the gate, known only at the sample, g(0) and g(1) each have half the weight
    by the trapezoidal rule, divided by the probability of being sampled:

        d E[L] / d logit = p (1 - p) / temperature * (g(0) + g(1)) / 2,  so  (1 - p) / 2 where open, p / 2 where closed.

    Weights in one width are far from those in another, and the loss is curved between them: the slope at one end alone
    misses the difference by as much as the difference itself.

    Source: Liu et al. 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond" (arXiv:2304.08612),
    theorem 3.1, of which this is the case of two values.

    Args:
        logits: logits above the threshold.
        noisy: the same logits with noise; gates above 0 are open.
        temperature: temperature of the noise.
        estimator: how the gradient is estimated.
    """  # float32
    return {kind: _opened(values, noisy[kind], temperature, estimator) for kind, values in logits.items()}


def _opened(logits: Tensor, noisy: Tensor, temperature: float, estimator: Estimator) -> Tensor:
    is_open = (noisy > 0).float()
    if estimator == "straight_through":
        through = torch.sigmoid(noisy.float() / temperature)
    else:
        probability = torch.sigmoid(logits.detach().float() / temperature)
        slope = torch.where(noisy > 0, 1 - probability, probability) / (2 * temperature)
        through = slope * logits.float()
    return is_open + (through - through.detach())  # 0 or 1 to the bit


def entropy(logits: Gates, temperature: float) -> float:
    """Mean entropy of gates in bits, from logits above the threshold: 1 if nothing is decided, 0 if everything is."""
    probabilities = torch.cat([torch.sigmoid(values / temperature).flatten() for values in logits.values()])
    undecided = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return float(undecided.mean() / torch.log(torch.tensor(2.0)))


def _logistic(like: Tensor, generator: torch.Generator) -> Tensor:
    """Logistic noise, drawn on the CPU, so that it is the same on every device."""
    tiny = torch.finfo(torch.float32).eps
    # Not the default dtype, which differs between a step and the projection of its gradient under half precision.
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float32).clamp(tiny, 1 - tiny)
    return torch.logit(uniform).to(like.device)
