"""Export to the format compressed-tensors, which transformers and vLLM read: symmetric codes of 2, 4 and 8 bits."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qpruner.anatomy import family_of, refuse_experts, unit_linears
from qpruner.dense_copy import TokenizerFiles
from qpruner.errors import UserError, listed
from qpruner.export.bit_stream import bit_stream, codes_of_stream, words
from qpruner.export.description import Description
from qpruner.export.groups import GroupedWeight, GroupLayout, rounded
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.folder_manifest import CONFIG, entries_of
from qpruner.model_folder import build_skeleton, model_class_name
from qpruner.plan import DENSE, ROW
from qpruner.pruning.widths import portable_config, skeleton_config
from qpruner.quantization.apply import linear_precisions
from qpruner.remote_code import add_code, needs_code

WIDTHS = (2, 4, 8)
SIZES = (ROW, 128, 64, 32)
SMALLEST = 32
"""Columns of the smallest group that engines have kernels for."""


@dataclass(frozen=True, order=True)
class Scheme:
    """How a linear is stored.

    Args:
        bits: bits of a code, one of the `WIDTHS`.
        size: columns of a group; -1 where a group is a row.
    """

    bits: int
    size: int

    def __str__(self) -> str:
        return f"{self.bits} bits with a scale {'per row' if self.size == ROW else f'for {self.size} weights'}"

    def to_data(self) -> dict[str, Any]:
        """Entry of the configuration for the weights of a group of linears."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.size == ROW else "group",
            "group_size": None if self.size == ROW else self.size,
            "dynamic": False,
        }


@dataclass(frozen=True)
class Held:
    """How a linear is stored, and why it may differ from the model.

    Args:
        scheme: how the linear is stored.
        exact: whether its codes are those of the model, in as many bits or in more.
        reason: why the codes differ, or why they take more bits; empty where nothing changes.
    """

    scheme: Scheme
    exact: bool
    reason: str


class CompressedTensors:
    """A folder in transformers' layout, whose linears are packed to 32-bit words.

    Where layers differ in width, `qpruner.modeling_compressed` lies in it, as in the folder of the model itself.

    A linear named ``x`` of O rows and I columns has, for b bits and groups of G columns,

    - ``x.weight_packed``: int32 [O, ceil(I * b / 32)], its codes as a stream of bits;
    - ``x.weight_scale``: [O, I / G], of one column where a group is a row;
    - ``x.weight_shape``: int64 [2], O and I;

    and the value scale * (code - 2^(b - 1)). So symmetric codes are exported unchanged; those of 3, 5 and 6 bits in the
    next larger width. Other formats, linears with adapters and rows whose length is no multiple of 32 are quantized
    anew. Linears that engines fuse, queries with keys and values and gate with up, share a scheme, even if only some of
    them have adapters.

    The engine multiplies scales and codes in the dtype of the model, so that values are rounded to it.

    Source: ``pack-quantized`` of the package compressed-tensors 0.20, which is not needed to write it.
    """

    name = "compressed-tensors"
    extra = None
    module = None

    def check(self, model: Description) -> None:
        refuse_experts(model.config, f"--format {self.name}", "--format dense")
        precisions = linear_precisions(build_skeleton(model.config), model.plan)
        packed = [name for name, precision in precisions.items() if precision != DENSE]
        # The table of a tied head is the embedding, which the format holds dense.
        if not packed and (model.plan.head == DENSE or model.tied):
            raise UserError("No linear of this model is quantized. Export it with --format dense.")
        stock = _stock_linears(portable_config(model.config))
        if others := [name for name in packed if name not in stock]:
            raise UserError(
                f"{listed(others)} are no linears in transformers' own model, and so cannot be packed. Export with "
                f"--format onnx or dense."
            )

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        from huggingface_hub import save_torch_state_dict

        held = _all_held(source)
        state: dict[str, Tensor] = {}
        for name in source.names():
            linear, _, kind = name.rpartition(".")
            if kind == "weight" and linear in held:
                weight = _weight(source, linear, held[linear])
                state[f"{linear}.weight_packed"] = words(bit_stream(weight.codes, weight.bits))
                state[f"{linear}.weight_scale"] = rounded(f"The scales of {linear}", weight.scales, dtype)
                state[f"{linear}.weight_shape"] = torch.tensor(weight.codes.shape)
            else:
                state[name] = rounded(name, source.weight(name), dtype)
        folder.mkdir(parents=True)
        save_torch_state_dict(state, str(folder))
        config = _config(source, {name: each.scheme for name, each in held.items()}, dtype)
        if needs_code(config):
            add_code(folder, config, build_skeleton(source.dense_config))
        config.to_json_file(folder / CONFIG)
        if source.network.can_generate():
            source.network.generation_config.save_pretrained(folder)
        TokenizerFiles(source.folder).save_pretrained(folder)

        def read(name: str) -> Tensor:
            linear, _, kind = name.rpartition(".")
            if kind != "weight" or linear not in held:
                return state[name].float()
            return _values(state, linear, held[linear].scheme.bits).float()

        predicted = sum(_predicted_bytes(source, name, held, dtype) for name in source.names())
        return Written(tuple(Path(path) for path in entries_of(folder)), predicted, _changes(source, held, dtype), read)


