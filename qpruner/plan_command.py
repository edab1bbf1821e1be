"""`qpruner plan`: shows, compares and checks plans, and lists the ratios that a model can be pruned to."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from qpruner.errors import UserError, cut
from qpruner.files import reading
from qpruner.options.functions import Function, run_one_of
from qpruner.plan import UNITS, CompressionPlan, LayerPlan, describe_differences, format_ranges
from qpruner.records.tables import markdown_table

# torch and transformers, which take seconds to import, are only imported by `check` and `ratios`.


def plan_command(arguments: list[str]) -> None:
    functions: dict[str, Function] = {"show": show, "diff": diff_plans, "check": check_plan, "ratios": list_ratios}
    summary = "Shows, compares and checks compression plans, and lists the ratios that a model can be pruned to."
    run_one_of("qpruner plan", functions, summary, arguments)


def show(plan: Path) -> None:
    """Prints what a plan keeps of each layer, and in which precision.

    Args:
        plan: file of the plan.
    """
    show_plan(CompressionPlan.read(plan))


def show_plan(plan: CompressionPlan) -> None:
    """Prints what a plan keeps of each layer, as `show`."""
    dense, ranked = plan.architecture, any(plan.ranks)
    rows = [
        [
            str(number),
            f"{len(layer.kv_groups)} of {dense.kv_groups[number]}{_order(layer.kv_groups)}",
            f"{len(layer.ffn_channels)} of {dense.ffn_channels[number]}{_experts(plan, number)}"
            f"{_order(layer.ffn_channels)}",
            *(str(layer.precision[unit]) for unit in UNITS),
            *([_rank(layer)] if ranked else []),
        ]
        for number, layer in enumerate(plan.layers)
    ]
    print(f"A plan for a {dense.model_type} of {dense.num_layers} layers, hidden size {dense.hidden_size}.")
    print(f"Embedding {plan.embedding}, head {plan.head}." + _order_of_hidden(plan) + "\n")
    print(markdown_table(["layer", "KV groups", "FFN channels", *UNITS, *(["rank"] if ranked else [])], rows))


def _rank(layer: LayerPlan) -> str:
    """The rank of a layer's adapters, for printing."""
    return "lora.r" if layer.rank is None else str(layer.rank)


def _experts(plan: CompressionPlan, number: int) -> str:
    experts = plan.architecture.num_experts(number)
    return f" in {plan.widths.num_experts(number)} of {experts} experts" if experts else ""


def _order(units: Sequence[int]) -> str:
    return "" if list(units) == sorted(units) else ", reordered"


def _order_of_hidden(plan: CompressionPlan) -> str:
    return "" if plan.hidden is None else f" Hidden channels are reordered: {_told(plan.hidden)}."


def diff_plans(before: Path, after: Path) -> None:
    """Prints how two plans differ; the exit status is 1 if they do.

    Args:
        before: file of a plan.
        after: file of the other plan.

    Raises:
        UserError: the plans are for models of different shapes.
    """
    old, new = map(CompressionPlan.read, (before, after))
    if differences := describe_differences(old.architecture, new.architecture):
        raise UserError(f"{str(before)!r} and {str(after)!r} are for models of different shapes: {differences}.")
    lines = [
        f"{name} {first} becomes {second}"
        for name, first, second in (
            ("embedding", old.embedding, new.embedding),
            ("head", old.head, new.head),
        )
        if first != second
    ]
    if old.hidden != new.hidden:
        lines.append(f"order of the hidden channels {_told(old.hidden)} becomes {_told(new.hidden)}")
    lines += [
        f"layer {number}: {change}"
        for number, layers in enumerate(zip(old.layers, new.layers, strict=True))
        for change in _changes(*layers)
    ]
    print("\n".join(lines) or "The plans are equal.")
    if lines:
        raise SystemExit(1)


def _changes(before: LayerPlan, after: LayerPlan) -> list[str]:
    changes = []
    for name, kept in (("KV groups", "kv_groups"), ("FFN channels", "ffn_channels")):
        old, new = getattr(before, kept), getattr(after, kept)
        if gone := format_ranges(sorted({*old} - {*new})):
            changes.append(f"{name} {gone} no longer kept")
        if added := format_ranges(sorted({*new} - {*old})):
            changes.append(f"{name} {added} kept")
        staying = {*old} & {*new}
        if [unit for unit in old if unit in staying] != [unit for unit in new if unit in staying]:
            changes.append(f"{name} stand in another order, {_told(new)}")
    changes += [
        f"{unit} {before.precision[unit]} becomes {after.precision[unit]}"
        for unit in UNITS
        if before.precision[unit] != after.precision[unit]
    ]
    if before.rank != after.rank:
        changes.append(f"rank of the adapters {_rank(before)} becomes {_rank(after)}")
    return changes


