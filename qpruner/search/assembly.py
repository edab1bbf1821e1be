"""Builds a narrowed and quantized model from the dense one, without text: the starting point of a trial of widths.

Weights that stay are slices of the dense ones. Rows of q, k, v, gate and up are in the dense model's bank, so their
codes are taken from there if the format can slice rows exactly; o and down lose columns, are updated to compensate for
these, using sums that were gathered once on the dense model, and are quantized anew. Linears of parts that stay whole
come from the bank. Adapters are initialized by LoftQ on the narrowed weights. Packing a linear that loses columns takes
seconds for thousands of inputs; the result is kept beside the sums, for all trials that keep the same units there.

Where the bank was rounded using text, the same sums, restricted to the inputs that stay, are used to round o and down
and to initialize their adapters; the adapter of a linear that loses rows starts from the bank's factors for its rows.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpruner.adapters.loftq import loftq
from qpruner.adapters.lora import is_target
from qpruner.anatomy import by_linear, decoder_layers, family_of
from qpruner.calibration.input_sums import InputSums
from qpruner.calibration.text import Calibration
from qpruner.compressed import CompressedModel, State
from qpruner.files import hash_json, replacing
from qpruner.offload import Shelf
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.pruning.compensation import add_, places_among, shared_copy
from qpruner.pruning.dense_sums import fit_without, gather_sums, grams_among
from qpruner.pruning.selection import Kept
from qpruner.pruning.surgery import narrow_, places_of
from qpruner.quantization.apply import LoftQSettings, Quantized, linear_precisions, quantize_linear
from qpruner.quantization.bank import Bank, entry_of, entry_of_state
from qpruner.quantization.calibrated import Packing
from qpruner.quantization.calibrated_inputs import CalibratedConfig, SplitSums
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.formats import dequantize, format_for, quantize, rebuild
from qpruner.quantization.packed import PackedLinear

CPU = torch.device("cpu")


@dataclass(frozen=True)
class NarrowedLinear:
    """A linear of the model of a plan.

    Args:
        name: name of the linear.
        linear: the linear itself, not packed.
        dense: linear of the dense model that it is a part of.
        layer: number of the linear's layer.
        projection: role of the linear within the layer, such as ``down``.
        loses_rows: whether pruning units removes rows of the weight, rather than columns.
        stay: indices of the rows or columns that stay; None where all do.
    """

    name: str
    linear: nn.Linear
    dense: nn.Linear
    layer: int
    projection: str
    loses_rows: bool
    stay: Tensor | None


class Assembly:
    """Builds the models of candidate plans; all share the tensors that they have in common with the dense model.

    Args:
        base: dense model; its tables are quantized here, once.
        plan: plan of the dense model, with the precisions of its tables.
        bank: bank of the dense model.
        settings: LoftQ settings with which the bank was filled; None where adapters start from zero.
        sums: folder that `keep_sums` filled; None where weights are plain slices, rounded to the nearest values.
        compensates: whether the remaining weights compensate for the removed ones.
        by_text: how the bank was rounded using text; None where each weight was rounded to the nearest value.
    """

    def __init__(
        self,
        base: CompressedModel,
        plan: CompressionPlan,
        bank: Bank,
        settings: LoftQSettings | None,
        sums: Path | None,
        *,
        compensates: bool,
        by_text: CalibratedConfig | None,
    ) -> None:
        self.base, self.plan, self.bank, self.settings, self.sums = base, plan, bank, settings, sums
        self.compensates, self.by_text = compensates, by_text
        self.sums_from = None if sums is None else _made_from(sums_path(sums, 0))
        quantize_tables_(base.network, plan.embedding, plan.head, device=CPU)

    def __call__(self, plan: CompressionPlan) -> CompressedModel:
        """Builds the model of a plan.

        Args:
            plan: plan that keeps a subset of the units of the base, and has the precisions of its tables.

        Raises:
            UserError: the rank of the adapters is above that of a narrowed linear.
        """
        kept = places_among(self.plan, plan)
        network = shared_copy(self.base.network)
        narrow_(network, kept)
        tensors: dict[str, Tensor] = {}
        precisions = linear_precisions(network, plan)
        for linear in self._linears(network, kept):
            precision = precisions[linear.name]
            if linear.stay is not None and not linear.loses_rows:
                tensors |= self._of_columns(network, linear, precision, linear.stay)
            elif precision != DENSE:
                whole = linear.stay is None
                tensors |= self.bank.entry(linear.name, precision) if whole else self._of_rows(linear, precision)
        model = CompressedModel(
            network,
            base=self.base.base,
            base_sha256=self.base.base_sha256,
            plan=plan,
            state=State.QUANTIZED,
            recipe=self.base.recipe,
        )
        model.quantize(plan, self.settings, device=CPU, bank=Bank(network, tensors))
        return model

    def _linears(self, network: Any, kept: Kept) -> Iterator[NarrowedLinear]:
        _, family = family_of(network.config)
        pairs = zip(decoder_layers(self.base.network), decoder_layers(network), kept, strict=True)
        for number, (dense, narrow, (groups, channels)) in enumerate(pairs):
            for parts, units in ((dense.group_weights, groups), (dense.channel_weights, channels)):
                for stack in by_linear(parts):
                    first = stack[0]
                    name = f"{family.layers}.{number}.{family.projections[first.name]}"
                    stay = places_of(stack, units) if len(units) < first.num_units else None
                    linear = getattr(narrow, first.name)
                    yield NarrowedLinear(name, linear, first.linear, number, first.name, first.axis == 0, stay)

    def _of_rows(self, narrowed: NarrowedLinear, precision: Precision) -> dict[str, Tensor]:
        """The tensors of a linear that keeps only some of its rows."""
        name, linear, stay = narrowed.name, narrowed.linear, narrowed.stay
        assert stay is not None
        packed = self._taken(name, linear, precision, stay)
        if self.by_text is not None:
            whole = self.bank.factors(name, precision)
            factors = None if whole is None else (whole[0], whole[1][stay])
            return entry_of(name, Quantized(packed or quantize(linear, precision), factors))
        if packed is None:
            return entry_of(name, quantize_linear(linear, precision, name, self.settings, CPU))
        if self.settings is None or not is_target(name, self.settings.targets):
            return entry_of(name, Quantized(packed, None))
        start = loftq(
            linear.weight, lambda _: packed, dequantize, name=name, num_iterations=1,
            rank=self.settings.rank, scale=self.settings.scale, seed=self.settings.seed,
        )  # fmt: skip
        return entry_of(name, Quantized(packed, (start.lora_A, start.lora_B)))

    def _of_columns(
        self, network: Any, narrowed: NarrowedLinear, precision: Precision, stay: Tensor
    ) -> dict[str, Tensor]:
        """The tensors of a linear that keeps only some columns and compensates for the rest; none where dense."""
        if self.sums is None or precision == DENSE:
            return self._of_columns_anew(network, narrowed, precision, stay)
        known = self._known(self.sums, narrowed, precision, stay)
        if (tensors := _read(known)) is not None:
            if (bias := tensors.pop("bias", None)) is not None:
                narrowed.linear.bias = nn.Parameter(bias, requires_grad=False)
            return tensors
        tensors = self._of_columns_anew(network, narrowed, precision, stay)
        bias = narrowed.linear.bias
        known.parent.mkdir(exist_ok=True)
        with replacing(known) as temporary:
            save_file(tensors | ({} if bias is None else {"bias": bias.detach().contiguous()}), temporary)
        return tensors

    def _of_columns_anew(
        self, network: Any, narrowed: NarrowedLinear, precision: Precision, stay: Tensor
    ) -> dict[str, Tensor]:
        name, linear, projection = narrowed.name, narrowed.linear, narrowed.projection
        sums = {} if self.sums is None else read_sums(self.sums, narrowed.layer, projection)
        if self.compensates:
            has_bias = linear.bias is not None
            change, _ = fit_without(sums, projection, narrowed.dense.weight, stay, bias=has_bias)
            add_(linear, change)
        if precision == DENSE:
            return {}
        if self.by_text is None:
            return entry_of(name, quantize_linear(linear, precision, name, self.settings, CPU))
        decide, held_out = (InputSums(gram[None], None, None) for gram in grams_among(sums, projection, stay))
        packing = Packing(network, self.by_text, {name: self.settings})
        rounded = packing.round(name, precision, SplitSums(decide, held_out, Shelf((), None)))
        return entry_of_state(name, precision, rounded.state, rounded.factors)

    def _known(self, sums: Path, narrowed: NarrowedLinear, precision: Precision, stay: Tensor) -> Path:
        """File of a linear with these inputs, shared by all trials that keep them."""
        settings = None if self.settings is None else asdict(self.settings)
        by_text = None if self.by_text is None else asdict(self.by_text)
        origin = [asdict(precision), stay.tolist(), settings, by_text, self.compensates, self.sums_from]
        return columns_folder(sums) / f"{narrowed.name}-{hash_json(origin)[:16]}.safetensors"

    def _taken(self, name: str, linear: nn.Linear, precision: Precision, stay: Tensor) -> PackedLinear | None:
        """Rows of the bank's codes; None where the format cannot slice them, or LoftQ has changed the weights."""
        if self.by_text is None and self.settings is not None and self.settings.num_iterations > 1:
            return None
        whole = self.bank.linear(name, precision)
        assert isinstance(whole, PackedLinear)
        state = format_for(precision).take(whole.packed(), 0, stay, whole.in_features, precision)
        if state is None:
            return None
        shape = linear.out_features, linear.in_features
        return rebuild(state, *shape, precision=precision, bias=linear.bias, dtype=linear.weight.dtype)


