"""What a search needs before its first trial: predictions of the dense model, the pruned base, priors and a bank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from qpruner.allocation.decision import Allocation, Method
from qpruner.allocation.solving import Choice
from qpruner.callbacks.bits_under_budget import DECIDING, Allocator
from qpruner.callbacks.calibration import text_of
from qpruner.callbacks.compression import (
    Compression,
    CompressionInSetup,
    CompressionJob,
    check_dense,
    check_order,
    told,
)
from qpruner.callbacks.quantization import MixedPrecisionQuantization
from qpruner.compressed import CompressedModel
from qpruner.datamodules.base import TokenDataModule
from qpruner.dense_base import choose_offload
from qpruner.errors import UserError
from qpruner.files import hash_json
from qpruner.folder_manifest import is_compressed, read_manifest
from qpruner.offload import Offload
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pretrained import is_reachable, model_fingerprint
from qpruner.processes import Processes
from qpruner.quantization.calibrated_bank import TextRounding
from qpruner.records.folder import RunFolder
from qpruner.search.candidates import Candidates, Ranking
from qpruner.search.ranks import Ranks, check_ranks_of_search
from qpruner.search.reference import Reference
from qpruner.search.space import SearchSpace
from qpruner.search.structure import StructureConfig
from qpruner.search.structured import Structured, part_of, prepare_structures, price_of_bits, scoring_callback
from qpruner.training.module import LoRAFinetuner


@dataclass(frozen=True)
class Preparation:
    """What was prepared; everything else is in the folder of the search.

    Args:
        base_sha256: hash of the dense model; None where its files were not available.
        kept_sha256: hash that identifies the pruned base.
        base: plan of the pruned base, dense except for its tables.
        prior: allocation that the search starts from: its plan, and the costs of departing from it.
        loftq_iterations: number of LoftQ iterations with which the bank was filled.
        rounding: how the linears of the bank were rounded using text; None where each weight was rounded to the nearest
            value.
        structured: what a search of widths needs; None where layers keep the widths of the base.
        ranks: ranks that adapters may have, where these are searched; None where they are not.
        prior_rank: rank of the adapters beside which the prior's bits are within the budget, where ranks are searched
            and widths are not.
    """

    base_sha256: str | None
    kept_sha256: str | None
    base: CompressionPlan
    prior: Allocation
    loftq_iterations: int
    rounding: TextRounding | None = None
    structured: Structured | None = None
    ranks: Ranks | None = None
    prior_rank: int | None = None

    @property
    def limit(self) -> int:
        """The most bytes that items may take, in layers with the widths of the base."""
        if self.structured is not None:
            return self.structured.limit
        if self.ranks is None or self.prior_rank is None:
            return self.prior.for_items
        return self.prior.for_items + self.ranks.bytes_above(self.prior_rank)

    @property
    def candidates(self) -> Candidates:
        """The plans that a search tries."""
        items = tuple(decision.item for decision in self.prior.decisions)
        return Candidates(self.base, items, self.precisions, self.ranking, self.ranks)

    def space(self, prior: Allocation, *, spends: bool = False) -> SearchSpace:
        """The space of plans within the budget.

        Args:
            prior: allocation by some method, which is the origin of the space.
            spends: whether the fraction of the bytes that is spent is an additional coordinate.
        """
        choices = [
            [Choice(*pair) for pair in zip(decision.sizes, decision.costs, strict=True)] for decision in prior.decisions
        ]
        levels: list[Sequence[float]] = [
            [precision.bits for precision in decision.choices] for decision in prior.decisions
        ]
        if self.ranks is not None:
            choices += self.ranks.items(price_of_bits(prior))
            levels += [self.ranks.choices] * len(self.ranks.layers)
        structure = None if self.structured is None else self.structured.structure
        return SearchSpace(choices, levels, self.limit, spends, structure)

    def unsearched(self, folder: RunFolder) -> dict[str, list[int]]:
        """Rows of the plans that were not searched for, by the method that allocated their bits.

        Where widths are searched, these plans have the widths that the search starts from. If ranks are searched, too,
        all adapters of ``uniform`` have the lowest, beside the widest bits that all items can have then; the other
        plans buy ranks together with bits, by the costs of their method. Where widths are not searched, all adapters
        have the highest rank that the budget pays for in all layers beside the fewest bits.

        Args:
            folder: folder of the search.
        """
        rows: dict[str, list[int]] = {}
        methods: tuple[Method, ...] = ("uniform", "mutual_information", self.prior.method)
        ranks: list[int] = []
        if self.ranks is not None and self.prior_rank is not None:
            ranks = [self.ranks.choices.index(self.prior_rank)] * len(self.ranks.layers)
        for method in methods:
            name = method.replace("_", " ")
            if self.structured is None:
                allocation = Allocation.read(part_of(folder, method).allocation)
                rows[name] = [*(decision.chosen for decision in allocation.decisions), *ranks]
            else:
                space, items = self.space(self.structured.priors[method]), len(self.prior.decisions)
                rows[name] = space.origin(alike=items if method == "uniform" else 0)
        return rows

    @property
    def ranking(self) -> Ranking | None:
        """Which units stay where widths are searched; None where they are not."""
        return None if self.structured is None else self.structured.ranking

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions to choose from, the same for all items."""
        return self.prior.decisions[0].choices


