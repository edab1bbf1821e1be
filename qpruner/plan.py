"""The compression plan: what every decoder layer keeps, and in how many bits, as data that a person can edit."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qpruner.architecture import Architecture, by_expert, describe_differences
from qpruner.errors import UserError, brief, cut
from qpruner.files import reading, write_text
from qpruner.precision import DENSE, ROW, Leading, Precision
from qpruner.ranges import format_ranges, parse_ranges

__all__ = [
    "DENSE",
    "ROW",
    "UNITS",
    "Architecture",
    "CompressionPlan",
    "LayerPlan",
    "Leading",
    "Precision",
    "describe_differences",
    "format_ranges",
    "parse_ranges",
]

KIND, VERSION = "qpruner plan", 2
MOST_BYTES = 2**26
"""Largest file that is read: no plan needs more, and a wrong file must not exhaust memory."""
UNITS = ("qkv", "o", "gate_up", "down")
"""The quantization units of a layer: what serving engines fuse shares one width."""


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer keeps, and in which order.

    Args:
        kv_groups: kept key-value heads, each with its query heads, in the order that they have in the narrowed layer;
            at least one, none twice.
        ffn_channels: kept intermediate channels, likewise. Of a mixture of experts they are counted through all of its
            experts: with 48 of them each, those of expert 2 are 96-143. An expert of which none is kept is gone; the
            others keep as many, each where it has them, and come one after the other in the order that they get.
        precision: precision of each of the `UNITS`.
        rank: rank of the adapters on its linears, at least 1; None for the ``r`` that the adapters of a run have.

    Raises:
        UserError: no unit, a unit twice, what is no number of a unit, units without a precision, or what is no rank.
    """

    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    precision: Mapping[str, Precision]
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_groups", "ffn_channels"):
            kept = getattr(self, name)
            if any(type(unit) is not int for unit in kept):
                raise UserError(f"{name} are whole numbers, not {brief(kept)}.")
            if not kept or min(kept) < 0 or len(set(kept)) < len(kept):
                raise UserError(
                    f"{name} must be numbers from 0, at least one and none twice, not {brief(format_ranges(kept))}."
                )
        if self.precision.keys() != set(UNITS):
            raise UserError(
                f"A layer has a precision for each of {', '.join(UNITS)}; found {cut(', '.join(self.precision))}."
            )
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise UserError(
                f"The rank of a layer's adapters is a whole number of at least 1, not {brief(self.rank)}. Leave it out "
                f"for --model.lora.r."
            )


