"""Says what becomes of the plan that a search of widths is to start from, where the search cannot try it as it is.

What is tried for it has widths, bits and ranks that the search offers, is within the budget, and leaves no bytes that
would buy more. It starts from the nearest of these. Where the widths need more multiply-adds than the budget has, or
more bytes even in the fewest bits, the shares of all parts are lowered by the same number, the smallest that is enough.
The bytes then buy bits and ranks, first those that the plan has.
"""

from qpruner.anatomy import unit_shapes, unit_weights
from qpruner.plan import UNITS, CompressionPlan


def departures(given: CompressionPlan, tried: CompressionPlan, rank: int) -> list[str]:
    """What a plan that is tried has otherwise than the given one that it stands for, in words; empty if nothing.

    The order in which units and channels stand is not compared: it changes nothing.

    Args:
        given: plan to start from.
        tried: plan that is tried in its place, for the same model.
        rank: rank of adapters in layers for which a plan has none.
    """
    layers = list(zip(given.layers, tried.layers, strict=True))
    narrowed = sum(
        {*one.kv_groups} != {*other.kv_groups} or {*one.ffn_channels} != {*other.ffn_channels} for one, other in layers
    )
    repacked = sum(one.precision[unit] != other.precision[unit] for one, other in layers for unit in UNITS)
    ranked = sum((one.rank or rank) != (other.rank or rank) for one, other in layers)
    told = []
    if narrowed:
        shares = [f"{100 * share_of_weights(plan):.1f} %" for plan in (tried, given)]
        told.append(
            f"keeps {shares[0]} of the weights of the decoder linears and not {shares[1]}, with other units in "
            f"{narrowed} of {len(layers)} layers"
        )
    if repacked:
        bits = [f"{mean_bits(plan):.2f}" for plan in (tried, given)]
        told.append(
            f"has {bits[0]} bits per weight without scales and not {bits[1]}, with another precision in {repacked} of "
            f"{len(layers) * len(UNITS)} units of quantization"
        )
    if ranked:
        told.append(f"has adapters of another rank in {ranked} of {len(layers)} layers")
    for name in ("embedding", "head"):
        if (wanted := getattr(given, name)) != (held := getattr(tried, name)):
            told.append(f"holds the {name} in {held} and not {wanted}")
    return told


def share_of_weights(plan: CompressionPlan) -> float:
    """Share of the weights of the decoder linears that a plan keeps; without experts, of multiply-adds, too."""
    return unit_weights(plan.widths) / unit_weights(plan.architecture)


def mean_bits(plan: CompressionPlan) -> float:
    """Average bits per weight of the decoder linears, without scales."""
    widths = plan.widths
    bits = sum(
        rows * columns * layer.precision[unit].mean_bits(columns)
        for number, layer in enumerate(plan.layers)
        for unit, shapes in unit_shapes(widths, number).items()
        for rows, columns in shapes
    )
    return bits / unit_weights(widths)