def keep_sums(folder: Path, model: Any, calibration: Calibration, made_from: str) -> None:
    """Writes the sums of a dense model's layers to a folder, a file for each, and removes what older sums led to.

    Args:
        folder: folder to write to.
        model: dense model, on the device that computes.
        calibration: text that is passed through the model.
        made_from: hash of everything that the sums depend on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(columns_folder(folder), ignore_errors=True)

    def keep(number: int, tensors: dict[str, Tensor]) -> None:
        with replacing(sums_path(folder, number)) as temporary:
            save_file(tensors, temporary, {"made_from": made_from})

    gather_sums(model, calibration, keep)


def read_sums(folder: Path, number: int, projection: str) -> dict[str, Tensor]:
    """The sums of one linear of a layer, named as in the file."""
    with safe_open(sums_path(folder, number), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{projection}/")]  # noqa: SIM118  # no mapping
        return {name: file.get_tensor(name) for name in names}


def has_sums(folder: Path, layers: Sequence[int], made_from: str) -> bool:
    """Whether the sums of these layers exist, are complete, and were made from this."""
    return all(_made_from(sums_path(folder, number)) == made_from for number in layers)


def _made_from(path: Path) -> str | None:
    """The hash of what a file of sums was made from, as stored in it; None where the file is missing or truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("made_from")
    except (SafetensorError, OSError):
        return None


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None where it is missing or truncated."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


def sums_path(folder: Path, number: int) -> Path:
    """File of the sums of a layer."""
    return folder / f"sums-{number:03d}.safetensors"


def columns_folder(folder: Path) -> Path:
    """Folder of the linears that lost columns and were updated or rounded using the sums of a folder."""
    return folder / "columns"
