"""The bytes that gates cost, as a function with gradients.

A unit in a width takes its number of weights times the bytes per weight in that width. That is what is stored, except
for the last group of a row, which may be short, and for what is stored once per weight matrix;
`qpruner.joint.projection.differentiable_bytes` corrects the difference.
"""

import torch
from torch import Tensor

from qpruner.joint.space import BY_GROUPS, Gates, JointSpace
from qpruner.plan import UNITS


def smooth_bytes(space: JointSpace, gates: Gates) -> Tensor:
    """Bytes of the weights in the decoder's units, disregarding short groups; linear in each gate.

    Args:
        space: space of the gates.
        gates: gates from 0, closed, to 1, open.
    """  # [] float64
    return _in_widths(space, gates, space.bytes_per_weight).sum()


def kept_weights(space: JointSpace, gates: Gates) -> Tensor:
    """Number of weights of the decoder's units that stay, equal to multiply-adds per token; linear in each gate."""
    return _in_widths(space, gates, torch.ones_like(space.bytes_per_weight)).sum()  # [] float64


def bits_of_layers(space: JointSpace, gates: Gates) -> Tensor:
    """Mean bits of the weights that stay in each layer, scales not counted."""  # [L]
    bits = torch.tensor([float(precision.bits) for precision in space.offered], dtype=torch.float64)
    kept = _in_widths(space, gates, torch.ones_like(space.bytes_per_weight)).sum(1)
    return _in_widths(space, gates, bits.expand_as(space.bytes_per_weight)).sum(1) / kept.clamp(min=1)


def _in_widths(space: JointSpace, gates: Gates, table: Tensor) -> Tensor:
    """Sums, over the weights of units, of a quantity that a weight has in its width.

    Args:
        space: space of the gates.
        gates: gates from 0, closed, to 1, open.
        table: quantity per weight in each width, [L, 4, K].
    """  # [L, 4] float64
    device = next(iter(gates.values())).device
    table = table.to(device)
    dearest, per_weight = table[:, :, -1], of_width(table, gates)  # [L, 4]
    present = {kind: _present(space, gates, kind, device) for kind in ("groups", "channels")}
    numbers = {kind: _sums(space, values, kind) for kind, values in present.items()}
    kept, lifted = [], []
    for unit in UNITS:
        kind = "groups" if unit in BY_GROUPS else "channels"
        kept.append(numbers[kind])
        if not space.lifts:
            lifted.append(torch.zeros_like(kept[-1]))
        elif unit in ("o", "down"):  # whose input channels are the units themselves
            lifted.append(_sums(space, present[kind] * gates[f"lifted_{kind}"], kind))
        else:
            lifted.append(kept[-1] * gates["lifted_hidden"][:, int(unit == "gate_up")].double().mean(-1))
    sums = torch.stack(kept, 1) * per_weight + torch.stack(lifted, 1) * (dearest - per_weight)
    return space.weights.to(device) * sums


def of_width(table: Tensor, gates: Gates) -> Tensor:
    """A quantity of units in the widths that their upgrades give them.

    Args:
        table: quantity of units in each width, [L, 4, K].
        gates: gates from 0, closed, to 1, open.
    """  # [L, 4]
    if "upgrades" not in gates:
        return table[:, :, 0]
    reached = gates["upgrades"].to(table.dtype).cumprod(-1)  # [L, 4, K - 1]
    return table[:, :, 0] + (reached * table.diff(dim=-1)).sum(-1)


def _present(space: JointSpace, gates: Gates, kind: str, device: torch.device) -> Tensor:
    """Which KV groups or FFN channels stay, of all layers together; float64."""
    if kind in gates:
        return gates[kind].double()
    sizes = space.widths.kv_groups if kind == "groups" else space.widths.ffn_channels
    return torch.ones(sum(sizes), dtype=torch.float64, device=device)


def _sums(space: JointSpace, values: Tensor, kind: str) -> Tensor:
    """Sums within each layer; [L]."""
    return torch.stack([part.sum() for part in space.by_layer(values, kind)])
