"""Prepares a search of widths before its first trial: scores of units, sums of the dense model, priors and a bank.

The dense model is the base of every trial. What is measured on it, sensitivities and the bank of its linears, is valid
for narrowed layers as far as a fraction of a layer has that fraction of its cost; `parts` has the possible widths and
what they cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import Allocation, Method, decide, in_order, with_choices
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import StructuredPruning
from qpruner.callbacks.bits_under_budget import Allocator
from qpruner.callbacks.calibration import calibration_of
from qpruner.callbacks.compression import CompressionInSetup, CompressionJob
from qpruner.errors import UserError
from qpruner.files import hash_json
from qpruner.outline import outline_of
from qpruner.plan import CompressionPlan
from qpruner.pruning.scores import LayerScores, needs_text, score_units
from qpruner.pruning.supplies import asked_for
from qpruner.pruning.widths import with_widths
from qpruner.quantization.apply import LoftQSettings, check_rank, starts_of
from qpruner.records.folder import RunFolder
from qpruner.search.assembly import has_sums, keep_sums
from qpruner.search.candidates import Ranking, read_scores, write_scores
from qpruner.search.parts import Structures, price_of_plan
from qpruner.search.ranks import Ranks
from qpruner.search.structure import Structure, StructureConfig

NO_LIMIT = Budget(share=1e6)
"""For computing the costs and sizes of all choices, none of which is taken."""


@dataclass(frozen=True)
class Structured:
    """What was prepared for a search of widths.

    Args:
        structure: how wide layers may be.
        ranking: which units stay.
        limit: most bytes that items may take, where all units stay.
        priors: costs of bits by each method, and bytes where all units stay; the decisions in them are not used.
        compensates: whether the remaining weights compensate for the removed ones.
        dtype: dtype of the dense model.
    """

    structure: Structure
    ranking: Ranking
    limit: int
    priors: Mapping[Method, Allocation]
    compensates: bool
    dtype: torch.dtype


def scoring_callback(pruning: Sequence[CompressionInSetup]) -> StructuredPruning:
    """The callback that determines which units stay.

    Raises:
        UserError: there is none, or another callback prunes.
    """
    if len(pruning) == 1 and isinstance(pruning[0], StructuredPruning):
        return pruning[0]
    given = " and ".join(type(callback).__name__ for callback in pruning) or "no callback that prunes"
    raise UserError(
        f"search.structure asks which units stay, and trainer.callbacks has {given}. Add StructuredPruning, whose "
        f"criterion and selection say so; its ratio is where the search starts."
    )


def price_of_bits(prior: Allocation) -> float:
    """Cost of the smallest widths in all items instead of the largest; 1 if both cost the same."""
    return sum(max(decision.costs) - min(decision.costs) for decision in prior.decisions) or 1.0


def part_of(folder: RunFolder, method: Method) -> RunFolder:
    """Folder in which a search keeps the allocation of one method."""
    return RunFolder(folder.prior / method)


def prepare_structures(
    job: CompressionJob,
    plan: CompressionPlan,
    scoring: StructuredPruning,
    allocator: Allocator,
    config: StructureConfig,
    ranks: Ranks | None,
    start: CompressionPlan | None = None,
) -> Structured:
    """Scores units, gathers sums, measures the costs of bits and fills the bank, unless an earlier session did.

    Args:
        job: dense model, and what may be used for it; with the folder of the search.
        plan: plan of the dense model, with the precisions of its tables.
        scoring: callback that determines which units stay, and where the search starts.
        allocator: allocator that spends the budget.
        config: how wide layers may be.
        ranks: ranks that adapters may have, where these are searched; None where they are not.
        start: plan that is to be tried among the first; None for none.

    Raises:
        UserError: a start for another model, a budget that no structure meets, adapters of a rank above that of the
            narrowest linear, or something that scoring or allocation refuses.
    """
    folder, network = job.folder, job.model.network
    assert folder is not None
    if start is not None:
        start.check(plan.architecture, job.model.base_sha256)
    items = allocator.items(plan)
    structures = Structures(network, plan, config, scoring.selection, job.lora, ranks)
    precisions = in_order(plan, items, allocator.precisions, network.dtype.itemsize)
    limit = structures.limit(items, precisions, allocator.budget)  # checked before slow work, like the rank below
    narrowest = outline_of(with_widths(network.config, structures.least))
    packed = with_choices(plan, items, [precisions[0]] * len(items))
    loftq = LoftQSettings.of(job.lora, allocator.loftq_iterations, job.seed)
    check_rank(narrowest, starts_of(narrowest, packed, loftq))
    scores = _scores(job, scoring)
    compensates, rounding = scoring.compensating.how != "none", allocator.calibrated
    if compensates:
        scoring.compensating.check(network)
        _sums(job, {"compensation_text": asdict(scoring.compensating.text)}, scoring.compensating.text)
    elif rounding is not None:
        _sums(job, {"calibrated_text": asdict(rounding.text)}, rounding.text)
    if scoring.compensating.how == "sequential":
        rank_zero_warn(
            "StructuredPruning.compensation is sequential, which takes text for each plan; trials make up for what "
            "each linear lost by itself, as local does. `qpruner fit --plan` does it as configured."
        )
    priors: dict[Method, Allocation] = {}
    methods: list[Method] = ["uniform", "mutual_information", allocator.method]
    for method in dict.fromkeys(methods):
        part = part_of(folder, method)
        part.path.mkdir(parents=True, exist_ok=True)
        of_method = replace(allocator, method=method, budget=replace(allocator.budget, multiply_adds=None))
        sensitivities, _ = of_method.measure(replace(job, folder=part), plan)
        _, allocation = decide(
            plan,
            items,
            allocator.precisions,
            NO_LIMIT,
            method=method,
            config=allocator.config,
            sensitivities=sensitivities,
            dense_size=network.dtype.itemsize,
            price_of=lambda plan: price_of_plan(network.config, network.dtype, plan, job.lora),
        )
        priors[method] = replace(allocation, budget=str(allocator.budget))
    allocator.bank(replace(job, folder=part_of(folder, allocator.method)), plan)
    origin = structures.start(scoring.ratio, scores)
    structure = structures.structure(
        items,
        precisions,
        allocator.budget,
        start=origin,
        scores=scores,
        price_of_all=price_of_bits(priors[allocator.method]),
    )
    parts = tuple((part.layer, part.kind) for part in structure.parts)
    asked = asked_for(scoring.ratio, network, scoring.selection, plan.architecture)
    rank_zero_info(
        f"Widths of {len(parts)} parts of layers are searched, from all units down to {config.least:.0%} of them; the "
        f"search starts from what StructuredPruning keeps ({asked}), or from less if the budget has no room for that."
    )
    return Structured(structure, Ranking(parts, scores, start), limit, priors, compensates, network.dtype)


def _scores(job: CompressionJob, scoring: StructuredPruning) -> list[LayerScores]:
    assert job.folder is not None
    path = job.folder.structure / "scores.safetensors"
    options = {name: scoring.options[name] for name in ("criterion", "aggregate", "calibration")}
    made_from = _made_from(job, options | {"seed": job.seed})
    if (known := read_scores(path, made_from)) is not None:
        rank_zero_info("The scores of units that this search has computed before are used again.")
        return known
    calibration = None
    if needs_text(scoring.criterion):
        whose = f"The criterion {scoring.criterion!r}"
        calibration = calibration_of(job.model.network, job.data, scoring.calibration, job.processes, whose)
    scores = score_units(job.model.network, scoring.criterion, scoring.aggregate, calibration, seed=job.seed)
    write_scores(path, scores, made_from)
    return scores


def _sums(job: CompressionJob, options: dict[str, object], text: CalibrationConfig) -> None:
    assert job.folder is not None
    made_from = _made_from(job, options)
    if not has_sums(job.folder.structure, range(len(job.model.known_plan().layers)), made_from):
        calibration = calibration_of(job.model.network, job.data, text, job.processes, "Assembling trials")
        keep_sums(job.folder.structure, job.model.network, calibration, made_from)


def _made_from(job: CompressionJob, options: dict[str, object]) -> str:
    """Hash that distinguishes scores and sums from those of other models, texts and options."""
    return hash_json(
        {
            **options,
            "base": job.model.identity,
            "text_sha256": job.data and job.data.fingerprint()["train"]["sha256"],
            "text_seed": job.data and job.data.seed,
            "dtype": str(job.model.network.dtype),
            "computed_in": job.processes.precision,
        }
    )