def _linears(source: Source) -> list[str]:
    """The packed linears, the head among them where it is none of the embedding."""
    embedding = family_of(source.config)[1].embedding
    modules = (name.removesuffix(".weight") for name in source.names() if name.endswith(".weight"))
    return [name for name in modules if name != embedding and source.packed(name) is not None]


def _stock_linears(config: Any) -> set[str]:
    from accelerate import init_empty_weights

    with init_empty_weights():
        built = skeleton_config(config) if needs_code(config) else config
        model = getattr(transformers, family_of(config)[1].model_class)(built)
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _all_held(source: Source) -> dict[str, Held]:
    """How each packed linear is stored, by name: in the same way as those that engines fuse it with."""
    held = {name: _held(source, name) for name in _linears(source)}
    for units in unit_linears(source.network):
        for names in units.values():
            held |= _fused({name: held[name] for name in names if name in held})
    return held


def _fused(members: Mapping[str, Held]) -> dict[str, Held]:
    """The linears of a unit in one scheme, in which those whose codes are the model's keep them."""
    schemes = {each.scheme for each in members.values()}
    if len(schemes) < 2:  # they have the same precision in the plan, so that only adapters can tell them apart
        return {**members}
    (size,) = {each.scheme.size for each in members.values() if each.exact}
    scheme = Scheme(max(scheme.bits for scheme in schemes), size)
    wider = "engines fuse them with linears that have adapters"
    return {
        name: replace(each, scheme=scheme, reason=wider if each.scheme.bits < scheme.bits else each.reason)
        for name, each in members.items()
    }


def _held(source: Source, name: str) -> Held:
    """How a packed linear would be stored on its own."""
    linear = source.packed(name)
    assert linear is not None
    layout, columns = GroupLayout.of(linear), linear.in_features
    adapted = name in source.adapters
    size = layout.divided(columns, SIZES) if layout and layout.symmetric and not adapted else None
    if layout is not None and size is not None:
        bits = min(width for width in WIDTHS if width >= layout.bits)
        wider = "" if bits == layout.bits else f"the format has no {layout.bits}"
        return Held(Scheme(bits, ROW if size == columns else size), True, wider)
    if columns % SMALLEST:
        return Held(Scheme(8, ROW), False, f"rows of {columns} weights are no multiple of {SMALLEST}")
    reason = "their adapters are in them" if adapted else "the format has no such codes"
    # Two symmetric bits represent so much less than two bits of other formats that a second rounding leaves little.
    bits = min(width for width in WIDTHS if width >= linear.precision.bits and (width, linear.precision.bits) != (2, 2))
    group = layout.size if layout is not None else linear.precision.group
    sizes = [size for size in (group, SMALLEST) if size in SIZES and size != ROW and columns % size == 0]
    return Held(Scheme(bits, sizes[0]), False, reason)


