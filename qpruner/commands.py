"""Commands that need no Trainer: they read files, print, and are done."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from qpruner.anatomy import architecture_of
from qpruner.checkpoint import build_skeleton, read_base_config
from qpruner.errors import UserError
from qpruner.files import reading
from qpruner.memory import num_parameters
from qpruner.plan import UNITS, CompressionPlan, LayerPlan, describe_differences, format_ranges
from qpruner.pretrained import model_fingerprint
from qpruner.pricing import price
from qpruner.pruning.rounds import Size, describe, legal_ratios
from qpruner.pruning.selection import SelectionConfig
from qpruner.runs.folder import RunFolder
from qpruner.runs.report import Summary, protocol_line, table, write_report
from qpruner.runs.search import SearchResults, variants_table, write_search_report
from qpruner.runs.tables import markdown_table


def report(arguments: list[str]) -> None:
    """Writes the report of a run again, from what its folder holds, and prints its table."""
    parser = argparse.ArgumentParser("qpruner report", description=report.__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/quickstart")
    folder = RunFolder(parser.parse_args(arguments).run)
    if folder.results.exists():
        results = SearchResults.read(folder.results)
        write_search_report(folder, results)
        print(f"\n{variants_table(results)}")
        return
    if not folder.summary.exists():
        raise UserError(
            f"{str(folder.path)!r} holds no summary.json: no fit has measured anything there yet, "
            f"and no search has ended."
        )
    write_report(folder)
    show_summary(Summary.read(folder.summary), "test")


@rank_zero_only
def show_summary(summary: Summary, split: str) -> None:
    print(f"\n{table(summary)}\n\n{protocol_line(summary, split)}")


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
    ratios.add_argument("--floor", type=float, default=SelectionConfig.floor, help="share of a layer that stays")
    ratios.add_argument("--round-to", type=int, help="multiple for FFN widths")
    ratios.add_argument("--leave-alone", type=int, nargs="*", default=(), metavar="LAYER")
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
    plan, config = CompressionPlan.read(path), read_base_config(base, trust_remote_code=trust_remote_code)
    architecture, fingerprint = architecture_of(config), model_fingerprint(base)
    model = build_skeleton(config).to(torch.bfloat16)
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
    selection = replace(SelectionConfig(), floor=given.floor, round_to=given.round_to, leave_alone=given.leave_alone)
    if not 0 < given.step < 1:
        raise UserError(f"--step is {given.step}; the distance between two ratios lies in (0, 1).")
    model = build_skeleton(read_base_config(given.base, trust_remote_code=given.trust_remote_code))
    rows = [
        [
            f"{legal.ratio:.4f}",
            f"{legal.parameters:,}",
            f"{legal.linears_removed:.1%}",
            legal.kv_groups,
            legal.ffn_channels,
        ]
        for legal in legal_ratios(model, selection, given.step)
    ]
    print(f"{given.base} has {num_parameters(model):,} parameters. It can be pruned to:\n")
    print(markdown_table(["ratio", "parameters", "of the linears", "KV groups", "FFN channels"], rows))
