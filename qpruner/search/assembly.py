"""A narrowed and quantized model from the dense one, without text: what a trial that searches widths begins with.

Weights that stay are slices of the dense ones. Rows of q, k, v, gate and up lie in the bank of the dense model, so that
their codes are taken from there where a format can give rows exactly; o and down lose columns and are changed by what
makes up for these, from sums that were seen once in the dense model, and are quantized anew. Linears of parts that stay
whole are the bank's. The start of adapters is that of LoftQ on the narrowed weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qpruner.adapters.loftq import loftq
from qpruner.adapters.lora import is_target
from qpruner.anatomy import by_linear, decoder_layers, family_of
from qpruner.calibration.text import Calibration
from qpruner.compressed import CompressedModel, State
from qpruner.files import replacing
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.pruning.compensation import add_, places_among, shared_copy
from qpruner.pruning.dense_sums import fit_without, gather_sums
from qpruner.pruning.selection import Kept
from qpruner.pruning.surgery import narrow_, places_of
from qpruner.quantization.apply import LoftQSettings, Quantized, linear_precisions, quantize_linear
from qpruner.quantization.bank import Bank, entry_of
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.formats import dequantize, format_for, rebuild
from qpruner.quantization.packed import PackedLinear

CPU = torch.device("cpu")


class Assembly:
    """Makes the models of candidate plans; all share the tensors that they have in common with the dense model.

    Args:
        base: dense model; its tables are quantized here, once.
        plan: plan of the dense model, with the precisions of its tables.
        bank: bank of the dense model.
        settings: settings of LoftQ with which the bank was filled; None where adapters start from zero.
        sums: folder that `keep_sums` filled; None to slice weights and change none.
    """

    def __init__(
        self,
        base: CompressedModel,
        plan: CompressionPlan,
        bank: Bank,
        settings: LoftQSettings | None,
        sums: Path | None,
    ) -> None:
        self.base, self.plan, self.bank, self.settings, self.sums = base, plan, bank, settings, sums
        quantize_tables_(base.network, plan.embedding, plan.head, device=CPU)

    def __call__(self, plan: CompressionPlan) -> CompressedModel:
        """The model of a plan.

        Args:
            plan: plan that keeps some of what the base has, and has its tables.

        Raises:
            UserError: the rank of the adapters is above that of a narrowed linear.
        """
        kept = places_among(self.plan, plan)
        network = shared_copy(self.base.network)
        narrow_(network, kept)
        if self.sums is not None:
            self._compensate_(network, kept)
        tensors: dict[str, Tensor] = {}
        precisions = linear_precisions(network, plan)
        for name, linear, rows, stay in self._linears(network, kept):
            if precisions[name] != DENSE:
                tensors |= self._entry(name, linear, precisions[name], rows, stay)
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

    def _compensate_(self, network: Any, kept: Kept) -> None:
        assert self.sums is not None
        pairs = zip(decoder_layers(self.base.network), decoder_layers(network), kept, strict=True)
        for number, (dense, narrow, (groups, channels)) in enumerate(pairs):
            tensors: dict[str, Tensor] | None = None
            for part, units in ((dense.group_weights[-1], groups), (dense.channel_weights[-1], channels)):
                if len(units) < part.num_units:
                    tensors = load_file(sums_path(self.sums, number)) if tensors is None else tensors
                    linear: nn.Linear = getattr(narrow, part.name)
                    bias = linear.bias is not None
                    change, _ = fit_without(tensors, part.name, part.linear.weight, part.places(units), bias=bias)
                    add_(linear, change)

    def _linears(self, network: Any, kept: Kept) -> Iterator[tuple[str, nn.Linear, bool, Tensor | None]]:
        """Each linear: its name, itself, whether it is rows that go rather than columns, and the places that stay."""
        _, family = family_of(network.config)
        pairs = zip(decoder_layers(self.base.network), decoder_layers(network), kept, strict=True)
        for number, (dense, narrow, (groups, channels)) in enumerate(pairs):
            for parts, units in ((dense.group_weights, groups), (dense.channel_weights, channels)):
                for stack in by_linear(parts):
                    first = stack[0]
                    name = f"{family.layers}.{number}.{family.projections[first.name]}"
                    stay = places_of(stack, units) if len(units) < first.num_units else None
                    yield name, getattr(narrow, first.name), first.axis == 0, stay

    def _entry(
        self, name: str, linear: nn.Linear, precision: Precision, rows: bool, stay: Tensor | None
    ) -> dict[str, Tensor]:
        """The tensors of a linear of the narrowed model."""
        if stay is None:
            return self.bank.entry(name, precision)
        packed = self._taken(name, linear, precision, stay) if rows else None
        if packed is None:
            return entry_of(name, quantize_linear(linear, precision, name, self.settings, CPU))
        if self.settings is None or not is_target(name, self.settings.targets):
            return entry_of(name, Quantized(packed, None))
        start = loftq(
            linear.weight, lambda _: packed, dequantize, name=name, num_iterations=1,
            rank=self.settings.rank, scale=self.settings.scale, seed=self.settings.seed,
        )  # fmt: skip
        return entry_of(name, Quantized(packed, (start.lora_A, start.lora_B)))

    def _taken(self, name: str, linear: nn.Linear, precision: Precision, stay: Tensor) -> PackedLinear | None:
        """Rows of the bank's codes; None where they are not to be had, or are of weights that LoftQ has changed."""
        if self.settings is not None and self.settings.num_iterations > 1:
            return None
        whole = self.bank.linear(name, precision)
        assert isinstance(whole, PackedLinear)
        state = format_for(precision).take(whole.packed(), 0, stay, whole.in_features, precision)
        if state is None:
            return None
        shape = linear.out_features, linear.in_features
        return rebuild(state, *shape, precision=precision, bias=linear.bias, dtype=linear.weight.dtype)


def keep_sums(folder: Path, model: Any, calibration: Calibration, made_from: str) -> None:
    """Writes the sums of a dense model's layers into a folder, one file each.

    Args:
        folder: folder to write to.
        model: dense model, on the device that computes.
        calibration: text that passes through it.
        made_from: hash of what they are made from.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def keep(number: int, tensors: dict[str, Tensor]) -> None:
        with replacing(sums_path(folder, number)) as temporary:
            save_file(tensors, temporary, {"made_from": made_from})

    gather_sums(model, calibration, keep)


def has_sums(folder: Path, layers: Sequence[int], made_from: str) -> bool:
    """Whether the sums of these layers are there, whole, and made from this."""
    for number in layers:
        try:
            with safe_open(sums_path(folder, number), framework="pt") as file:
                if (file.metadata() or {}).get("made_from") != made_from:
                    return False
        except (SafetensorError, OSError):  # not there, or cut off
            return False
    return True


def sums_path(folder: Path, number: int) -> Path:
    """File of the sums of a layer."""
    return folder / f"sums-{number:03d}.safetensors"