def prepare(
    module: LoRAFinetuner,
    data: TokenDataModule,
    pruning: Sequence[CompressionInSetup],
    quantization: MixedPrecisionQuantization,
    processes: Processes,
    folder: RunFolder,
    structure: StructureConfig | None = None,
    ranks: Sequence[int] = (),
    start: CompressionPlan | None = None,
) -> Preparation:
    """Prunes the base, allocates bits by the methods that do not search, and fills the bank, unless already done.

    Args:
        module: module with the base, adapters and seed of the search; it is given no model.
        data: text for scores and sensitivities, and the validation split of the reference.
        pruning: callbacks that prune the base, none or one.
        quantization: callback that has the budget; it quantizes nothing here.
        processes: processes that compute.
        folder: folder of the search.
        structure: how wide layers may be, where widths are searched; the base is then not pruned.
        ranks: ranks that adapters may have, where these are searched.
        start: plan that a search of widths is to try among the first; None for none.

    Raises:
        UserError: there is no budget or too little text, or pruning or allocation refuses something.
    """
    allocator = replace(allocator_of(quantization), for_trials=True)
    check_order([*pruning, quantization])
    scoring = None if structure is None else scoring_callback(pruning)
    for callback in (*pruning, quantization):
        callback.check_text(data)
    check_text(allocator, data)
    if ranks:
        check_ranks_of_search(ranks, module.lora, allocator)
    model = _prepared_base(module, data, pruning if scoring is None else [], processes, folder)
    plan = model.known_plan()
    plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers), **quantization.tables)
    job = CompressionJob(model, data, processes, module.lora, module.seed, keep_in=folder.base)
    offered = Ranks.of(ranks, model.network, module.lora) if ranks else None
    prior_rank: int | None = None
    if structure is not None and scoring is not None:
        job = replace(job, folder=folder)
        structured = prepare_structures(job, plan, scoring, allocator, structure, offered, start)
        prior = structured.priors[allocator.method]
    else:
        structured = None
        if offered is not None:
            limit, cheapest, _ = allocator.affordable(job, plan, offered.choices[0])
            prior_rank = offered.highest_within(limit - cheapest.unit_weight_bytes)
        prior = _allocated(allocator, job, plan, folder, prior_rank)
    return Preparation(
        base_sha256=model.base_sha256,
        kept_sha256=model.identity,
        base=plan,
        prior=prior,
        loftq_iterations=allocator.loftq_iterations,
        rounding=allocator.rounding(job),
        structured=structured,
        ranks=offered,
        prior_rank=prior_rank,
    )


def _allocated(
    allocator: Allocator, job: CompressionJob, plan: CompressionPlan, folder: RunFolder, rank: int | None
) -> Allocation:
    """The prior where widths are not searched, with the allocations by other methods beside it, and the bank.

    Args:
        allocator: allocator that spends the budget.
        job: job with the pruned base.
        plan: plan of the pruned base, with the precisions of its tables.
        folder: folder of the search.
        rank: rank of the adapters that the budget pays for, where ranks are searched; None where they are not.
    """
    for method in dict.fromkeys(("uniform", "mutual_information", allocator.method)):
        part = part_of(folder, method)
        part.path.mkdir(parents=True, exist_ok=True)
        replace(allocator, method=method).allocate(replace(job, folder=part), plan, rank)
    part = part_of(folder, allocator.method)
    allocator.bank(replace(job, folder=part), plan)
    return Allocation.read(part.allocation)


def allocator_of(quantization: MixedPrecisionQuantization) -> Allocator:
    """The allocator that spends the budget.

    Raises:
        UserError: there is no budget.
    """
    if quantization.allocator is None:
        raise UserError(
            "A search spends a budget, and MixedPrecisionQuantization has none. Give it one, such as "
            "budget: {average_bits: 6}."
        )
    return quantization.allocator