@dataclass(frozen=True)
class CompressionPlan:
    """What of a model stays, and how it is held.

    Args:
        architecture: architecture of the model that the plan was made for.
        base_sha256: fingerprint of that model's configuration and weights; None when unknown.
        layers: [layers], what each layer keeps.
        embedding: how the token embedding is held.
        head: how the language-model head is held; with tied embeddings the same as the embedding.
        hidden: order of the channels of the residual stream, by which every linear, norm and table that reads or writes
            them goes: a permutation of ``range(hidden_size)``; None where they stand as they did.

    Raises:
        UserError: a layer is missing, a unit is kept that the architecture does not have, columns lead where a linear
            has no more, or an order of channels that is no permutation.
    """

    architecture: Architecture
    base_sha256: str | None
    layers: tuple[LayerPlan, ...]
    embedding: Precision = DENSE
    head: Precision = DENSE
    hidden: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        model = self.architecture
        if not isinstance(self.base_sha256, str | None):
            raise UserError(f"base_sha256 is a hash in hexadecimal or null, not {brief(self.base_sha256)}.")
        if len(self.layers) != model.num_layers:
            raise _other_layers(len(self.layers), model)
        for number, layer in enumerate(self.layers):
            _expect_units(model, number, layer)
            for unit, columns in self.columns(number).items():
                _expect_columns(f"{unit} of layer {number}", layer.precision[unit], columns)
        _expect_columns("The token embedding", self.embedding, model.hidden_size)
        _expect_columns("The head", self.head, model.hidden_size)
        hidden = self.hidden
        if hidden is None:
            return
        if any(type(channel) is not int for channel in hidden):
            raise UserError(f"hidden holds whole numbers, not {brief(hidden)}.")
        if sorted(hidden) != list(range(model.hidden_size)):
            raise UserError(
                f"hidden is an order of all channels from 0 to {model.hidden_size - 1}, each of them once, not "
                f"{brief(format_ranges(hidden))}. Leave hidden null to keep the order that the model has."
            )

    @classmethod
    def dense(cls, architecture: Architecture, base_sha256: str | None) -> "CompressionPlan":
        """The plan that keeps everything unchanged."""
        layers = (
            LayerPlan(tuple(range(groups)), tuple(range(channels)), dict.fromkeys(UNITS, DENSE))
            for groups, channels in zip(architecture.kv_groups, architecture.ffn_channels, strict=True)
        )
        return cls(architecture, base_sha256, tuple(layers))

    def keeping(self, kept: Iterable[tuple[Sequence[int], Sequence[int]]]) -> "CompressionPlan":
        """The plan that keeps, of what this one keeps, the KV groups and FFN channels at these places, in their order.

        Of ``o`` and ``down`` as many columns lead as are left of the leading ones; see `Precision.of_columns`.

        Args:
            kept: [layers], places counted from 0 among the units that this plan keeps.
        """
        heads = self.architecture.queries_per_group * self.architecture.head_dim
        layers = []
        for layer, (groups, channels) in zip(self.layers, kept, strict=True):
            o, down = (layer.precision[unit] for unit in ("o", "down"))
            precision = {**layer.precision, "o": o.of_columns(groups, heads), "down": down.of_columns(channels)}
            kv_groups = tuple(layer.kv_groups[place] for place in groups)
            ffn_channels = tuple(layer.ffn_channels[place] for place in channels)
            layers.append(replace(layer, kv_groups=kv_groups, ffn_channels=ffn_channels, precision=precision))
        return replace(self, layers=tuple(layers))

    def reordered(self, places: Sequence[int]) -> "CompressionPlan":
        """The plan whose residual stream has, of this one's channels, those at these places, in their order.

        Args:
            places: [hidden_size], places counted from 0 in the order that this plan gives them.
        """
        before = range(self.architecture.hidden_size) if self.hidden is None else self.hidden
        return replace(self, hidden=tuple(before[place] for place in places))

    def with_precision(
        self, precision: Sequence[Mapping[str, Precision]], *, embedding: Precision = DENSE, head: Precision = DENSE
    ) -> "CompressionPlan":
        """The plan with given precisions for the units of each layer, the embedding and the head.

        Args:
            precision: [layers], precision of each of the `UNITS`.
            embedding: precision of the token embedding.
            head: precision of the language-model head.
        """
        return replace(
            self,
            layers=tuple(
                replace(layer, precision=dict(units)) for layer, units in zip(self.layers, precision, strict=True)
            ),
            embedding=embedding,
            head=head,
        )

    def with_ranks(self, ranks: Iterable[int | None]) -> "CompressionPlan":
        """The plan whose layers have adapters of these ranks.

        Args:
            ranks: [layers], rank of the adapters of each layer; None for that of all adapters.
        """
        layers = zip(self.layers, ranks, strict=True)
        return replace(self, layers=tuple(replace(layer, rank=rank) for layer, rank in layers))

    def merged(self) -> "CompressionPlan":
        """The plan of the dense model that results as adapters are merged: the same units, dense and without ranks."""
        dense = self.with_precision([dict.fromkeys(UNITS, DENSE)] * len(self.layers))
        return dense.with_ranks([None] * len(self.layers))

    @property
    def ranks(self) -> list[int | None]:
        """[layers], rank of the adapters of each layer; None for that of all adapters."""
        return [layer.rank for layer in self.layers]

    @property
    def quantized(self) -> bool:
        """Whether any unit, the embedding or the head is held in fewer bits than it came with."""
        return bool(self.packed_precisions)

    @property
    def packed_precisions(self) -> set[Precision]:
        """The precisions of all units, the embedding and the head, each segment by itself, but `DENSE`."""
        units = (precision for layer in self.layers for precision in layer.precision.values())
        held = {self.embedding, self.head, *units}
        segments = {precision.leading.precision for precision in held if precision.leading is not None}
        return (segments | {precision.rest for precision in held}) - {DENSE}

    @property
    def widths(self) -> Architecture:
        """The architecture of the model once the plan is carried out."""
        return replace(
            self.architecture,
            kv_groups=tuple(len(layer.kv_groups) for layer in self.layers),
            ffn_channels=tuple(len(layer.ffn_channels) for layer in self.layers),
            experts=tuple(self._kept_experts(number) for number in range(len(self.architecture.experts))),
        )

    def _kept_experts(self, number: int) -> int:
        if not self.architecture.num_experts(number):
            return 0
        each = self.architecture.channels_of_each(number)
        return len({channel // each for channel in self.layers[number].ffn_channels})

    def columns(self, number: int) -> dict[str, int]:
        """The input columns of the linears of each of the `UNITS` of a layer, once the plan is carried out."""
        layer, hidden = self.layers[number], self.architecture.hidden_size
        heads = len(layer.kv_groups) * self.architecture.queries_per_group * self.architecture.head_dim
        channels = len(layer.ffn_channels) // max(1, self._kept_experts(number))
        return dict(zip(UNITS, (hidden, heads, hidden, channels), strict=True))

    def check(self, architecture: Architecture, base_sha256: str | None) -> None:
        """Makes sure that the plan is for a model; warns when it was made from other weights of the same shape.

        Raises:
            UserError: the model has another shape.
        """
        if differences := describe_differences(self.architecture, architecture):
            raise UserError(f"The plan is for another model: {differences}. Make a plan for this one.")
        if None not in (self.base_sha256, base_sha256) and self.base_sha256 != base_sha256:
            warnings.warn(
                f"The plan was made from other weights of the same shape ({self.base_sha256}, here {base_sha256}); "
                f"what it keeps may not be what matters in these.",
                stacklevel=2,
            )

    # JSON.

    def to_json(self) -> str:
        """One line for each part of a layer, so that a person can read, edit and compare it."""
        header = {
            "kind": KIND,
            "version": VERSION,
            "architecture": self.architecture.to_data(),
            "base_sha256": self.base_sha256,
            "embedding": self.embedding.to_data(),
            "head": self.head.to_data(),
            "hidden": None if self.hidden is None else format_ranges(self.hidden),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
        layers = ",\n".join(
            f'    {{"kv_groups": {json.dumps(format_ranges(layer.kv_groups))},\n'
            f'     "ffn_channels": {json.dumps(format_ranges(layer.ffn_channels))},\n'
            f'     "precision": {json.dumps({unit: layer.precision[unit].to_data() for unit in UNITS})}'
            + ("" if layer.rank is None else f', "rank": {layer.rank}')
            + "}"
            for layer in self.layers
        )
        return "{\n" + ",\n".join([*lines, f'  "layers": [\n{layers}\n  ]']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "CompressionPlan":
        """Reads what `to_json` wrote, in version 1 too, which had no ``hidden`` and only ascending units.

        Raises:
            UserError: not a plan, of another version, or with a missing, unknown or impossible entry.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"This is no plan: not valid JSON ({cut(error)}).") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise UserError(f'This is no plan: it does not say "kind": "{KIND}".')
        version = content.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise UserError(f"The plan has version {brief(version)}; this qpruner reads versions 1 and {VERSION}.")
        first = version == 1
        try:
            keys = {"kind", "version", "architecture", "base_sha256", "embedding", "head", "layers"}
            _expect_keys(content, keys if first else keys | {"hidden"})
            widths_there = {field.name for field in fields(Architecture)}
            of_experts = {"experts", "experts_per_token"}
            has_experts = bool(of_experts & content["architecture"].keys())
            _expect_keys(content["architecture"], widths_there if has_experts else widths_there - of_experts)
            widths: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in content["architecture"].items()
            }
            architecture = Architecture(**widths)
            return cls(
                architecture,
                content["base_sha256"],
                tuple(_read_layers(content["layers"], architecture, ascending=first)),
                embedding=Precision.of_data(content["embedding"]),
                head=Precision.of_data(content["head"]),
                hidden=None if content.get("hidden") is None else parse_ranges(content["hidden"]),
            )
        except (TypeError, AttributeError) as error:
            raise UserError(f"The plan has an entry of a wrong kind: {cut(error)}.") from error

    def write(self, path: Path) -> None:
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> "CompressionPlan":
        """Reads a plan's file.

        Raises:
            UserError: there is no such file, or it holds no plan; see `from_json`.
        """
        with reading(path, "Correct the file, or give the plan.json of a finished run."):
            if (size := path.stat().st_size) > MOST_BYTES:
                raise UserError(f"This is no plan: it has {size:,} bytes, and no plan needs {MOST_BYTES:,}.")
            return cls.from_json(path.read_text(encoding="utf-8"))


def _read_layers(contents: list[Any], architecture: Architecture, *, ascending: bool) -> Iterator[LayerPlan]:
    if isinstance(contents, list) and len(contents) != architecture.num_layers:
        raise _other_layers(len(contents), architecture)
    for number, content in enumerate(contents):
        layer = _read_layer(content, ascending=ascending)
        _expect_units(architecture, number, layer)  # before the next one is spelt out
        yield layer


def _other_layers(count: int, architecture: Architecture) -> UserError:
    return UserError(f"The plan has {count} layers; its model has {architecture.num_layers}.")


def _expect_units(architecture: Architecture, number: int, layer: LayerPlan) -> None:
    for name, kept, count in (
        ("KV groups", layer.kv_groups, architecture.kv_groups[number]),
        ("FFN channels", layer.ffn_channels, architecture.ffn_channels[number]),
    ):
        if max(kept) >= count:
            raise UserError(f"Layer {number} keeps {name} up to {max(kept)}; it has 0 to {count - 1}.")
    if architecture.num_experts(number):
        _expect_experts(architecture, number, layer)


def _expect_experts(architecture: Architecture, number: int, layer: LayerPlan) -> None:
    each = architecture.channels_of_each(number)
    experts = by_expert(layer.ffn_channels, each)
    together = [expert * each + place for expert, places in experts.items() for place in places]
    counts = {expert: len(places) for expert, places in experts.items()}
    if together != list(layer.ffn_channels):
        raise UserError(f"In layer {number} the FFN channels of an expert do not stand together. Put them in one row.")
    if len(set(counts.values())) > 1:
        raise UserError(
            f"In layer {number} experts keep different numbers of FFN channels ({cut(counts)}); all experts of a layer "
            f"are equally wide. Keep as many of each, or none."
        )
    if len(experts) < architecture.experts_per_token:
        raise UserError(
            f"Layer {number} keeps {len(experts)} experts, but each token is sent to {architecture.experts_per_token}. "
            f"Keep at least that many."
        )
    if layer.precision["down"].leading is not None:
        raise UserError(
            f"In layer {number} leading columns of down have a precision of their own, which experts do not offer: "
            f"they keep different channels. Hold all of down in one precision."
        )


def _expect_columns(what: str, precision: Precision, columns: int) -> None:
    leading = precision.leading
    if leading is not None and leading.columns >= columns:
        raise UserError(
            f"{what} has {columns} input columns, of which {leading.columns} cannot lead. Give at most {columns - 1}, "
            f"or hold all of them in {leading.precision}."
        )


def _read_layer(content: dict[str, Any], *, ascending: bool) -> LayerPlan:
    _expect_keys(content, {"kv_groups", "ffn_channels", "precision"} | ({"rank"} & content.keys()))
    return LayerPlan(
        parse_ranges(content["kv_groups"], ascending=ascending),
        parse_ranges(content["ffn_channels"], ascending=ascending),
        {unit: Precision.of_data(precision) for unit, precision in content["precision"].items()},
        content.get("rank"),
    )


def _expect_keys(content: Mapping[str, Any], keys: set[str]) -> None:
    if content.keys() != keys:
        missing, unknown = sorted(keys - content.keys()), sorted(content.keys() - keys)
        raise UserError(
            "The plan is not as it should be:"
            + (f" {', '.join(missing)} missing." if missing else "")
            + (f" {cut(', '.join(unknown))} unknown." if unknown else "")
        )