def _told(order: Sequence[int] | None) -> str:
    """An order of units or channels, for printing, shortened to 80 characters."""
    return "as in the model" if order is None else cut(format_ranges(order), 80)


def check_plan(plan: Path, *, base: str, trust_remote_code: bool = False) -> None:
    """Checks whether a plan fits a model, and prints the size of the model after compression.

    Args:
        plan: file of the plan.
        base: folder or hub name of the model; its weights are only hashed.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: the plan is for a model of another shape, or no format offers one of its precisions.
    """
    import torch

    from qpruner.anatomy import architecture_of, unit_weights
    from qpruner.model_folder import read_base_config
    from qpruner.outline import outline_of
    from qpruner.pretrained import model_fingerprint
    from qpruner.pricing import price
    from qpruner.pruning.rounds import Size, describe

    read, config = CompressionPlan.read(plan), read_base_config(base, trust_remote_code=trust_remote_code)
    architecture, fingerprint = architecture_of(config), model_fingerprint(base)
    model = outline_of(config).to(torch.bfloat16)
    before = Size.of(model)
    with reading(plan, "Correct the plan, or make one for this model."):
        read.check(architecture, fingerprint)
        cost = price(model, read)
    line = describe(read, before, Size.of(model), "as the plan says", ())
    print(f"The plan fits {base}. {line.replace('Pruned', 'It takes', 1)}")
    print(
        f"Its precisions make of that, with what stays dense in bfloat16, {cost.total:,} bytes of tensors, headers of "
        f"files apart: {cost.units:,} in the decoder linears ({cost.average_bits:.2f} bits per weight with scales) and "
        f"{cost.rest:,} in embeddings, norms and head. A token costs {cost.multiply_adds:,} multiply-adds in the "
        f"decoder linears, {cost.multiply_adds / unit_weights(read.architecture):.1%} of those of the dense model."
    )


def list_ratios(
    base: str,
    trust_remote_code: bool = False,
    step: float = 0.05,
    floor: float | None = None,
    round_to: int | None = None,
    leave_alone: list[int] | None = None,
    mixtures: Literal["channels", "experts"] | None = None,
) -> None:
    """Lists the ratios that a model can be pruned to locally, without its weights.

    Args:
        base: folder or hub name of the model; only its configuration is read.
        trust_remote_code: whether code that comes with the model may run.
        step: distance between listed ratios, in (0, 1).
        floor: share of the units of a layer that always stays, in (0, 1); null for the default of StructuredPruning's
            selection.
        round_to: number of which FFN widths are multiples; null for the default of StructuredPruning's selection.
        leave_alone: numbers of layers, from 0, that stay whole, separated by spaces; negative ones count from the last;
            null for the default of StructuredPruning's selection.
        mixtures: what is removed from a mixture of experts: channels of each expert, or whole experts; null for the
            default of StructuredPruning's selection.

    Raises:
        UserError: the step or an option of the selection is out of range, or the model's family is not supported.
    """
    if not 0 < step < 1:
        raise UserError(f"--step is {step}; the distance between two ratios lies in (0, 1).")
    from qpruner.memory import num_parameters
    from qpruner.model_folder import read_base_config
    from qpruner.outline import outline_of
    from qpruner.pruning.rounds import legal_ratios
    from qpruner.pruning.selection import SelectionConfig

    given: dict[str, Any] = {"floor": floor, "round_to": round_to, "leave_alone": leave_alone, "mixtures": mixtures}
    selection = replace(SelectionConfig(), **{name: value for name, value in given.items() if value is not None})
    model = outline_of(read_base_config(base, trust_remote_code=trust_remote_code))
    rows = [
        [
            f"{math.floor(legal.ratio * 10_000) / 10_000:.4f}",  # rounded up, the highest would be refused
            f"{legal.parameters:,}",
            f"{legal.linears_removed:.1%}",
            legal.kv_groups,
            legal.ffn_channels,
        ]
        for legal in legal_ratios(model, selection, step)
    ]
    print(f"{base} has {num_parameters(model):,} parameters. It can be pruned to:\n")
    print(markdown_table(["ratio", "parameters", "of the linears", "KV groups", "FFN channels"], rows))