def _weight(source: Source, name: str, held: Held) -> GroupedWeight:
    linear, scheme = source.packed(name), held.scheme
    assert linear is not None
    size = linear.in_features if scheme.size == ROW else scheme.size
    if held.exact:
        return GroupedWeight.of(linear, size).widened(scheme.bits)
    return GroupedWeight.encoded(source.weight(f"{name}.weight"), scheme.bits, size, symmetric=True)


def _values(state: Mapping[str, Tensor], linear: str, bits: int) -> Tensor:
    """The weight [O, I] of a linear in the dtype of its scales, as the engine computes it from its tensors."""
    rows, columns = state[f"{linear}.weight_shape"].tolist()
    codes = codes_of_stream(state[f"{linear}.weight_packed"].view(torch.uint8), columns, bits)
    scales = state[f"{linear}.weight_scale"]
    steps = (codes.short() - (1 << (bits - 1))).to(scales.dtype)
    return (steps.view(rows, scales.shape[1], -1) * scales.unsqueeze(2)).view(rows, columns)


def _predicted_bytes(source: Source, name: str, held: Mapping[str, Held], dtype: torch.dtype) -> int:
    shape, linear = source.shape(name), name.removesuffix(".weight")
    if linear not in held or linear == name:
        return torch.Size(shape).numel() * dtype.itemsize
    (rows, columns), scheme = shape, held[linear].scheme
    groups = 1 if scheme.size == ROW else columns // scheme.size
    return rows * (4 * -(-columns * scheme.bits // 32) + groups * dtype.itemsize) + 16


def _config(source: Source, schemes: Mapping[str, Scheme], dtype: torch.dtype) -> Any:
    config = portable_config(source.dense_config)
    config.architectures = [model_class_name(config)]
    config.dtype = dtype
    linears = defaultdict(list)
    for name, scheme in schemes.items():
        linears[scheme].append(name)
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": _targets(linears[scheme]), "weights": scheme.to_data()}
            for number, scheme in enumerate(sorted(linears))
        },
        "ignore": sorted(_stock_linears(config) - schemes.keys()),
    }
    return config


def _targets(linears: Iterable[str]) -> list[str]:
    """Patterns that match the names of some linears and no others, one for each kind of linear."""
    numbers = defaultdict(list)
    for name in linears:
        before, number, behind = re.fullmatch(r"(?:(.*?\.)(\d+)(\..*)|.*)", name).groups()  # type: ignore[union-attr]
        numbers[before or name, behind].append(number)
    return [
        f"re:^{re.escape(before)}" + (f"(?:{'|'.join(layers)}){re.escape(behind)}$" if behind else "$")
        for (before, behind), layers in numbers.items()
    ]


def _changes(source: Source, held: Mapping[str, Held], dtype: torch.dtype) -> tuple[str, ...]:
    kinds: Counter[str] = Counter()
    for name, each in held.items():
        linear = source.packed(name)
        assert linear is not None
        if each.reason:
            codes = "the codes as they were" if each.exact else "codes chosen anew"
            kinds[f"{linear.precision} became {each.scheme}, {codes}: {each.reason}"] += 1
    changes = [f"{number} linear{'s' * (number > 1)} of {kind}" for kind, number in kinds.items()]
    embedding = family_of(source.config)[1].embedding
    if source.packed(embedding) is not None:
        changes.append(f"the embedding is dense, in {str(dtype).removeprefix('torch.')}")
    if needs_code(portable_config(source.dense_config)):
        changes.append("layers differ in width: it is loaded with trust_remote_code=True, by the code that lies in it")
    if dtype != torch.float16:
        changes.append("scales are rounded to bfloat16, whose steps are coarse; --dtype float16 holds them as they are")
    return tuple(changes)
