"""The compression plan: what of every decoder layer stays, and in how many bits, as data that a person can edit."""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qpruner.errors import UserError, brief, cut
from qpruner.files import reading, write_text

KIND, VERSION = "qpruner plan", 1
# No model has more, and a slip of the pen shall not fill the memory.
MOST_LAYERS, MOST_UNITS, MOST_IN_ALL, MOST_BYTES = 10_000, 1_000_000, 20_000_000, 2**26
ROW = -1
"""The group of a whole row, as the field writes it."""
UNITS = ("qkv", "o", "gate_up", "down")
"""The quantization units of a layer: what serving engines fuse shares one width."""


@dataclass(frozen=True)
class Precision:
    """How the weights of a quantization unit are held.

    Args:
        format: name of a number format; ``dense`` leaves the weights as they are.
        bits: bits of a weight, scales not counted, from 1 to 16.
        group: number of weights that share a scale; -1 for a whole row, None where the format itself says.

    Raises:
        UserError: another number of bits, a group without weights, or a format that is no name.
    """

    format: str
    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or not re.fullmatch(r"[\w-]{1,40}", self.format):
            raise UserError(f"A format is a name, not {brief(self.format)}.")
        if type(self.bits) is not int or not 1 <= self.bits <= 16:
            raise UserError(f"A weight has 1 to 16 bits, not {brief(self.bits)}.")
        group = self.group
        if group is not None and (type(group) is not int or not (group == ROW or 1 <= group <= MOST_UNITS)):
            raise UserError(f"A group holds at least 1 weight, or a whole row with {ROW}, not {brief(group)}.")

    def __str__(self) -> str:
        return f"{self.format} {self.bits}" + (f"/{'row' if self.group == ROW else self.group}" if self.group else "")


DENSE = Precision("dense", 16)


