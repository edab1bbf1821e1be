"""The initial logits of gates: each gate's worth per byte, by the Fisher information of the dense model.

The loss L of a training row has the slope g = dL/dz in a gate z at the dense model. For gates that close, or weights
that move, by one, the expected rise of the loss to second order is half the mean of g^2 over rows, with the Fisher
information in place of the Hessian. So

    rise of a closed unit         1/2 E[(dL/dz)^2]
    rise of a width, Q for W      1/2 E[<dL/dW, Q - W>^2]

and a logit is the logarithm of the rise that an open gate avoids, divided by the bytes that it costs.

This orders gates of one kind well, but not gates of different kinds, since large rises are not quadratic. So the worth
of a whole kind relative to the others is found by trial: it is the number with the least loss once gates are projected
to the budget.

Source of the expansion: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning" (arXiv:1906.10771),
for units; its use for widths, and per byte, is our addition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qpruner.datamodules.rows import Batch, TextExamples
from qpruner.errors import UserError
from qpruner.joint.network import GatedNetwork
from qpruner.joint.projection import STRUCTURE, hard, thresholds_within
from qpruner.joint.space import Gates, JointSpace, Logits, acting
from qpruner.likelihood import token_nll
from qpruner.plan import UNITS
from qpruner.processes import Processes

LEAST = 1e-6
"""Smallest rise, as a share of the mean of its kind; it bounds how far a logit can lie below the mean."""
SHIFTS = (0.0, -4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 6.0, 20.0)
"""Shifts to try for the logits of a kind relative to the others, on top of Fisher information; with the last, nothing
of the kind is removed while anything else can be."""
LIFTS = ("lifted_groups", "lifted_channels", "hidden_share")


@dataclass(frozen=True)
class Text:
    """Rows by which gates are initialised and compared, whole and with the same targets as in training.

    Args:
        batches: this process's share of the rows, in batches like those of training; there may be none.
        num_rows: number of rows over all processes.
        num_scored: number of targets over all processes.
    """

    batches: Sequence[Batch]
    num_rows: int
    num_scored: int

    @classmethod
    def share(cls, examples: TextExamples, rows: Sequence[int], batch_size: int, processes: Processes) -> Self:
        """This process's share of rows of a split.

        Args:
            examples: rows of the split.
            rows: numbers of the rows, the same on all processes.
            batch_size: most rows in a batch.
            processes: processes that share the rows.

        Raises:
            UserError: nothing in these rows is a target.
        """
        num_scored = examples.num_scored(rows)
        if not num_scored:
            raise UserError(
                f"None of the {len(rows)} training rows that gates begin with has a token to predict. Raise "
                f"joint.start_rows, or check the labels of the training split."
            )
        mine = rows[processes.rank :: processes.world_size]
        parts = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
        return cls([examples.collate(part) for part in parts], len(rows), num_scored)


def fisher_logits(gated: GatedNetwork, text: Text, processes: Processes) -> Logits:
    """The logits that the Fisher information of the dense model suggests.

    Args:
        gated: dense model with its gates.
        text: rows by whose losses gates are judged.
        processes: processes that share the text.

    Raises:
        UserError: the loss of the dense model, or its slopes, are not finite.
    """
    gates = _at_dense(gated.space, processes.device)
    sums = {kind: torch.zeros_like(gate, dtype=torch.float64) for kind, gate in gates.items()}
    gated.open(gates)
    with gated.dense():
        for batch in text.batches:
            for row in range(len(batch["labels"])):  # each row's own gradient is squared
                losses = _losses(gated, batch, slice(row, row + 1), processes)
                for kind, slope in zip(gates, torch.autograd.grad(losses.sum(), [*gates.values()]), strict=True):
                    sums[kind] += slope.double().square()
    means = {kind: processes.reduce(values).cpu() / text.num_rows for kind, values in sums.items()}
    if not all(bool(values.isfinite().all()) for values in means.values()):
        raise UserError(
            f"On the {text.num_rows} training rows that gates begin with, the loss of the dense model or one of its "
            f"slopes is not finite. Use --model.dtype bfloat16 or float32, or another base model."
        )
    return _logits(gated.space, {kind: 0.5 * mean for kind, mean in means.items()})


@torch.no_grad()
def balanced(gated: GatedNetwork, start: Logits, limit: int, text: Text, processes: Processes) -> Logits:
    """The logits, with the relative worth of kinds chosen by the loss of the projected gates.

    Args:
        gated: dense model with its gates.
        start: logits that order the gates of each kind.
        limit: most bytes that the weights of the decoder's units may take.
        text: rows by whose losses gates are judged.
        processes: processes that share the text.
    """
    best = dict(start)
    for kinds in (STRUCTURE, LIFTS):
        if not (moved := [kind for kind in kinds if kind in start]) or len(moved) == len(start):
            continue
        tried = [{**best, **{kind: best[kind] + shift for kind in moved}} for shift in SHIFTS]
        losses = [loss_of(gated, logits, limit, text, processes) for logits in tried]
        best = tried[losses.index(min(losses))]
    return best


@torch.no_grad()
def loss_of(gated: GatedNetwork, logits: Logits, limit: int, text: Text, processes: Processes) -> float:
    """Total negative log-likelihood of the text under the gates that a budget leaves open, over all processes.

    Infinite where it is not a number or the logits are not, so that such gates are never the best of several.
    """
    if not all(bool(values.isfinite().all()) for values in logits.values()):
        return math.inf
    gates = {kind: values.to(processes.device) for kind, values in acting(logits).items()}
    gated.open(hard(gates, thresholds_within(gated.space, gates, limit)))
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    for batch in text.batches:
        total += _losses(gated, batch, slice(None), processes).sum().double()
    loss = float(processes.reduce(total))
    return loss if math.isfinite(loss) else math.inf


def _losses(gated: GatedNetwork, batch: Batch, rows: slice, processes: Processes) -> Tensor:
    """Negative log-likelihood of the targets in some rows of a batch, [rows, T - 1]."""
    tokens, labels, mask = (
        batch[part][rows].to(processes.device) for part in ("input_ids", "labels", "attention_mask")
    )
    with processes.forward_context():
        return token_nll(gated.network, tokens, labels, mask)


def _at_dense(space: JointSpace, device: torch.device) -> Gates:
    """Gates at which gradients are taken: all units stay, and weights may move to each of the widths."""
    groups, channels = sum(space.widths.kv_groups), sum(space.widths.ffn_channels)
    gates: dict[str, Tensor] = {}
    if space.prunes:
        gates |= {"groups": torch.ones(groups), "channels": torch.ones(channels)}
    if len(space.offered) > 1:
        gates["mixture"] = torch.eye(len(space.offered))[0].repeat(space.num_layers, len(UNITS), 1)
    if space.lifts:
        gates |= {"lifted_groups": torch.zeros(groups), "lifted_channels": torch.zeros(channels)}
        gates["lifted_hidden"] = torch.zeros(space.num_layers, 2, space.widths.hidden_size)
    return {kind: gate.to(device).requires_grad_() for kind, gate in gates.items()}


def _logits(space: JointSpace, rises: Gates) -> Logits:
    weights, table = space.weights, space.bytes_per_weight  # [L, 4], [L, 4, K]
    widths = space.widths
    counts = torch.tensor(
        [
            [groups, groups, channels, channels]
            for groups, channels in zip(widths.kv_groups, widths.ffn_channels, strict=True)
        ]
    )
    mean = float(table.mean())  # bytes of a weight
    spread = table[:, :, -1] - table[:, :, 0]
    logits: dict[str, Tensor] = {}

    def of_units(kind: str, costs: Tensor) -> Tensor:
        """Logits of a kind whose gates cost the same bytes within a layer; ``costs`` is [L]."""
        sizes = widths.kv_groups if kind.endswith("groups") else widths.ffn_channels
        return _worth(rises[kind], costs.repeat_interleave(torch.tensor(sizes)))

    if space.prunes:
        logits["groups"] = of_units("groups", mean * weights[:, :2].sum(1))
        logits["channels"] = of_units("channels", mean * weights[:, 2:].sum(1))
    if len(space.offered) > 1:
        logits["upgrades"] = _worth(-rises["mixture"].diff(dim=-1), (weights * counts)[:, :, None] * table.diff(dim=-1))
    if space.lifts:
        logits["lifted_groups"] = of_units("lifted_groups", weights[:, 1] * spread[:, 1])
        logits["lifted_channels"] = of_units("lifted_channels", weights[:, 3] * spread[:, 3])
        costs = (weights * counts * spread)[:, [0, 2], None] / widths.hidden_size
        hidden = _worth(rises["lifted_hidden"], costs)
        logits["hidden_share"] = hidden.mean(-1)
        logits["hidden_order"] = (hidden - hidden.mean(-1, keepdim=True)).mean((0, 1))
    return {kind: logits[kind].float() for kind in space.shapes}


def _worth(rises: Tensor, costs: Tensor) -> Tensor:
    """Logarithm of the rise that gates avoid per byte that they cost."""
    return torch.log(rises.clamp(min=LEAST * float(rises.clamp(min=0).mean()) + 1e-30) / costs)
