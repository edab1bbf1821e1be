"""`qpruner plan`: shows, compares and checks plans, and lists the ratios that a model can be pruned to."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from qpruner.errors import UserError
from qpruner.files import reading
from qpruner.plan import UNITS, CompressionPlan, LayerPlan, describe_differences, format_ranges
from qpruner.runs.tables import markdown_table

# torch and transformers, which take seconds to import, are for those that look at a model: `check` and `ratios`.


def plan_command(arguments: list[str]) -> None:
    """Shows, compares and checks compression plans, and lists the ratios that a model can be pruned to."""
    parser = argparse.ArgumentParser("qpruner plan", description=plan_command.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    base_help = "model folder or hub name; only its configuration is read"
    trust_help = "whether code that comes with the model may run"

    show = commands.add_parser("show", help="what a plan keeps of each layer")
    show.add_argument("plan", type=Path)
    show.set_defaults(run=lambda given: show_plan(CompressionPlan.read(given.plan)))

    diff = commands.add_parser("diff", help="in which layers two plans differ; exit status 1 if they do")
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    diff.set_defaults(run=lambda given: diff_plans(given.before, given.after))

    check = commands.add_parser("check", help="whether a plan is for a model, and what would be left of that")
    check.add_argument("plan", type=Path)
    check.add_argument("--base", required=True, help="model folder or hub name; its weights are only hashed")
    check.add_argument("--trust_remote_code", action="store_true", help=trust_help)
    check.set_defaults(run=lambda given: check_plan(given.plan, given.base, trust_remote_code=given.trust_remote_code))

    ratios = commands.add_parser("ratios", help="the ratios that a model can be pruned to locally, without its weights")
    ratios.add_argument("base", help=base_help)
    ratios.add_argument("--trust_remote_code", action="store_true", help=trust_help)
    ratios.add_argument("--step", type=float, default=0.05, help="between two ratios listed (default: %(default)s)")
    selection = ratios.add_argument_group("as in the selection of StructuredPruning, whose defaults they have")
    selection.add_argument("--floor", type=float, default=argparse.SUPPRESS, help="share of a layer that stays")
    selection.add_argument("--round-to", type=int, default=argparse.SUPPRESS, help="multiple for FFN widths")
    selection.add_argument("--leave-alone", type=int, default=argparse.SUPPRESS, nargs="*", metavar="LAYER")
    ratios.set_defaults(run=list_ratios)

    given = parser.parse_args(arguments)
    given.run(given)


def show_plan(plan: CompressionPlan) -> None:
    """Prints what a plan keeps."""
    dense = plan.architecture
    rows = [
        [
            str(number),
            f"{len(layer.kv_groups)} of {dense.kv_groups[number]}",
            f"{len(layer.ffn_channels)} of {dense.ffn_channels[number]}",
            *(str(layer.precision[unit]) for unit in UNITS),
        ]
        for number, layer in enumerate(plan.layers)
    ]
    print(f"A plan for a {dense.model_type} of {dense.num_layers} layers, hidden size {dense.hidden_size}.")
    print(f"Embedding {plan.embedding}, head {plan.head}.\n")
    print(markdown_table(["layer", "KV groups", "FFN channels", *UNITS], rows))


def diff_plans(path: Path, other: Path) -> None:
    """Prints where two plans differ, layer by layer and unit by unit; ends with exit status 1 when there are any."""
    before, after = map(CompressionPlan.read, (path, other))
    if differences := describe_differences(before.architecture, after.architecture):
        raise UserError(f"{str(path)!r} and {str(other)!r} are for models of different shapes: {differences}.")
    lines = [
        f"{name} {old} becomes {new}"
        for name, old, new in (
            ("embedding", before.embedding, after.embedding),
            ("head", before.head, after.head),
        )
        if old != new
    ]
    lines += [
        f"layer {number}: {change}"
        for number, layers in enumerate(zip(before.layers, after.layers, strict=True))
        for change in _changes(*layers)
    ]
    print("\n".join(lines) or "The plans are equal.")
    if lines:
        raise SystemExit(1)


def _changes(before: LayerPlan, after: LayerPlan) -> list[str]:
    changes = []
    for name, kept in (("KV groups", "kv_groups"), ("FFN channels", "ffn_channels")):
        old, new = set(getattr(before, kept)), set(getattr(after, kept))
        if gone := format_ranges(sorted(old - new)):
            changes.append(f"{name} {gone} no longer kept")
        if added := format_ranges(sorted(new - old)):
            changes.append(f"{name} {added} kept")
    changes += [
        f"{unit} {before.precision[unit]} becomes {after.precision[unit]}"
        for unit in UNITS
        if before.precision[unit] != after.precision[unit]
    ]
    return changes


def check_plan(path: Path, base: str, *, trust_remote_code: bool = False) -> None:
    """Says what a plan makes of a model.

    Raises:
        UserError: the plan is for a model of another shape, or holds something in a precision that cannot be had.
    """
    import torch

    from qpruner.anatomy import architecture_of
    from qpruner.model_folder import read_base_config
    from qpruner.outline import outline_of
    from qpruner.pretrained import model_fingerprint
    from qpruner.pricing import price
    from qpruner.pruning.rounds import Size, describe

    plan, config = CompressionPlan.read(path), read_base_config(base, trust_remote_code=trust_remote_code)
    architecture, fingerprint = architecture_of(config), model_fingerprint(base)
    model = outline_of(config).to(torch.bfloat16)
    before = Size.of(model)
    with reading(path, "Correct the plan, or make one for this model."):
        plan.check(architecture, fingerprint)
        cost = price(model, plan)
    line = describe(plan, before, Size.of(model), "as the plan says", ())
    print(f"The plan fits {base}. {line.replace('Pruned', 'It takes', 1)}")
    print(
        f"Its precisions make of that, with what stays dense in bfloat16, {cost.total:,} bytes of tensors, headers of "
        f"files apart: {cost.units:,} in the decoder linears ({cost.average_bits:.2f} bits per weight with scales) and "
        f"{cost.rest:,} in embeddings, norms and head."
    )


def list_ratios(given: Any) -> None:
    """Prints the ratios near multiples of a step that local pruning can reach, and what they mean."""
    if not 0 < given.step < 1:
        raise UserError(f"--step is {given.step}; the distance between two ratios lies in (0, 1).")
    from qpruner.memory import num_parameters
    from qpruner.model_folder import read_base_config
    from qpruner.outline import outline_of
    from qpruner.pruning.rounds import legal_ratios
    from qpruner.pruning.selection import SelectionConfig

    options = {name: value for name, value in vars(given).items() if name in ("floor", "round_to", "leave_alone")}
    model = outline_of(read_base_config(given.base, trust_remote_code=given.trust_remote_code))
    rows = [
        [
            f"{legal.ratio:.4f}",
            f"{legal.parameters:,}",
            f"{legal.linears_removed:.1%}",
            legal.kv_groups,
            legal.ffn_channels,
        ]
        for legal in legal_ratios(model, replace(SelectionConfig(), **options), given.step)
    ]
    print(f"{given.base} has {num_parameters(model):,} parameters. It can be pruned to:\n")
    print(markdown_table(["ratio", "parameters", "of the linears", "KV groups", "FFN channels"], rows))
