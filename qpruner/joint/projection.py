"""Gates within a budget: the threshold that meets it, and the plan that the gates describe.

Source: GRASPrune (arXiv:2604.19398) opens the gates with the highest score per cost until the budget is spent; here a
single threshold does that, since logits are worth per byte.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qpruner.anatomy import unit_weights
from qpruner.joint.price import kept_weights, smooth_bytes
from qpruner.joint.space import Gates, JointSpace, Logits, acting, unit_bytes
from qpruner.plan import UNITS, CompressionPlan, LayerPlan, Leading, Precision

STRUCTURE = ("groups", "channels")
FAR = 1e6
"""How far below all logits the threshold of an open gate lies; finite, since 0 times infinity would be no slope."""

Thresholds = dict[str, float | Tensor]
"""Threshold by kind of gates: a number, or for gates of structure a tensor with one for each gate."""


@torch.no_grad()
def thresholds_within(space: JointSpace, gates: Gates, limit: int) -> Thresholds:
    """The lowest thresholds, by kind of gates, at which hard gates are within a budget, disregarding short groups.

    There is one threshold for all kinds, unless the number of weights is limited: then structure has its own, if that
    limit is binding. Gates that are always open, see `always_open`, have thresholds below any logit, so that all that
    follows from thresholds agrees on them: hard gates, those of a training step, their bytes and the plan.

    Args:
        space: space of the gates.
        gates: logits of the gates that act.
        limit: most bytes that the weights of the decoder's units may take.
    """
    gates = {kind: values.cpu() for kind, values in gates.items()}  # small and used often: no device should wait
    always = always_open(space, gates)
    lowest = {kind: torch.where(is_open, -FAR, 0.0).to(gates[kind].dtype) for kind, is_open in always.items()}
    gates = relative(gates, {**dict.fromkeys(gates, 0.0), **lowest})
    of_others = _thresholds_of_closable(space, gates, closable(gates, always), limit)
    return {
        kind: torch.where(always[kind], lowest[kind], threshold) if kind in always else threshold
        for kind, threshold in of_others.items()
    }


def _thresholds_of_closable(space: JointSpace, gates: Gates, may_close: Gates, limit: int) -> dict[str, float]:
    """The thresholds of the gates that may close; the logits of the others are far above any threshold."""

    def within(thresholds: dict[str, float]) -> bool:
        return float(smooth_bytes(space, hard(gates, thresholds))) <= limit

    def equal(
        kinds: Iterable[str], fixed: dict[str, float], fits: Callable[[dict[str, float]], bool]
    ) -> dict[str, float]:
        of_kinds = {kind: may_close[kind] for kind in kinds}
        return dict.fromkeys(of_kinds, _lowest(of_kinds, lambda t: fits({**fixed, **dict.fromkeys(of_kinds, t)})))

    together = equal(gates, {}, within)
    if space.most_weights is None or not space.prunes:
        return together
    structure = [kind for kind in gates if kind in STRUCTURE]

    def few(thresholds: dict[str, float]) -> bool:
        return float(kept_weights(space, hard(gates, thresholds))) <= space.most_weights  # type: ignore[operator]

    if few(together) and not space.pins_weights:
        return together
    fixed = equal(structure, together, few)
    rest = [kind for kind in gates if kind not in STRUCTURE]
    return fixed | (equal(rest, fixed, within) if rest else {})


def always_open(space: JointSpace, gates: Gates) -> dict[str, Tensor]:
    """Which gates of structure are open whatever the threshold, by kind.

    They are all those of the layers that are left alone, and in other layers as many as must stay, those with the
    highest logits.

    Args:
        space: space of the gates.
        gates: logits of the gates that act.
    """
    always: dict[str, Tensor] = {}
    for kind, fewest in zip(STRUCTURE, space.fewest, strict=True):
        if kind in gates:
            always[kind] = torch.zeros_like(gates[kind], dtype=torch.bool)
            of_layers = zip(space.by_layer(always[kind], kind), space.by_layer(gates[kind], kind), fewest, strict=True)
            for is_open, logits, number in of_layers:
                is_open[logits.topk(number).indices] = True
    return always


def closable(gates: Gates, always: Mapping[str, Tensor]) -> Gates:
    """The logits, by kind, of the gates that are not always open, among which thresholds are sought."""
    return {kind: values[~always[kind]] if kind in always else values for kind, values in gates.items()}


def hard(gates: Gates, thresholds: Mapping[str, float | Tensor]) -> Gates:
    """1 for gates that are open, and 0 for the others."""
    return {kind: (values > _on(values, thresholds[kind])).float() for kind, values in gates.items()}


def relative(gates: Gates, thresholds: Mapping[str, float | Tensor]) -> Gates:
    """Logits relative to thresholds: gates with values above 0 are open."""
    return {kind: values - _on(values, thresholds[kind]) for kind, values in gates.items()}


def differentiable_bytes(space: JointSpace, gates: Gates) -> Tensor:
    """The exact number of bytes that the plan of hard gates stores, with the gradient of `smooth_bytes`.

    Args:
        space: space of the gates.
        gates: gates of 0 and 1; a layer without an open one is priced as if it had one.
    """  # [] float64
    smooth = smooth_bytes(space, gates)
    of_gates = {kind: values.detach().cpu() for kind, values in gates.items()}
    stored = unit_bytes(plan_of(replace(space, multiple=1), of_gates, 0.5), space.dense_size)
    return smooth + (stored - smooth).detach()


@torch.no_grad()
def plan_within(space: JointSpace, logits: Logits, limit: int) -> CompressionPlan:
    """The plan of the lowest threshold that is within a budget to the byte, with upgrades for what is left of it.

    FFN channels and lifted channels are rounded to the multiple that the space requires, FFN channels never to zero.
    Upgrades that still fit are made in the order of their logits.

    Args:
        space: space of the gates.
        logits: learned logits.
        limit: most bytes that the weights of the decoder's units may take.
    """
    gates: Gates = {kind: values.detach().cpu().double() for kind, values in acting(logits).items()}
    gates = relative(gates, thresholds_within(space, gates, limit))

    def fits(plan: CompressionPlan) -> bool:
        bounded = space.most_weights is not None and not space.pins_weights
        if bounded and unit_weights(plan.widths) > space.most_weights:  # type: ignore[operator]
            return False
        return unit_bytes(plan, space.dense_size) <= limit

    def at(threshold: float) -> CompressionPlan:
        fixed = STRUCTURE if space.pins_weights else ()
        return plan_of(space, relative(gates, {kind: 0.0 if kind in fixed else threshold for kind in gates}), 0.0)

    may_close = closable(gates, always_open(space, gates))
    plan = at(_lowest(may_close, lambda threshold: fits(at(threshold))))
    if not fits(plan):  # what is pinned does not fit even in the fewest bits
        plan = plan_of(space, gates, _lowest(may_close, lambda threshold: fits(plan_of(space, gates, threshold))))
    for layer, unit in _by_worth(gates):
        present = plan.layers[layer].precision[unit]
        place = space.offered.index(replace(present, leading=None)) + 1
        if place < len(space.offered):
            last = place == len(space.offered) - 1
            wider = replace(space.offered[place], leading=None if last else present.leading)
            upgraded = _with_precision(plan, layer, unit, wider)
            plan = upgraded if fits(upgraded) else plan
    return plan


def plan_of(space: JointSpace, gates: Gates, threshold: float) -> CompressionPlan:
    """The plan that hard gates describe, whatever it costs.

    Args:
        space: space of the gates.
        gates: logits of the gates, on the CPU.
        threshold: logit above which a gate is open.
    """
    layers = [_layer_of(space, gates, threshold, layer) for layer in range(space.num_layers)]
    plan = replace(space.dense, layers=tuple(layers))
    if space.lifts and any(layer.precision[unit].leading for layer in layers for unit in ("qkv", "gate_up")):
        order = gates["lifted_hidden"].mean((0, 1)).argsort(descending=True, stable=True)
        plan = replace(plan, hidden=tuple(order.tolist()))
    return plan


def _layer_of(space: JointSpace, gates: Gates, threshold: float, layer: int) -> LayerPlan:
    groups = _kept(space, gates, threshold, layer, "groups")
    channels = _kept(space, gates, threshold, layer, "channels")
    num_lifted = dict.fromkeys(UNITS, 0)
    if space.lifts:
        groups, num_lifted["o"] = _lifted_first(space, gates, threshold, layer, "groups", groups)
        channels, num_lifted["down"] = _lifted_first(space, gates, threshold, layer, "channels", channels)
        for place, unit in enumerate(("qkv", "gate_up")):
            number = int((gates["lifted_hidden"][layer, place] > threshold).sum())
            num_lifted[unit] = _rounded(number, space.multiple, space.widths.hidden_size)
    widths = {"o": len(groups), "down": len(channels)}
    per_group = space.widths.queries_per_group * space.widths.head_dim
    precision: dict[str, Precision] = {}
    for place, unit in enumerate(UNITS):
        upgrades = gates["upgrades"][layer, place] > threshold if "upgrades" in gates else torch.zeros(0)
        narrow = space.offered[int(upgrades.long().cumprod(0).sum())]
        if num_lifted[unit] in (0, widths.get(unit, space.widths.hidden_size)) or narrow == space.offered[-1]:
            precision[unit] = space.offered[-1] if num_lifted[unit] else narrow
        else:
            columns = num_lifted[unit] * (per_group if unit == "o" else 1)
            precision[unit] = replace(narrow, leading=Leading(columns, space.offered[-1]))
    return LayerPlan(tuple(groups), tuple(channels), precision)


def _kept(space: JointSpace, gates: Gates, threshold: float, layer: int, kind: str) -> list[int]:
    """The KV groups or FFN channels that a layer keeps, ascending."""
    total = (space.widths.kv_groups if kind == "groups" else space.widths.ffn_channels)[layer]
    if kind not in gates or layer in space.alone:
        return list(range(total))
    logits = space.by_layer(gates[kind], kind)[layer]
    multiple = space.multiple if kind == "channels" else 1
    fewest = space.fewest[STRUCTURE.index(kind)][layer]
    number = max(_rounded(int((logits > threshold).sum()), multiple, total), fewest)
    return sorted(logits.topk(number).indices.tolist())


def _lifted_first(
    space: JointSpace, gates: Gates, threshold: float, layer: int, kind: str, kept: list[int]
) -> tuple[list[int], int]:
    """The kept units, those with lifted channels first, and the number of these."""
    logits = space.by_layer(gates[f"lifted_{kind}"], kind)[layer][kept]
    number = _rounded(int((logits > threshold).sum()), space.multiple if kind == "channels" else 1, len(kept))
    first = {kept[place] for place in logits.topk(number).indices.tolist()}
    return sorted(kept, key=lambda unit: (unit not in first, unit)), number


def _rounded(number: int, multiple: int, total: int) -> int:
    """The multiple nearest to a number, among those up to the total; the total itself if the number is all of it."""
    return total if number == total else min(round(number / multiple) * multiple, total // multiple * multiple)


def _with_precision(plan: CompressionPlan, layer: int, unit: str, precision: Precision) -> CompressionPlan:
    changed = replace(plan.layers[layer], precision={**plan.layers[layer].precision, unit: precision})
    return replace(plan, layers=(*plan.layers[:layer], changed, *plan.layers[layer + 1 :]))


def _by_worth(gates: Gates) -> Iterator[tuple[int, str]]:
    """The upgrades of units as layer and unit, those with the highest logits first."""
    if "upgrades" not in gates:
        return
    logits: Tensor = gates["upgrades"]
    for place in logits.flatten().argsort(descending=True, stable=True).tolist():
        layer, rest = divmod(place, logits[0].numel())
        yield layer, UNITS[rest // logits.shape[2]]


def _lowest(gates: Gates, fits: Callable[[float], bool]) -> float:
    """The lowest threshold that fits: a logit, or less than all. If one fits, all higher ones must, too."""
    values = torch.cat([logits.flatten() for logits in gates.values()]).sort().values
    if not len(values):  # none can close, so that any threshold is as good
        return 0.0
    if fits(below := float(values[0]) - 1):
        return below
    first, last = 0, len(values) - 1  # with the last one as the threshold, all gates that can close are closed
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if fits(float(values[middle])) else (middle + 1, last)
    return float(values[first])


def _on(values: Tensor, threshold: float | Tensor) -> float | Tensor:
    """A threshold that can be compared with values."""
    return threshold.to(values.device) if isinstance(threshold, Tensor) else threshold