def check_text(allocator: Allocator, data: TokenDataModule) -> None:
    """Checks, before any work with the model, that there are enough data.

    Raises:
        UserError: there are too few.
    """
    config = allocator.config  # mutual information is measured for every method
    config.mutual_information.check_samples(config.calibration.num_sequences * config.calibration.length)
    text_of(data, config.calibration, DECIDING)


def _prepared_base(
    module: LoRAFinetuner,
    data: TokenDataModule,
    pruning: Sequence[CompressionInSetup],
    processes: Processes,
    folder: RunFolder,
) -> CompressedModel:
    """The pruned base, kept in `RunFolder.base`, once the reference is there, too."""
    offload = processes.of_first(
        lambda: choose_offload(
            module.base,
            module.offload,
            dtype=module.dtype_of_base,
            trust_remote_code=module.trust_remote_code,
            device=processes.device,
            num_processes=processes.world_size,
            folder=folder.path,
            say=rank_zero_info,
        )
    )
    if is_compressed(folder.base):
        base_sha256 = _check_kept(module.base, pruning, folder)
        if not _is_reference_of(base_sha256, folder):
            _write_reference(_dense(module, data, offload), data, processes, folder)
        pruned = CompressedModel.open(folder.base)
        pruned.offload(offload)
        return pruned
    dense = _dense(module, data, offload)
    if not _is_reference_of(dense.base_sha256, folder):
        _write_reference(dense, data, processes, folder)
    for callback in pruning:
        check_dense(dense)
        callback.compress(
            CompressionJob(dense, data, processes, module.lora, module.seed, folder=folder, keep_in=folder.base)
        )
        dense.record(callback.step)
    dense.keep(folder.base, tokenizer=data.tokenizer)  # even if nothing was pruned: trials start from there
    return dense


def _check_kept(base: str, pruning: Sequence[CompressionInSetup], folder: RunFolder) -> str | None:
    """Checks that the base that an earlier session kept is the one that is asked for.

    Returns:
        The hash of the dense model that the base was made from.

    Raises:
        UserError: the base was made from another model, or in another way.
    """
    manifest = read_manifest(folder.base)
    made_of = manifest["base"]["sha256"]
    given = model_fingerprint(base) if is_reachable(base) else None
    if None not in (given, made_of) and given != made_of:
        why = f"was made of another model ({made_of}) than {base!r} ({given})"
    elif hash_json(manifest["recipe"]) != hash_json([callback.step for callback in pruning]):
        made_by = [told(step["name"], step["options"]) for step in manifest["recipe"]]
        steps = [str(callback) for callback in pruning]
        why = f"was made by {' and '.join(made_by) or 'nothing'}, and the search has {' and '.join(steps) or 'nothing'}"
    else:
        return made_of
    raise UserError(
        f"The base in {str(folder.base)!r} {why}. Go on with what the search began with, or give it another folder."
    )


def _dense(module: LoRAFinetuner, data: TokenDataModule, offload: Offload | None) -> CompressedModel:
    dense = CompressedModel.load(
        module.base,
        dtype=module.dtype_of_base,
        trust_remote_code=module.trust_remote_code,
        say=rank_zero_info,
        offload=offload,
    )
    data.check_model(dense.network.config)
    return dense


def _write_reference(dense: CompressedModel, data: TokenDataModule, processes: Processes, folder: RunFolder) -> None:
    Reference.of(dense.network, data, processes, base=dense.base_sha256).write(folder.reference)


def _is_reference_of(base_sha256: str | None, folder: RunFolder) -> bool:
    """Whether the stored predictions are those of a given dense model."""
    return folder.reference.exists() and Reference.read(folder.reference).base == base_sha256


def compressing(callbacks: Sequence[Callback]) -> tuple[list[CompressionInSetup], MixedPrecisionQuantization]:
    """The callbacks that prune the base, and the one that has the budget.

    Raises:
        UserError: no callback quantizes, or one of them cannot work without a fit.
    """
    pruning: list[CompressionInSetup] = []
    quantizations: list[MixedPrecisionQuantization] = []
    for callback in callbacks:
        if isinstance(callback, MixedPrecisionQuantization):
            quantizations.append(callback)
        elif isinstance(callback, CompressionInSetup):
            pruning.append(callback)
        elif isinstance(callback, Compression):
            raise UserError(
                f"{type(callback).__name__} changes the base in the course of a fit, and a search does so before its "
                f"trials. Search with StructuredPruning, or `qpruner merge` a run that did so in training and search "
                f"on its result."
            )
    if len(quantizations) != 1:
        raise UserError(
            f"A search spends one budget, and {len(quantizations)} callbacks quantize: add MixedPrecisionQuantization, "
            f"with a budget, to the callbacks once."
        )
    return pruning, quantizations[0]
