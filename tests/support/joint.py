"""Tiny models with gates in them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpruner.anatomy import architecture_of
from qpruner.datamodules.rows import Row, TextExamples, TokenRows
from qpruner.joint.config import JointConfig
from qpruner.joint.learner import Ground, PlanLearner
from qpruner.joint.network import GatedNetwork
from qpruner.joint.prior import Text
from qpruner.joint.space import Gates, JointSpace
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.quantization.bank import Bank, fill
from support.families import VOCAB, tiny_model

TWO, THREE, FOUR = (Precision("affine-double", bits, 32) for bits in (2, 3, 4))
OFFERED = (TWO, THREE, FOUR)
CPU = torch.device("cpu")


def space_of(model: Any, **changes: Any) -> JointSpace:
    """The gates of a model."""
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    return JointSpace(**{"dense": plan, "offered": OFFERED, "dense_size": 4, **changes})


def between(space: JointSpace, share: float = 0.5) -> int:
    """The bytes of a budget between the cheapest plan and the dearest."""
    return int(space.cheapest + share * (space.dearest - space.cheapest))


def gated(family: str = "llama", **changes: Any) -> tuple[GatedNetwork, Bank]:
    """A tiny model with gates in it, and the bank of its widths."""
    model = tiny_model(family)
    space = space_of(model, **changes)
    bank = fill(model, space.offered, None, device=CPU)
    return GatedNetwork(model, bank, space), bank


def examples_of(tokens: Sequence[Tensor], prompt: int = 0) -> TextExamples:
    """Rows of tokens, of which all but the first few are targets."""
    rows = [Row(one.int().numpy(), np.arange(len(one)) >= prompt, np.zeros(len(one), np.int32)) for one in tokens]
    return TextExamples(TokenRows.of(rows), pad_token=0)


def text_of(tokens: Sequence[Tensor], prompt: int = 0, processes: Processes | None = None) -> Text:
    """One process's share of rows of tokens to judge gates by, four in a batch."""
    return Text.share(examples_of(tokens, prompt), range(len(tokens)), 4, processes or Processes.alone())


def gates_of(space: JointSpace, seed: int = 0, share: float = 0.6) -> Gates:
    """Random gates of 0 and 1 of all kinds that act, with one open in each layer and each kind of unit."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) < share).float()

    groups, channels = sum(space.widths.kv_groups), sum(space.widths.ffn_channels)
    gates: dict[str, Tensor] = {}
    if space.prunes:
        gates |= {"groups": draw(groups), "channels": draw(channels)}
        for kind, values in gates.items():
            for part in space.by_layer(values, kind):
                part[0] = 1.0
    if len(space.offered) > 1:
        gates["upgrades"] = draw(space.num_layers, len(UNITS), len(space.offered) - 1)
    if space.lifts:
        gates |= {"lifted_groups": draw(groups), "lifted_channels": draw(channels)}
        order = torch.arange(space.widths.hidden_size).flip(0)  # the same for all layers, the last channel first
        counts = torch.randint(0, len(order) + 1, (space.num_layers, 2, 1), generator=generator)
        gates["lifted_hidden"] = (order < counts).float()
    return gates


TEXT = text_of(torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(3)))
(BATCH,) = TEXT.batches


def learner_of(space: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> PlanLearner:
    """What learns gates of a tiny model at their start, without a Trainer; its text is `TEXT`."""
    network, _ = gated(**space)
    config = JointConfig(**{"steps": 20, **options})
    limits = [between(network.space), *(between(network.space, 0.3) for _ in config.further_budgets)]
    learner = PlanLearner(config, lambda _: (Ground(network, TEXT, Processes.alone()), limits), seed=0)
    learner.setup("fit")
    learner.on_fit_start()
    learner.log = learner.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return learner