@dataclass(frozen=True)
class Architecture:
    """The widths of a model, layer by layer, as far as plans depend on them.

    Args:
        model_type: family, as transformers names it.
        hidden_size: width of the residual stream.
        head_dim: channels of a head.
        queries_per_group: query heads that read one key-value head.
        kv_groups: [layers], key-value heads of each layer, with their query heads.
        ffn_channels: [layers], intermediate channels of each layer.

    Raises:
        UserError: a width that is not a positive whole number or larger than that of any model, or lists of different
            lengths.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    queries_per_group: int
    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.model_type, str) or not re.fullmatch(r"[\w-]{1,80}", self.model_type):
            raise UserError(f"model_type is the name of a family, not {brief(self.model_type)}.")
        numbers = self.hidden_size, self.head_dim, self.queries_per_group, *self.kv_groups, *self.ffn_channels
        if not all(type(number) is int and number > 0 for number in numbers):
            raise UserError(f"The widths of an architecture are whole numbers above 0: {cut(self)}.")
        if not self.kv_groups or len(self.kv_groups) != len(self.ffn_channels):
            raise UserError(f"An architecture has KV groups and FFN channels for each of its layers: {cut(self)}.")
        if self.num_layers > MOST_LAYERS or max(numbers) > MOST_UNITS or sum(numbers) > MOST_IN_ALL:
            raise UserError(
                f"An architecture has at most {MOST_LAYERS:,} layers, widths of {MOST_UNITS:,} and {MOST_IN_ALL:,} "
                f"units in all: {cut(self)}."
            )

    @property
    def num_layers(self) -> int:
        return len(self.kv_groups)


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer keeps.

    Args:
        kv_groups: kept key-value heads, each with its query heads; ascending, at least one.
        ffn_channels: kept intermediate channels; ascending, at least one.
        precision: precision of each of the `UNITS`.
    """

    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    precision: Mapping[str, Precision]

    def __post_init__(self) -> None:
        for name in ("kv_groups", "ffn_channels"):
            kept = getattr(self, name)
            if any(type(unit) is not int for unit in kept):
                raise UserError(f"{name} are whole numbers, not {brief(kept)}.")
            if not kept or kept[0] < 0 or any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
                raise UserError(
                    f"{name} must be ascending numbers from 0, at least one, not {brief(format_ranges(kept))}."
                )
        if self.precision.keys() != set(UNITS):
            raise UserError(
                f"A layer has a precision for each of {', '.join(UNITS)}; found {cut(', '.join(self.precision))}."
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

    Raises:
        UserError: a layer is missing, or a unit is kept that the architecture does not have.
    """

    architecture: Architecture
    base_sha256: str | None
    layers: tuple[LayerPlan, ...]
    embedding: Precision = DENSE
    head: Precision = DENSE

    def __post_init__(self) -> None:
        model = self.architecture
        if not isinstance(self.base_sha256, str | None):
            raise UserError(f"base_sha256 is a hash in hexadecimal or null, not {brief(self.base_sha256)}.")
        if len(self.layers) != model.num_layers:
            raise _other_layers(len(self.layers), model)
        for number, layer in enumerate(self.layers):
            _expect_units(model, number, layer)

    @classmethod
    def dense(cls, architecture: Architecture, base_sha256: str | None) -> "CompressionPlan":
        """Everything stays as it is."""
        layers = (
            LayerPlan(tuple(range(groups)), tuple(range(channels)), dict.fromkeys(UNITS, DENSE))
            for groups, channels in zip(architecture.kv_groups, architecture.ffn_channels, strict=True)
        )
        return cls(architecture, base_sha256, tuple(layers))

    def keeping(self, kept: Iterable[tuple[Sequence[int], Sequence[int]]]) -> "CompressionPlan":
        """The plan that keeps, of what this one keeps, the KV groups and FFN channels at these places.

        Args:
            kept: [layers], places counted from 0 among the units that this plan keeps.
        """
        return replace(
            self,
            layers=tuple(
                replace(
                    layer,
                    kv_groups=tuple(layer.kv_groups[i] for i in groups),
                    ffn_channels=tuple(layer.ffn_channels[i] for i in channels),
                )
                for layer, (groups, channels) in zip(self.layers, kept, strict=True)
            ),
        )

    def with_precision(
        self, precision: Sequence[Mapping[str, Precision]], *, embedding: Precision = DENSE, head: Precision = DENSE
    ) -> "CompressionPlan":
        """The plan that holds the units of each layer, the embedding and the head at these precisions.

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

    @property
    def quantized(self) -> bool:
        """Whether any unit, the embedding or the head is held in fewer bits than it came with."""
        units = (precision for layer in self.layers for precision in layer.precision.values())
        return any(precision != DENSE for precision in (self.embedding, self.head, *units))

    @property
    def widths(self) -> Architecture:
        """The architecture of the model once the plan is carried out."""
        return replace(
            self.architecture,
            kv_groups=tuple(len(layer.kv_groups) for layer in self.layers),
            ffn_channels=tuple(len(layer.ffn_channels) for layer in self.layers),
        )

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
            "architecture": asdict(self.architecture),
            "base_sha256": self.base_sha256,
            "embedding": asdict(self.embedding),
            "head": asdict(self.head),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
        layers = ",\n".join(
            f'    {{"kv_groups": {json.dumps(format_ranges(layer.kv_groups))},\n'
            f'     "ffn_channels": {json.dumps(format_ranges(layer.ffn_channels))},\n'
            f'     "precision": {json.dumps({unit: asdict(layer.precision[unit]) for unit in UNITS})}}}'
            for layer in self.layers
        )
        return "{\n" + ",\n".join([*lines, f'  "layers": [\n{layers}\n  ]']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "CompressionPlan":
        """Reads what `to_json` wrote.

        Raises:
            UserError: not a plan, of another version, or with a missing, unknown or impossible entry.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"This is no plan: not valid JSON ({cut(error)}).") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise UserError(f'This is no plan: it does not say "kind": "{KIND}".')
        if content.get("version") != VERSION:
            raise UserError(
                f"The plan has version {brief(content.get('version'))}; this qpruner reads version {VERSION}."
            )
        try:
            _expect_keys(content, {"kind", "version", "architecture", "base_sha256", "embedding", "head", "layers"})
            _expect_keys(content["architecture"], {field.name for field in fields(Architecture)})
            widths: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in content["architecture"].items()
            }
            architecture = Architecture(**widths)
            return cls(
                architecture,
                content["base_sha256"],
                tuple(_read_layers(content["layers"], architecture)),
                embedding=Precision(**content["embedding"]),
                head=Precision(**content["head"]),
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


def describe_differences(there: Architecture, here: Architecture) -> str:
    """The widths in which two architectures differ, or an empty string."""
    return "; ".join(
        f"{field.name} is {cut(getattr(there, field.name), 80)} there and {cut(getattr(here, field.name), 80)} here"
        for field in fields(Architecture)
        if getattr(there, field.name) != getattr(here, field.name)
    )


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: ``0-3 5 7-8``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """The numbers that `format_ranges` wrote.

    Raises:
        UserError: anything else than numbers and ranges, or not ascending.
    """
    numbers: list[int] = []
    for part in text.split():
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        run = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else range(0)
        if not run or run[-1] > MOST_UNITS or (numbers and run[0] <= numbers[-1]):
            raise UserError(
                f"{brief(part)} in {brief(text)} must be a number or a range such as 4-7, above those before it."
            )
        numbers += run
    return tuple(numbers)


def _read_layers(contents: list[Any], architecture: Architecture) -> Iterator[LayerPlan]:
    if isinstance(contents, list) and len(contents) != architecture.num_layers:
        raise _other_layers(len(contents), architecture)
    for number, content in enumerate(contents):
        layer = _read_layer(content)
        _expect_units(architecture, number, layer)  # before the next one is spelt out
        yield layer


def _other_layers(count: int, architecture: Architecture) -> UserError:
    return UserError(f"The plan has {count} layers; its model has {architecture.num_layers}.")


def _expect_units(architecture: Architecture, number: int, layer: LayerPlan) -> None:
    for name, kept, count in (
        ("KV groups", layer.kv_groups, architecture.kv_groups[number]),
        ("FFN channels", layer.ffn_channels, architecture.ffn_channels[number]),
    ):
        if kept[-1] >= count:
            raise UserError(f"Layer {number} keeps {name} up to {kept[-1]}; it has 0 to {count - 1}.")


def _read_layer(content: dict[str, Any]) -> LayerPlan:
    _expect_keys(content, {"kv_groups", "ffn_channels", "precision"})
    return LayerPlan(
        parse_ranges(content["kv_groups"]),
        parse_ranges(content["ffn_channels"]),
        {unit: Precision(**precision) for unit, precision in content["precision"].items()},
    )


def _expect_keys(content: Mapping[str, Any], keys: set[str]) -> None:
    if content.keys() != keys:
        missing, unknown = sorted(keys - content.keys()), sorted(content.keys() - keys)
        raise UserError(
            "The plan is not as it should be:"
            + (f" {', '.join(missing)} missing." if missing else "")
            + (f" {cut(', '.join(unknown))} unknown." if unknown else "")
        )
